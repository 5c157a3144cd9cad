"""An index in Milvus finds what the one in memory finds; a collection that is no whole index is refused by name."""

import json
import os
import sys
from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from cosup import cli
from cosup.data import write_jsonl
from cosup.data.schema import Passage
from cosup.evaluate import evaluate
from cosup.index import SequenceIndex
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.tokens import control_ids
from tiny import tiny_encoder, tiny_gen, tiny_instances, tiny_passages, tiny_tokenizer

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")
from milvus_lite.server_manager import server_manager_instance  # noqa: E402
from pymilvus import MilvusClient, MilvusException  # noqa: E402

from cosup.integrations import milvus  # noqa: E402
from cosup.integrations.milvus import MilvusIndex  # noqa: E402

D = 8
PASSAGES = list(tiny_passages(300).values())  # more than one request holds
NUMBERS = count()
SAME = {"fingerprint": "f" * 64, "pooling": "mean", "normalize": True, "batch_size": 37}


@pytest.fixture(scope="module")
def uri(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("milvus") / "corpus.db")


@pytest.fixture
def collection() -> str:
    return f"passages_{next(NUMBERS)}"


def vectors(seed: int = 0, rows: int = 300) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, rows + 1)[:, None]


def embed(batch: list[Passage]) -> Tensor:
    return vectors()[[int(passage.id[1:]) for passage in batch]]


def build(uri: str, collection: str, passages=PASSAGES, embed=embed, **options) -> MilvusIndex:
    return MilvusIndex.build(passages, embed, uri=uri, collection=collection, **SAME | options)


def restarted(uri: str) -> str:
    """The same file, its server ended: what it holds is read from the disk."""
    server_manager_instance.release_server(uri)
    return uri


@pytest.fixture(scope="module")
def stored(uri) -> str:
    return build(uri, "built").collection


@pytest.fixture
def built(uri, stored) -> MilvusIndex:
    """Connected anew: another test may have ended the server."""
    return MilvusIndex.connect(uri, stored, None)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("size", "queries", "k", "batch_size"), [(300, 200, 7, 290), (300, 3, 300, 64), (5, 0, 2, 1)])
def test_search_is_that_of_the_index_in_memory(uri, collection, normalize, size, queries, k, batch_size):
    passages, asked = PASSAGES[:size], vectors(1, queries)
    same = SAME | {"normalize": normalize, "batch_size": batch_size}
    index = build(uri, collection, passages, **same)
    wanted_scores, wanted = SequenceIndex.build(passages, embed, **same).search(asked, k)
    scores, found = index.search(asked, k)
    assert found == wanted and scores.shape == (queries, k) and scores.dtype == torch.float32
    x, w = asked, embed(passages)
    if normalize:
        x, w = (torch.nn.functional.normalize(t, dim=1) for t in (x, w))
    exact = (x.double() @ w.double().T).topk(k).values
    # a sum of D products in float32, in any order: off by less than D eps times the sum of their sizes
    bound = D * torch.finfo(torch.float32).eps * (x.abs().double() @ w.abs().double().T).amax(dim=1, keepdim=True)
    assert ((scores - exact).abs() <= bound).all() and ((wanted_scores - exact).abs() <= bound).all()


def test_the_vectors_index_is_exact(built):
    (name,) = built.client.list_indexes(built.collection, "vector")
    index = built.client.describe_index(built.collection, name)
    assert (index["index_type"], index["metric_type"]) == ("FLAT", "IP")


def test_a_search_sees_what_was_just_built(uri, collection):
    (row,) = build(uri, collection).search(vectors()[-1:], 1)[1]
    assert row == PASSAGES[-1:]


def test_passages_come_back_as_they_were(uri, collection):
    """Quotes, other scripts, no title, strings as long as they may be."""
    odd = ['"', "'", "\\", "a\nb", "{x}", "%", "日本", "🎩", " ", "x" * 65_535, "é" * 32_767]
    passages = [Passage(text, title, text) for text, title in zip(odd, ["", *odd], strict=False)]
    table = torch.eye(len(odd))
    row_of = {passage.id: row for row, passage in enumerate(passages)}
    index = build(uri, collection, iter(passages), lambda batch: table[[row_of[p.id] for p in batch]], batch_size=4)
    assert index.passages == passages and [row for (row,) in index.search(table)[1]] == passages
    assert MilvusIndex.connect(restarted(uri), collection, None).passages == passages


def test_an_index_comes_back(uri, collection):
    index = build(uri, collection, normalize=False)
    scores, found = index.search(vectors(3), 5)
    again = MilvusIndex.connect(restarted(uri), collection, "f" * 64)
    assert len(again) == len(index) == 300 and again.dim == index.dim == D and again.passages == PASSAGES
    for name in ("collection", "fingerprint", "pooling", "normalize"):
        assert getattr(again, name) == getattr(index, name)
    again_scores, again_found = again.search(vectors(3), 5)
    assert torch.equal(again_scores, scores) and again_found == found


def test_passages_stream_in_batches_and_in_order(uri, collection):
    sizes, given_ids, taken = [], [], 0

    def corpus():
        nonlocal taken
        for passage in PASSAGES[:40]:
            taken += 1
            yield passage

    def embed(batch: list[Passage]) -> Tensor:
        assert taken == len(given_ids) + len(batch), "passages are taken no earlier than they are embedded"
        assert not torch.is_grad_enabled()
        sizes.append(len(batch))
        given_ids.extend(p.id for p in batch)
        return torch.randn(len(batch), D).bfloat16()

    index = build(uri, collection, corpus(), embed, batch_size=16)
    assert sizes == [16, 16, 8] and index.passages == PASSAGES[:40]


def test_a_request_holds_what_milvus_takes(uri, collection, monkeypatch):
    """64 MB: at most as many rows as fit at the longest strings and the widest vectors."""
    longest, sizes = milvus._AT_ONCE * (3 * 65_535 + 4 * 32_768), []
    assert longest < 64e6
    for name, position in (("insert", 1), ("search", "data"), ("get", "ids")):
        whole = getattr(MilvusClient, name)

        def spied(self, *args, whole=whole, position=position, **options):
            sizes.append(len(args[position] if isinstance(position, int) else options[position]))
            return whole(self, *args, **options)

        monkeypatch.setattr(MilvusClient, name, spied)
    index = build(uri, collection, batch_size=300)
    assert sum(sizes) == 300 and max(sizes) <= milvus._AT_ONCE
    index.search(vectors(), 300)
    assert sum(sizes) == 900 and max(sizes) <= milvus._AT_ONCE


def pair() -> GenCtxModel:
    """A tiny pair, whose Gen asks for passages every now and then."""
    config = GenCtxConfig(max_length=400, max_passage_length=24)
    model = GenCtxModel(tiny_gen(), tiny_encoder(), tiny_tokenizer(), tiny_tokenizer(), config)
    with torch.no_grad():
        retrieve = control_ids(model.gen_tokenizer).retrieve
        model.gen.get_output_embeddings().weight[retrieve] = 0.5 * torch.randn(32)
    return model


def test_generation_and_evaluation_take_it(uri, collection):
    pytest.importorskip("bm25s")
    model, passages, instances = pair(), tiny_passages(24), tiny_instances(24)
    index = MilvusIndex.from_model(model.train(), passages.values(), uri=uri, collection=collection, batch_size=5)
    assert model.training
    model.eval()
    wanted = SequenceIndex.from_model(model, passages.values(), batch_size=5)
    assert index.passages == wanted.passages and index.fingerprint == model.fingerprint()
    prompts = [instance.input for instance in instances[:12]]
    answers, same = (model.generate(prompts, each, max_new_tokens=12) for each in (index, wanted))
    assert sum(len(answer.passages) for answer in same) > 3, "this test would show nothing"
    assert len({p.passage.id for answer in same for p in answer.passages}) > 1
    for ours, theirs in zip(answers, same, strict=True):
        assert (ours.text, ours.tokens, ours.finished_by) == (theirs.text, theirs.tokens, theirs.finished_by)
        assert [p.passage for p in ours.passages] == [p.passage for p in theirs.passages]
        scores = [[p.score for p in each.passages] for each in (ours, theirs)]  # of unit length: each off by D eps
        np.testing.assert_allclose(*scores, rtol=0, atol=2 * wanted.dim * torch.finfo(torch.float32).eps)
    report = evaluate(model, instances, index, answers=4, max_new_tokens=8)
    assert report == evaluate(model, instances, wanted, answers=4, max_new_tokens=8)


def test_a_collection_that_exists_is_left_as_it_is(uri, built):
    def never(batch):
        raise AssertionError("embedded")

    with pytest.raises(ValueError, match="collection: wanted a new one, got 'built', which exists"):
        build(uri, "built", embed=never)
    assert len(MilvusIndex.connect(uri, "built", None)) == 300


def failing(error: BaseException):
    def embed_some(batch: list[Passage]) -> Tensor:
        if batch[0].id != "p0":
            raise error
        return embed(batch)

    return embed_some


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("no memory")])
def test_a_build_that_fails_leaves_nothing(uri, collection, error):
    with pytest.raises(type(error)):
        build(uri, collection, embed=failing(error))
    assert not MilvusClient(uri).has_collection(collection)
    assert len(build(uri, collection)) == 300


def test_a_build_that_was_killed_is_no_index(uri, collection, monkeypatch):
    def gone(*args, **options):
        raise MilvusException(message="the server is gone")

    with monkeypatch.context() as patched:
        patched.setattr(MilvusClient, "drop_collection", gone)
        with pytest.raises(KeyboardInterrupt):  # not what came of taking the collection away
            build(uri, collection, embed=failing(KeyboardInterrupt()))
    with pytest.raises(ValueError, match=f"collection '{collection}': its build was not finished"):
        MilvusIndex.connect(uri, collection, "f" * 64)
    with pytest.raises(ValueError, match=f"wanted a new one, got '{collection}'"):
        build(uri, collection)


def test_an_index_of_another_model_is_refused(uri, built):
    with pytest.raises(ValueError, match="wanted an index of the model aaaaaaaaaaaa, got one of ffffffffffff"):
        MilvusIndex.connect(uri, "built", "a" * 64)


def manifest(text: str):
    return lambda client, name: client.alter_collection_properties(name, {"cosup": text})


def change(**fields):
    def changed(client: MilvusClient, collection: str) -> None:
        before = json.loads(client.describe_collection(collection)["properties"]["cosup"])
        manifest(json.dumps(before | fields))(client, collection)

    return changed


def add(client: MilvusClient, collection: str) -> None:
    client.insert(collection, [{"row": 40, "id": "new", "title": "", "text": "", "vector": [1.0] * D}])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda client, name: client.drop_collection(name), "collection: wanted one that exists, got '{}'"),
        (lambda client, name: client.drop_collection_properties(name, ["cosup"]), "'{}': wanted an index, got no "),
        (manifest("{"), "collection '{}': wanted an index, got no readable property 'cosup'"),
        (manifest("[]"), "collection '{}': wanted format_version 1, got None"),
        (change(format_version=2), "collection '{}': wanted format_version 1, got 2"),
        (change(normalize="yes"), "collection '{}': normalize: wanted bool, got 'yes'"),
        (lambda client, name: client.delete(name, ids=[3]), "collection '{}': wanted 40 passages, as built, got 39"),
        (add, "collection '{}': wanted 40 passages, as built, got 41"),
    ],
)
def test_what_is_no_whole_index_is_refused(uri, collection, damage, message):
    damage(build(uri, collection, PASSAGES[:40]).client, collection)
    with pytest.raises(ValueError, match=message.format(collection)):
        MilvusIndex.connect(uri, collection, None)


def test_passages_taken_away_since(uri, collection):
    index = build(uri, collection, PASSAGES[:40])
    index.client.delete(collection, ids=[3])
    for read in (lambda: index.search(vectors(1, 2), 40), lambda: index.passages):
        with pytest.raises(ValueError, match=f"collection '{collection}': wanted 40 passages, as built, got fewer"):
            read()


def with_nan(row: int, rows: int = 300) -> Tensor:
    table = vectors(rows=rows)
    table[row, 3] = torch.nan
    return table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passages": []}, "passages: wanted at least one, got none"),
        ({"passages": [*PASSAGES, PASSAGES[5]]}, "passages: id 'p5' comes twice"),
        ({"embed": lambda batch: with_nan(270)[[int(p.id[1:]) for p in batch]]}, "the vector of passage 'p270' is not"),
        ({"embed": lambda batch: embed(batch).long()}, r"embed: wanted a float tensor \[rows, D\], got torch.int64"),
        ({"embed": lambda batch: embed(batch)[:1]}, "embed: wanted 37 vectors for 37 passages, got 1"),
        ({"embed": lambda batch: torch.ones(len(batch), len(batch))}, "embed: wanted vectors of 37, as before, got 4"),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
    ],
)
def test_bad_corpora(uri, collection, options, message):
    with pytest.raises(ValueError, match=message):
        build(uri, collection, **options)
    with pytest.raises(ValueError, match=message):
        options = SAME | {"passages": PASSAGES, "embed": embed} | options
        SequenceIndex.build(options.pop("passages"), options.pop("embed"), **options)
    assert not MilvusClient(uri).has_collection(collection)


@pytest.mark.parametrize("name", ["id", "title", "text"])
def test_strings_too_long_are_named_before_anything_is_written(uri, collection, name):
    strings = {"id": "long", "title": "", "text": "A hat."} | {name: "é" * 32_768}  # 65,536 bytes
    passages, model = [*PASSAGES, Passage(**strings)], pair()
    whose = f"in the {name} of '{strings['id'][:99]}'"
    with pytest.raises(ValueError, match=f"passages: wanted at most 65535 bytes in UTF-8, got 65536 {whose}"):
        build(uri, collection, passages)
    model.embed_passages = lambda *args, **options: pytest.fail("embedded")
    with pytest.raises(ValueError, match=whose):
        MilvusIndex.from_model(model, passages, uri=uri, collection=collection)
    assert not MilvusClient(uri).has_collection(collection)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (vectors(), 301, "k: wanted 1 to 300, the size of the corpus, got 301"),
        (vectors(), 0, "k: wanted 1 to 300"),
        (vectors(), 251, "k: wanted at most 250, as Milvus does, got 251"),
        (vectors()[:, :5], 1, r"queries: wanted \[Q, 8\], got \[300, 5\]"),
        (vectors()[0], 1, r"queries: wanted a float tensor \[rows, D\], got torch.float32 \[8\]"),
        (with_nan(0), 1, "queries: wanted finite"),
    ],
)
def test_bad_queries(uri, built, queries, k, message, monkeypatch):
    monkeypatch.setattr(milvus, "_DEEPEST", 250)
    with pytest.raises(ValueError, match=message):
        MilvusIndex.connect(uri, "built", None).search(queries, k)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("name", ["", "a-b", "1st", "été", "a b", "a" * 256, "a\n"])
def test_bad_names(uri, name):
    for make in (lambda: build(uri, name), lambda: MilvusIndex.connect(uri, name, None)):
        with pytest.raises(ValueError, match="collection: wanted at most 255 letters, digits and underscores"):
            make()


@pytest.mark.parametrize("place", ["http://127.0.0.1:1", "ftp://host", "nowhere/corpus.db", "folder"])
def test_no_milvus_there(place):
    with pytest.raises(ValueError, match=r"uri: wanted a Milvus server or a local file \*.db, got no answer: .+"):
        build(place, "passages")
    with pytest.raises(ValueError, match="uri: wanted a "):
        MilvusIndex.connect(place, "passages", None)


def test_connecting_makes_no_file(tmp_path):
    with pytest.raises(ValueError, match="uri: wanted a local file that exists, got .*corpus.db"):
        MilvusIndex.connect(str(tmp_path / "corpus.db"), "passages", None)
    assert os.listdir(tmp_path) == []


def test_the_token_reaches_the_server(monkeypatch):
    class Reached(Exception):
        pass

    def client(uri, token):
        raise Reached(uri, token)

    monkeypatch.setattr(milvus, "MilvusClient", client)
    place = {"uri": "http://host:19530", "collection": "passages"}
    for token, sent in (("user:secret", "user:secret"), (None, "")):
        for make in (
            lambda token: MilvusIndex.build(PASSAGES, embed, **SAME, **place, token=token),
            lambda token: MilvusIndex.from_model(pair(), PASSAGES, **place, token=token),
            lambda token: MilvusIndex.connect(**place, fingerprint=None, token=token),
        ):
            with pytest.raises(Reached) as reached:
                make(token)
            assert reached.value.args == ("http://host:19530", sent)


def run(*arguments) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception:
        raise result.exception
    return result.output


def test_the_command_takes_a_collection_for_a_folder(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "passages.jsonl", tiny_passages(24).values())
    pair().save_pretrained(tmp_path / "pair")
    place, files = tmp_path / "corpus.db/passages", (tmp_path / "pair", tmp_path / "passages.jsonl")
    ask = ("What is it?", "Which is number 3?", "--max-new-tokens", 12, "--json")
    assert "24 passages in" in run("index", *files, place, "--batch-size", 5)
    run("index", *files, tmp_path / "folder", "--batch-size", 5)
    ours, theirs = (
        [json.loads(line) for line in run("generate", files[0], index, *ask).splitlines()]
        for index in (place, tmp_path / "folder")
    )
    assert any(answer["passages"] for answer in theirs)
    for answer in (*ours, *theirs):
        for passage in answer["passages"]:
            passage["score"] = round(passage["score"], 3)
    assert ours == theirs
    with pytest.raises(ValueError, match="wanted a new one, got 'passages', which exists"):
        run("index", *files, place)
    with pytest.raises(ValueError, match="--factory: wanted an index in a folder, got .*corpus.db/passages"):
        run("index", *files, place, "--factory", "HNSW8")


def test_the_command_says_where_an_index_is(monkeypatch):
    monkeypatch.delenv("MILVUS_TOKEN", raising=False)
    for place in ("pair-index", "out/pair-index", "data/corpus.dbx/a"):
        assert cli._milvus(place) is None
    for place, uri in (("http://host:19530/a", "http://host:19530"), ("https://host/db/a", "https://host/db"),
                       ("/data/corpus.db/a", "/data/corpus.db"), ("corpus.db/a", "corpus.db")):  # fmt: skip
        assert cli._milvus(place) == (MilvusIndex, {"uri": uri, "collection": "a", "token": None})
    monkeypatch.setitem(os.environ, "MILVUS_TOKEN", "user:secret")
    assert cli._milvus("corpus.db/a")[1]["token"] == "user:secret"
    for place in ("http://host:19530", "corpus.db"):
        with pytest.raises(ValueError, match=f"index: wanted URI/COLLECTION, got {place} without a collection"):
            cli._milvus(place)
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    monkeypatch.delitem(sys.modules, "cosup.integrations.milvus")
    with pytest.raises(RuntimeError, match="in Milvus needs pip install"):
        cli._milvus("corpus.db/a")
