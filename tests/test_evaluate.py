"""Evaluation: each figure against its definition, written out the slow way."""

import json

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from cosup.data.schema import Instance, Passage, Reference
from cosup.evaluate import _recall, evaluate, is_correct, query_vectors, render, save_picture
from cosup.generate import Generation, RetrievedPassage
from cosup.index import SequenceIndex
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.tokens import control_ids, encode, passage_text, prompt_ids
from tiny import tiny_encoder, tiny_gen, tiny_instances, tiny_passages, tiny_tokenizer

PASSAGES, INSTANCES = tiny_passages(24), tiny_instances(24)


@pytest.fixture(scope="module")
def model():
    config = GenCtxConfig(max_length=400, max_passage_length=24)
    return GenCtxModel(tiny_gen(), tiny_encoder(), tiny_tokenizer(), tiny_tokenizer(), config).eval()


@pytest.fixture(scope="module")
def index(model):
    return SequenceIndex.from_model(model, PASSAGES.values())


def hidden_of(model, ids):
    return model.gen(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]


@torch.no_grad()
def test_query_is_the_state_at_the_first_retrieval_token(model):
    retrieve = control_ids(model.gen_tokenizer).retrieve
    queries = query_vectors(model, INSTANCES, batch_size=5)
    for instance, query in zip(INSTANCES, queries, strict=True):
        before = next((i for i, part in enumerate(instance.output) if isinstance(part, Reference)), 0)
        written = [token for text in instance.output[:before] for token in encode(model.gen_tokenizer, text)]
        ids = [*prompt_ids(model.gen_tokenizer, instance.input), *written, retrieve]
        torch.testing.assert_close(query, hidden_of(model, ids)[-1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ntp_loss_is_the_mean_over_targets(model, index):
    control = control_ids(model.gen_tokenizer)
    nats, nats_with = [], []
    for instance in INSTANCES:
        ids, written, passage = prompt_ids(model.gen_tokenizer, instance.input), [], []
        for part in instance.output:
            new = encode(model.gen_tokenizer, part) if isinstance(part, str) else [control.retrieve]
            written += range(len(ids), len(ids) + len(new))
            ids += new
            if isinstance(part, Reference):
                source = PASSAGES[part.passage]
                new = encode(model.gen_tokenizer, passage_text(source.title, source.text))[:24] + [control.ground]
                passage += range(len(ids), len(ids) + len(new))
                ids += new
                new = [*encode(model.gen_tokenizer, part.grounded), control.end]
                written += range(len(ids), len(ids) + len(new))
                ids += new
        written.append(len(ids))
        ids.append(control.eos)
        nll = F.cross_entropy(model.gen(torch.tensor([ids])).logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        nats += [nll[t - 1] for t in written]
        nats_with += [nll[t - 1] for t in written + passage]
    ntp = evaluate(model, INSTANCES, index, batch_size=7, bm25=False)["ntp"]
    assert (ntp["targets"], ntp["targets_with_passages"], ntp["lost"]) == (len(nats), len(nats_with), 0)
    assert ntp["loss"] == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)
    assert ntp["loss_with_passages"] == pytest.approx(torch.stack(nats_with).mean().item(), rel=1e-5)


def test_targets_cut_off_are_counted(model, index):
    model.config.max_length = 40
    try:
        with pytest.warns(UserWarning, match="cut to max_length 40"):
            ntp = evaluate(model, INSTANCES, index, bm25=False)["ntp"]
    finally:
        model.config.max_length = 400
    whole = evaluate(model, INSTANCES, index, bm25=False)["ntp"]
    assert 0 < ntp["lost"] == whole["targets"] - ntp["targets"]


def test_recall_and_mrr_take_the_first_gold_passage():
    a, b, c, d = (Passage(id, "", "text") for id in "abcd")
    instances = [Instance("1", "", (), ("a",)), Instance("2", "", (), ("b", "c")), Instance("3", "", (), ("d",))]
    scores = _recall(instances, [[a, b, c], [a, c, b], [a, b, c]])
    assert scores == {"queries": 3, "R@1": 1 / 3, "MRR@3": pytest.approx((1 + 1 / 2 + 0) / 3)}
    assert _recall(instances, [[d] * 8 + [a, b]] * 3)["R@10"] == 1
    assert _recall(instances[:1], [[d] * 10 + [a]])["R@10"] == 0


def test_retrieval_ranks_the_whole_corpus(model, index):
    """Gen's ranks from an index of its own query vectors are perfect; BM25's follow the words of the input."""
    pytest.importorskip("bm25s")
    asked = [i for i in INSTANCES if i.passages]
    vectors = dict(zip((i.passages[0] for i in asked), query_vectors(model, asked), strict=True))
    dim = len(next(iter(vectors.values())))
    perfect = SequenceIndex.build(
        PASSAGES.values(),
        lambda batch: torch.stack([vectors.get(p.id, torch.ones(dim)) for p in batch]),
        fingerprint=model.fingerprint(),
        pooling="mean",
        normalize=True,
    )
    named = [Instance(p.id, f"Where is the {p.text}", (), (p.id,)) for p in PASSAGES.values()]
    assert evaluate(model, asked, perfect, bm25=False)["retrieval"]["Gen"]["R@1"] == 1
    report = evaluate(model, named, index)
    assert report["retrieval"]["BM25"]["R@1"] == 1
    assert report["retrieval"]["Gen"]["queries"] == report["passages"] == 24
    assert list(report["retrieval"]["Gen"]) == ["queries", "R@1", "R@10", "MRR@24"]  # no R@100 of 24 passages


def test_answers_are_counted_apart_for_hits_and_misses(model, index, monkeypatch):
    answered = [i for i in INSTANCES if i.answers]
    assert len(answered) > 4

    def generate(prompts, index, max_new_tokens):
        rows = [answered[[i.input for i in answered].index(prompt)] for prompt in prompts]
        for i, instance in enumerate(rows):  # even rows fetch a gold passage where there is one, every third is wrong
            fetched = PASSAGES[instance.passages[0]] if instance.passages and not i % 2 else PASSAGES["p2"]
            text = "none" if i % 3 == 2 else f"It is: {instance.answers[0]}!"
            yield Generation(text, [RetrievedPassage(fetched, 1.0, 0, 0)], [], "eos")

    monkeypatch.setattr(model, "generate", generate, raising=False)
    parts = evaluate(model, INSTANCES, index, bm25=False, answers=6)["answers"]
    hits = [i for i in range(6) if answered[i].passages and not i % 2]
    correct = [i for i in range(6) if i % 3 != 2]
    assert parts["all"] == {"count": 6, "correct": 4, "share": 4 / 6}
    both = [i for i in hits if i in correct]
    assert (parts["hit"]["count"], parts["hit"]["correct"]) == (len(hits), len(both))
    assert (parts["missed"]["count"], parts["missed"]["correct"]) == (6 - len(hits), 4 - len(both))


def test_correctness_is_word_for_word():
    assert is_correct("It was the Château-d'Eau, then.", ["chateau d eau"])
    assert is_correct("A hat.", ["gloves", "The Hat"])
    assert not is_correct("that hatter", ["hat"])
    assert not is_correct("anything", ["the", "!"])  # nothing is left of them
    assert not is_correct("", ["hat", "!"])


def test_report_is_json_and_is_shown(model, index, tmp_path):
    pytest.importorskip("bm25s")
    model.train()
    report = evaluate(model, INSTANCES, index, answers=3, max_new_tokens=6)
    assert model.training, "the mode is given back"
    model.eval()
    assert json.loads(json.dumps(report)) == report
    report["retrieval"]["Gen, untrained"] = {**report["retrieval"]["Gen"], "R@1": 0.125}
    console = Console(width=100, record=True)
    console.print(render(report))
    shown = console.export_text()
    for word in ("Gen, untrained", "BM25", "0.125", "missed", f"{report['ntp']['loss']:.3f}"):
        assert word in shown
    save_picture(report, tmp_path / "retrieval.png")
    assert (tmp_path / "retrieval.png").read_bytes().startswith(b"\x89PNG")


def test_without_gold_passages_there_is_no_retrieval(model, index, tmp_path):
    report = evaluate(model, [Instance("1", "Hello?", ("Hello.",))], index)
    assert report["retrieval"] == {} and report["ntp"]["targets"] == report["ntp"]["targets_with_passages"]
    render(report)
    with pytest.raises(ValueError, match="report: wanted a report with retrieval"):
        save_picture(report, tmp_path / "retrieval.png")


def test_bad_input(model, index):
    with pytest.raises(ValueError, match="instances: wanted at least one"):
        evaluate(model, [], index)
    with pytest.raises(ValueError, match="batch_size: wanted at least 1, got 0"):
        evaluate(model, INSTANCES, index, batch_size=0)
    with pytest.raises(ValueError, match="index: wanted the passages of 'x', got none with the id 'p99'"):
        evaluate(model, [Instance("x", "Who?", (), ("p99",))], index)
