"""JSONL in, batches out: bad lines are named, targets stand where they should, nothing is lost uncounted."""

import dataclasses
import inspect
import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosup.data.collate import IGNORE, GenCtxCollator, micro_batches
from cosup.data.schema import Instance, Passage, Reference, read_instances, read_passages, write_jsonl
from cosup.model import GenCtxConfig
from cosup.tokens import add_control_tokens, control_ids, encode, passage_text, prompt_ids
from tiny import tiny_instances, tiny_passages, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
add_control_tokens(TOKENIZER)
CONTROL = control_ids(TOKENIZER)
PASSAGES = tiny_passages(12)


def collator(**options) -> GenCtxCollator:
    return GenCtxCollator(TOKENIZER, TOKENIZER, PASSAGES, **options)


def ids(text: str) -> list[int]:
    return encode(TOKENIZER, text)


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# --- schema ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again(tmp_path) -> None:
    odd = Passage("ü 1", "", 'line\u2028separator, quote " and [Ret]')
    passages = {**PASSAGES, odd.id: odd}
    path = tmp_path / "new" / "folder" / "passages.jsonl"
    write_jsonl(path, passages.values())
    write_jsonl(tmp_path / "instances.jsonl", tiny_instances(12))
    assert read_passages(path) == passages
    assert read_instances(tmp_path / "instances.jsonl", passages) == tiny_instances(12)
    assert '"ü 1"'.encode() in path.read_bytes()  # text that a reader reads
    assert path.stat().st_mode & 0o777 == 0o644  # of all, as a file that is not temporary


def test_a_file_is_made_beside_its_place(tmp_path) -> None:
    """Where it can be moved from as a whole: another folder may be another disk."""

    def passages():
        yield PASSAGES["p1"]
        assert [path.suffix for path in tmp_path.iterdir()] == [".part"]

    write_jsonl(tmp_path / "passages.jsonl", passages())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path) -> None:
    path = tmp_path / "passages.jsonl"
    write_jsonl(path, [PASSAGES["p1"]])
    with pytest.raises(TypeError):
        write_jsonl(path, [PASSAGES["p2"], None])  # type: ignore[list-item]
    assert list(read_passages(path)) == ["p1"] and list(tmp_path.iterdir()) == [path]


def test_short_forms(tmp_path) -> None:
    path = write_lines(
        tmp_path / "i.jsonl",
        {"id": "a", "input": "?", "output": "just text"},
        "",
        {
            "id": "b",
            "input": "?",
            "output": [{"passage": "p2", "grounded": "x"}, "y", {"passage": "p1", "grounded": "z"}] * 2,
            "more": 1,
        },
    )
    plain, referenced = read_instances(path, PASSAGES)
    assert plain == Instance("a", "?", ("just text",))
    assert referenced.passages == ("p2", "p1")
    assert read_passages(write_lines(path, {"id": "p", "text": "x"})) == {"p": Passage("p", "", "x")}


GOOD_INSTANCE = {"id": "q", "input": "?", "output": [{"passage": "p1", "grounded": "x"}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "p"', "delimiter"),
        ("[1]", "wanted a JSON object, got list"),
        pytest.param("[" * 100_000, "wanted an object, got one nested too deeply", id="deep"),
        ({"title": "t", "text": "x"}, "id: wanted a string, got no such field"),
        ({"id": 3, "text": "x"}, "id: wanted a string, got int"),
        ({"id": "p", "title": None, "text": "x"}, "title: wanted a string, got NoneType"),
        ({"id": "p"}, "text: wanted a string, got no such field"),
        ({"id": "p", "text": " \n"}, "passage 'p' is empty"),
        ({"id": "good", "text": "again"}, "id 'good' was seen before"),
    ],
)
def test_a_bad_passage_line_is_named(tmp_path, line, message) -> None:
    path = write_lines(tmp_path / "p.jsonl", {"id": "good", "text": "x"}, "", line)
    with pytest.raises(ValueError) as error:
        read_passages(path)
    assert str(error.value).startswith(f"{path}:3: ") and message in str(error.value)


def test_a_line_that_is_not_utf8_is_named(tmp_path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"id": "a", "text": "x"}\n{"id": "b", "text": "\xff"}\n')
    with pytest.raises(ValueError, match=":2: .*utf-8"):
        read_passages(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": [{"passage": "p99", "grounded": "x"}]}, "output: passage 'p99' is unknown"),
        ({"passages": ["p1", "p98"]}, "passages: passage 'p98' is unknown"),
        ({"hard_negatives": ["p97"]}, "hard_negatives: passage 'p97' is unknown"),
        ({"output": []}, "output: wanted text or a reference, got an empty list"),
        ({"output": 7}, "output: wanted a string or a list, got int"),
        ({"output": [7]}, "output: wanted strings and references, got int"),
        ({"output": [{"passage": "p1", "grounded": 1}]}, "grounded: wanted a string, got int"),
        ({"output": [{"passage": "p1"}, "y"]}, "output: wanted nothing after a reference without grounded text"),
        ({"output": ["x", {"passage": "p1"}, "y"]}, "output: wanted nothing after a reference without grounded text"),
        ({"input": None}, "input: wanted a string, got NoneType"),
        ({"answers": "hat"}, "answers: wanted a list of strings, got str"),
        ({"passages": [1]}, "passages: wanted a list of strings, got list"),
    ],
)
def test_a_bad_instance_line_is_named(tmp_path, change, message) -> None:
    path = write_lines(tmp_path / "i.jsonl", GOOD_INSTANCE, {**GOOD_INSTANCE, "id": "bad", **change})
    with pytest.raises(ValueError) as error:
        read_instances(path, PASSAGES)
    assert str(error.value) == f"{path}:2: {message}"


def test_skipping_counts_and_gives_up_over_one_percent(tmp_path) -> None:
    lines = [{"id": str(i), "text": "x"} for i in range(99)]
    path = write_lines(tmp_path / "p.jsonl", "broken", *lines)
    with pytest.warns(UserWarning, match=r"skipped 1 of 100 lines; the first: .*p\.jsonl:1: ") as told:
        assert len(read_passages(path, on_bad_line="skip")) == 99
    assert told[0].filename == __file__  # the caller's
    write_lines(path, "broken", *lines[:98])
    with pytest.raises(ValueError, match=r"1 of 99 lines are bad, more than 1%; the first: .*p\.jsonl:1: "):
        read_passages(path, on_bad_line="skip")
    with pytest.raises(ValueError, match='on_bad_line: wanted "raise" or "skip", got \'ignore\''):
        read_passages(path, on_bad_line="ignore")  # type: ignore[arg-type]


# --- collator -------------------------------------------------------------------------------------------------------

INSTANCE = Instance(
    "q", "Which?", ("First ", Reference("p1", "grounded one"), " then ", Reference("p2", "two"), " end.")
)


@pytest.mark.parametrize("passage_in_ntp", [False, True])
def test_a_row_is_laid_out_and_labelled_as_specified(passage_in_ntp) -> None:
    batch = collator(passage_in_ntp=passage_in_ntp, max_passage_length=20)([INSTANCE])
    assert "position_ids" not in batch  # rows are not packed
    expected: list[tuple[int, bool]] = [(i, False) for i in prompt_ids(TOKENIZER, "Which?")]
    for part in INSTANCE.output:
        if isinstance(part, str):
            expected += [(i, True) for i in ids(part)]
        else:
            passage = PASSAGES[part.passage]
            expected += [(CONTROL.retrieve, True)]
            expected += [(i, passage_in_ntp) for i in ids(passage_text(passage.title, passage.text))[:20]]
            expected += [(CONTROL.ground, passage_in_ntp)]
            expected += [(i, True) for i in ids(part.grounded)] + [(CONTROL.end, True)]
    expected += [(CONTROL.eos, True)]
    assert batch["input_ids"].tolist() == [[i for i, _ in expected]]
    assert batch["labels"].tolist() == [[i if target else IGNORE for i, target in expected]]
    assert batch["query_index"].tolist() == [t for t, (i, _) in enumerate(expected) if i == CONTROL.retrieve]
    assert batch["attention_mask"].all()


def test_without_grounded_text_a_row_ends_at_its_query() -> None:
    batch = collator()([Instance("q", "Which?", ("First ", Reference("p1")))])
    row = [*prompt_ids(TOKENIZER, "Which?"), *ids("First "), CONTROL.retrieve]
    assert batch["input_ids"].tolist() == [row] and batch["query_index"].tolist() == [len(row) - 1]
    assert batch["labels"][0, -1] == CONTROL.retrieve and len(batch["candidate_ids"]) == 1


@pytest.mark.parametrize("pad", ["<PAD>", "</s>"])
def test_padding_is_at_the_right_and_never_a_target(pad) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": pad})  # "</s>": pad and eos are one id, as in many released models
    add_control_tokens(tokenizer)
    batch = GenCtxCollator(tokenizer, tokenizer, PASSAGES)(tiny_instances(8))
    mask = batch["attention_mask"].bool()
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, length in enumerate(lengths):
        assert mask[row, :length].all()
        assert batch["labels"][row, length - 1] == tokenizer.eos_token_id
    assert (batch["labels"][~mask] == IGNORE).all()
    assert (batch["input_ids"][~mask] == tokenizer.pad_token_id).all()
    assert (batch["passage_input_ids"][~batch["passage_attention_mask"].bool()] == tokenizer.pad_token_id).all()


def candidate_texts(batch) -> list[str]:
    rows = zip(batch["passage_input_ids"], batch["passage_attention_mask"], strict=True)
    return [TOKENIZER.decode(row[mask.bool()]) for row, mask in rows]


def test_query_targets_with_duplicates_and_hard_negatives() -> None:
    a = Instance("a", "?", (Reference("p3", "x"), Reference("p1", "x")), hard_negatives=("p5", "p3"))
    b = Instance("b", "?", ("none",), hard_negatives=("p9",))  # asks for nothing: its negatives are of no use
    c = Instance("c", "?", (Reference("p3", "x"),), hard_negatives=("p5", "p6"))
    wanted = [PASSAGES[id] for id in ("p3", "p1", "p3")]

    unique = collator()([a, b, c])
    assert unique["candidate_ids"].tolist() == [3, 1, 5, 6]
    assert unique["query_target"].tolist() == [0, 1, 0]
    paper = collator(unique_passages=False)([a, b, c])
    assert paper["candidate_ids"].tolist() == [3, 1, 3, 5, 3, 5, 6]
    assert paper["query_target"].tolist() == [0, 1, 2]
    for batch in (unique, paper):
        texts = candidate_texts(batch)
        assert [texts[i] for i in batch["query_target"]] == [passage_text(p.title, p.text) for p in wanted]
        assert (batch["input_ids"].flatten()[batch["query_index"]] == CONTROL.retrieve).all()


@settings(max_examples=40, deadline=None)
@given(
    picks=st.lists(st.integers(0, 11), min_size=1, max_size=6),
    unique=st.booleans(),
    max_length=st.integers(1, 200),
    embed=st.booleans(),
)
@pytest.mark.filterwarnings("ignore:a row of")
def test_every_query_points_at_its_passage_and_every_loss_is_counted(picks, unique, max_length, embed) -> None:
    instances = [tiny_instances(12)[pick] for pick in picks]
    whole = collator(unique_passages=unique, append_embed_token=embed)(instances)
    cutting = collator(unique_passages=unique, append_embed_token=embed, max_length=max_length)
    batch = cutting(instances)

    report = cutting.report()
    assert batch["input_ids"].shape[1] <= max_length
    assert report["instances"] == len(instances)
    assert report["truncated"] == int((whole["attention_mask"].sum(1) > max_length).sum())
    assert report["targets_lost"] == int((whole["labels"] != IGNORE).sum() - (batch["labels"] != IGNORE).sum())
    assert report["retrievals_lost"] == len(whole["query_index"]) - len(batch["query_index"])
    assert report["without_target"] == int((batch["labels"] == IGNORE).all(1).sum())

    rows = {tuple(divmod(i, whole["input_ids"].shape[1])): t for i, t in pairs(whole)}
    for index, target in pairs(batch):
        place = divmod(index, batch["input_ids"].shape[1])
        assert batch["candidate_ids"][target] == whole["candidate_ids"][rows[place]]
    if unique:
        assert len(set(batch["candidate_ids"].tolist())) == len(batch["candidate_ids"])
    real = batch["passage_attention_mask"].sum(1)
    last = batch["passage_input_ids"][torch.arange(len(real)), real - 1] if len(real) else real
    assert ((last == CONTROL.embed) == embed).all()
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def pairs(batch) -> list[tuple[int, int]]:
    return list(zip(batch["query_index"].tolist(), batch["query_target"].tolist(), strict=True))


@pytest.mark.filterwarnings("ignore:a row of")
def test_a_query_is_kept_with_its_token() -> None:
    instances = tiny_instances(1)
    place = int(collator()(instances)["query_index"][0])
    for max_length, kept in ((place, []), (place + 1, [place])):
        assert collator(max_length=max_length)(instances)["query_index"].tolist() == kept


def test_the_first_cut_is_warned_of_once() -> None:
    cutting = collator(max_length=30)
    with pytest.warns(UserWarning, match="cut to max_length 30"):
        cutting(tiny_instances(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cutting(tiny_instances(4))


def test_targets_beyond_the_length_of_a_passage_are_counted() -> None:
    cutting, passages = collator(passage_in_ntp=True, max_passage_length=20), (PASSAGES["p1"], PASSAGES["p2"])
    lost = [max(0, len(ids(passage_text(passage.title, passage.text))) - 20) for passage in passages]
    cutting([INSTANCE])
    cutting([INSTANCE])
    assert all(lost) and cutting.report()["targets_lost"] == 2 * sum(lost)


def test_a_collator_is_by_default_that_of_a_pair() -> None:
    defaults = {p.name: p.default for p in inspect.signature(GenCtxCollator).parameters.values()}
    names = {field.name for field in dataclasses.fields(GenCtxConfig)} & {*defaults}
    assert names == {"max_length", "max_passage_length", "passage_in_ntp", "unique_passages"}
    assert all(defaults[name] == getattr(GenCtxConfig(), name) for name in names)


def test_micro_batches_hold_no_padding_that_none_of_them_needs() -> None:
    long, short = (Instance(name, name, (Reference(name, name),)) for name in ("long " * 9, "short"))
    passages = {instance.id: Passage(instance.id, "", instance.id) for instance in (long, short)}
    batch = GenCtxCollator(TOKENIZER, TOKENIZER, passages)([short, long])
    first, second = micro_batches(batch, 1)
    for name in ("input_ids", "attention_mask", "labels", "passage_input_ids", "passage_attention_mask"):
        assert torch.equal(second[name], batch[name][1:]) and first[name].shape[1] < batch[name].shape[1]
        assert torch.equal(first[name], batch[name][:1, : first[name].shape[1]])
    assert first["attention_mask"].all() and first["passage_attention_mask"].all()
    with pytest.raises(ValueError, match="size: wanted at least 1, got 0"):
        micro_batches(batch, 0)


def test_a_batch_without_retrieval_has_empty_candidates() -> None:
    batch = collator()([Instance("a", "?", ("text",)), Instance("b", "?", ("other text",))])
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    assert shapes["query_index"] == shapes["query_target"] == shapes["candidate_ids"] == (0,)
    assert shapes["passage_input_ids"] == shapes["passage_attention_mask"] == (0, 0)


hostile = st.lists(st.sampled_from(["[Ret]", "[Cs]", "[Ce]", "[Emb]", "<PAD>", "</s>", "[", "Ret", "]"]), max_size=8)


@settings(max_examples=60, deadline=None)
@given(*(hostile.map("".join) for _ in range(5)))
def test_no_text_of_an_instance_or_passage_places_a_control_token(question, text, grounded, title, body) -> None:
    passages = {"p": Passage("p", title, body + ".")}
    instance = Instance("q", question, (text, Reference("p", grounded), text))
    batch = GenCtxCollator(TOKENIZER, TOKENIZER, passages, append_embed_token=True)([instance])
    placed = [i for i in batch["input_ids"][0].tolist() if i in CONTROL]
    assert placed == [CONTROL.retrieve, CONTROL.ground, CONTROL.end, CONTROL.eos]
    assert [i for i in batch["passage_input_ids"][0].tolist() if i in CONTROL] == [CONTROL.embed]


def test_bad_calls_are_refused() -> None:
    for name in ("max_length", "max_passage_length"):
        with pytest.raises(ValueError, match=f"^{name}: wanted at least 1, got 0"):
            collator(**{name: 0})
    with pytest.raises(ValueError, match="control tokens"):
        GenCtxCollator(tiny_tokenizer(), TOKENIZER, PASSAGES)
    with pytest.raises(ValueError, match="instances: wanted at least one, got none"):
        collator()([])
    with pytest.raises(ValueError, match="passage 'p99' is not among the 12 passages"):
        collator()([Instance("a", "?", (Reference("p99", "x"),))])
