"""InfoNCELoss for sentence-transformers: value and gradients of the library's own losses, on a tiny random model."""

import builtins
import copy
import functools
import itertools

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tiny import tiny_encoder, tiny_folder, tiny_passages, tiny_tokenizer

pytest.importorskip("sentence_transformers")
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    util,
)
from sentence_transformers.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer

from cosup.integrations.sentence_transformers import InfoNCELoss

B = 7
SYMMETRIC = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}
OPTIONS = {
    "defaults": {},
    "scale 1": {"scale": 1.0},
    "scale 100": {"scale": 100.0},
    "dot": {"scale": 0.1, "similarity_fct": util.dot_score},
    "symmetric": SYMMETRIC,
    "symmetric, dot": SYMMETRIC | {"scale": 0.1, "similarity_fct": util.dot_score},
    "one direction of its own": {"partition_mode": "per_direction"},
    "queries among themselves": {"directions": ("query_to_doc", "query_to_query")},
}
OF_PAIRS = {
    "documents among themselves": {"directions": ("query_to_doc", "doc_to_doc")},
    "both": {"directions": ("query_to_doc", "query_to_query", "doc_to_doc"), "scale": 3.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("encoder"))


def model_folder(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "</s>"
    return str(tiny_folder(folder, tiny_encoder(), tokenizer))


def model_from(folder, *, dropout=False, prompts=None, include_prompt=True):
    """A fresh Bert of random weights under the mean of its states, in training mode."""
    modules = [Transformer(folder), Pooling(24, include_prompt=include_prompt)]
    model = SentenceTransformer(modules=modules, device="cpu", prompts=prompts).train()
    for name, module in model.named_modules():
        if name.endswith("pooler"):
            module.requires_grad_(False)  # it has no part
        if isinstance(module, nn.Dropout) and not dropout:
            module.p = 0.0
    return model


def texts(columns, n=B):
    """Different texts of different lengths, in columns of different widths."""
    passages = list(tiny_passages(columns * n).values())
    anchors = [f"{p.title}?" for p in passages[:n]]
    return [anchors, *([" ".join([p.text] * (1 + i % column)) for i, p in enumerate(passages[column * n :][:n])]
                       for column in range(1, columns))]  # fmt: skip


def features(model, columns):
    return [model.preprocess(column) for column in columns]


def result(loss, columns, seed=0):
    """The loss and the gradient of all parameters in one, dropping out by the seed."""
    torch.manual_seed(seed)
    value = loss(features(loss.model, columns), None)
    loss.model.zero_grad()
    value.backward()
    return value.detach(), torch.cat([p.grad.flatten() for p in loss.model.parameters() if p.requires_grad])


def equal_up_to_rounding(ours, theirs, truth):
    """Our error against float64 is at most twice theirs, and what rounding an output costs (two ulps for a scalar)."""
    assert truth[1].norm() > 1e-3
    for o, t, exact in zip(ours, theirs, truth, strict=True):
        assert o.dtype == t.dtype == torch.float32
        rounding = (1 if exact.ndim else 2) * torch.finfo(torch.float32).eps * exact.norm()
        assert (o - exact).norm() <= 2 * ((t - exact).norm() + rounding)


def compared(folder, columns, ours, theirs):
    """Losses made by ``ours`` and ``theirs`` of a model, on the same weights; the truth is theirs in float64."""
    model = model_from(folder)
    exact = copy.deepcopy(model).double()
    equal_up_to_rounding(result(ours(model), columns), result(theirs(model), columns), result(theirs(exact), columns))


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_theirs(options, columns, folder):
    options = OPTIONS[options]
    compared(folder, texts(columns), functools.partial(InfoNCELoss, **options),
             functools.partial(MultipleNegativesRankingLoss, **options))  # fmt: skip


@pytest.mark.parametrize("options", OF_PAIRS)
def test_equals_theirs_of_pairs(options, folder):
    options = OF_PAIRS[options]
    compared(folder, texts(2), functools.partial(InfoNCELoss, **options),
             functools.partial(MultipleNegativesRankingLoss, **options))  # fmt: skip


@pytest.mark.parametrize("mini_batch_size", [3, 100])
@pytest.mark.parametrize("uncached", [False, True])
def test_cached_equals_theirs_and_the_uncached(uncached, mini_batch_size, folder):
    cached = functools.partial(InfoNCELoss, **SYMMETRIC, mini_batch_size=mini_batch_size)
    theirs = functools.partial(CachedMultipleNegativesRankingLoss, mini_batch_size=mini_batch_size)
    theirs = functools.partial(MultipleNegativesRankingLoss if uncached else theirs, **SYMMETRIC)
    compared(folder, texts(3), cached, theirs)


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_drops_out_what_theirs_drops(mini_batch_size, folder):
    """The same draws, so that runs of one seed can be compared; cached, in both passes."""
    model = model_from(folder, dropout=True)
    theirs = (
        MultipleNegativesRankingLoss(model)
        if mini_batch_size is None
        else CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)
    )
    ours, columns = InfoNCELoss(model, mini_batch_size=mini_batch_size), texts(3)
    torch.testing.assert_close(result(ours, columns), result(theirs, columns))
    assert result(ours, columns, seed=1)[0] != result(ours, columns)[0]


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_in_their_matryoshka(mini_batch_size, folder):
    dims, weights = [24, 8, 3], [1.0, 0.5, 0.25]
    compared(folder, texts(3),
             lambda model: MatryoshkaLoss(model, InfoNCELoss(model, mini_batch_size=mini_batch_size), dims, weights),
             lambda model: MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), dims, weights))  # fmt: skip


def test_from_embeddings():
    vectors = [torch.randn(B, 5, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    results = []
    for loss in (InfoNCELoss, MultipleNegativesRankingLoss):
        value = loss(nn.Identity()).compute_loss_from_embeddings(vectors, torch.zeros(B))
        results.append((value, *torch.autograd.grad(value, vectors)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_duplicates_are_masked(mini_batch_size, padding_side, folder):
    """In a column, across columns of other widths, and a negative that is the query's own positive; no mere prefix."""
    columns = texts(3)
    columns[1][3], columns[2][4], columns[2][2] = columns[1][0], columns[1][1], columns[1][2]
    columns[2][5] = columns[1][5].split(".")[0]
    model = model_from(folder)
    model.tokenizer.padding_side = padding_side
    assert len({column["input_ids"].shape for column in features(model, columns)}) == 3

    def formula(model):
        def loss(columns_of_features, labels):
            query, *others = (F.normalize(model(column)["sentence_embedding"]) for column in columns_of_features)
            words = columns[1] + columns[2]
            out = torch.tensor([[m != n and words[m] == words[n] for m in range(2 * B)] for n in range(B)])
            assert out.nonzero().tolist() == [[0, 3], [1, B + 4], [2, B + 2], [3, 0]]
            return F.cross_entropy((20 * query @ torch.cat(others).mT).masked_fill(out, -torch.inf), torch.arange(B))

        loss.model = model
        return loss

    exact = copy.deepcopy(model).double()
    ours = InfoNCELoss(model, mini_batch_size=mini_batch_size, mask_duplicates=True)
    equal_up_to_rounding(result(ours, columns), result(formula(model), columns), result(formula(exact), columns))


def in_processes(rank, world, *, folder):
    """Each has texts of its own, not equally many, under the trainer's wrapper: as one process with them all."""
    real = hash
    builtins.hash = lambda value: real((rank, value))  # processes that are no forks of one have secrets of their own
    sizes = [5, 3]
    masked = {"mask_duplicates": True}
    for options, mini_batch_size in itertools.product(({}, SYMMETRIC, OF_PAIRS["both"], masked), (None, 2)):
        columns = texts(2 if "doc_to_doc" in options.get("directions", ()) else 3, sum(sizes))
        columns[1][6] = columns[1][0]  # of two processes
        model = model_from(folder).double()
        alone = InfoNCELoss if options is masked else MultipleNegativesRankingLoss
        want = result(alone(model, **options), columns)
        model.zero_grad()
        loss = InfoNCELoss(model, gather_across_devices=True, mini_batch_size=mini_batch_size, **options)
        # else it writes buffers between a step's calls, which BERT of transformers 5.17 saves for its backward pass
        loss.model = DistributedDataParallel(model, broadcast_buffers=False)
        own = [column[sum(sizes[:rank]) :][: sizes[rank]] for column in columns]
        value = loss(features(model, own), None)
        value.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        torch.testing.assert_close((value.detach(), grads), want)


def test_gathered_equals_one_process(folder):
    ranks.run(functools.partial(in_processes, folder=folder), 2)


def test_gathering_alone_changes_nothing(folder):
    model, columns = model_from(folder), texts(2)
    results = [result(InfoNCELoss(model, gather_across_devices=gather), columns) for gather in (False, True)]
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_trains_as_theirs(folder, tmp_path):
    """By their trainer, prompts not pooled, gradients accumulated: the losses and the weights of each run."""
    Dataset = pytest.importorskip("datasets").Dataset
    data = Dataset.from_dict(dict(zip(("anchor", "positive", "negative"), texts(3, 24), strict=True)))
    runs = {}
    for name, make, dtype in (
        ("ours", InfoNCELoss, torch.float32),
        ("ours, cached", functools.partial(InfoNCELoss, mini_batch_size=3), torch.float32),
        ("theirs", MultipleNegativesRankingLoss, torch.float32),
        ("truth", MultipleNegativesRankingLoss, torch.float64),
    ):
        model = model_from(folder, include_prompt=False).to(dtype)
        args = SentenceTransformerTrainingArguments(
            str(tmp_path), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4, optim="sgd",
            learning_rate=0.1, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
            prompts={"anchor": "query: ", "positive": "passage: ", "negative": "passage: "})  # fmt: skip
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        trainer = SentenceTransformerTrainer(model, args, train_dataset=data, eval_dataset=data, loss=make(model))
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        losses.append(trainer.evaluate()["eval_loss"])
        moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        runs[name] = torch.tensor(losses, dtype=dtype), moved
    for ours in ("ours", "ours, cached"):
        equal_up_to_rounding(runs[ours], runs["theirs"], runs["truth"])


def test_config_round_trip(folder):
    options = SYMMETRIC | {"scale": 7.0, "similarity_fct": util.dot_score, "gather_across_devices": True,
                           "mini_batch_size": 3, "mask_duplicates": True}  # fmt: skip
    model = model_from(folder)
    config = InfoNCELoss(model, **options).get_config_dict()
    assert config == options | {"similarity_fct": "dot_score"}
    again = InfoNCELoss(model, **config | {"similarity_fct": getattr(util, config["similarity_fct"])})
    assert again.get_config_dict() == config and again.temperature == 1 / 7
    assert InfoNCELoss(model).get_config_dict().items() <= (
        MultipleNegativesRankingLoss(model).get_config_dict() | {"mini_batch_size": None, "mask_duplicates": False}
    ).items()
    assert again.citation == MultipleNegativesRankingLoss(model, **SYMMETRIC).citation


@pytest.mark.parametrize("options, message", [
    ({"scale": 0.0}, "scale must be a number, positive and finite, got 0.0"),
    ({"scale": float("nan")}, "scale must be a number, positive and finite, got nan"),
    ({"scale": "20"}, "scale must be a number, positive and finite, got '20'"),
    ({"similarity_fct": util.euclidean_sim}, "similarity_fct must be cos_sim or dot_score, got <function euclid"),
    ({"directions": ("query_to_doc", "doc_to_query")}, 'directions must be "query_to_doc" and none or more of'),
    ({"directions": ("doc_to_doc",)}, 'directions must be "query_to_doc" and'),
    ({"directions": ("query_to_doc", "query_to_query"), "partition_mode": "per_direction"}, "in partition_mode 'per_"),
    ({"partition_mode": "both"}, r"partition_mode must be one of \['joint', 'per_direction'\], got 'both'"),
    ({"hardness_mode": "all_negatives"}, "hardness_mode must be None, got 'all_negatives'"),
    ({"mini_batch_num_tokens": 0}, "mini_batch_num_tokens must be None or an integer of at least 1, got 0"),
    ({"scale": True}, "scale must be a number, positive and finite, got True"),
    ({"mask_duplicates": "text"}, "mask_duplicates must be True or False, got 'text'"),
    ({"gather_across_devices": None}, "gather_across_devices must be True or False, got None"),
    ({"mini_batch_size": 0}, "mini_batch_size must be None or an integer of at least 1, got 0"),
    ({"mini_batch_size": True}, "mini_batch_size must be None or an integer of at least 1, got True"),
    ({"mini_batch_size": 2.5}, "mini_batch_size must be None or an integer of at least 1, got 2.5"),
])  # fmt: skip
def test_bad_options_are_refused(options, message, folder):
    """At construction, and where they are assigned since."""
    model = model_from(folder)
    if not {"hardness_mode", "mini_batch_num_tokens"} & {*options}:  # which are no arguments
        with pytest.raises(ValueError, match=message):
            InfoNCELoss(model, **options)
    loss = InfoNCELoss(model)
    for name, value in options.items():
        setattr(loss, name, value)
    with pytest.raises(ValueError, match=message):
        loss(features(model, texts(2)))
    with pytest.raises(ValueError, match=message):
        loss.compute_loss_from_embeddings([torch.randn(3, 4), torch.randn(3, 4)])


def test_options_by_place(folder):
    """As of the library's cached loss; what its other loss has there is refused."""
    theirs, ours = (Loss(model_from(folder), 20.0, util.cos_sim, 64)
                    for Loss in (CachedMultipleNegativesRankingLoss, InfoNCELoss))  # fmt: skip
    assert ours.mini_batch_size == theirs.mini_batch_size == 64 and not ours.gather_across_devices
    with pytest.raises(ValueError, match="mini_batch_size must be None or an integer of at least 1, got True"):
        InfoNCELoss(model_from(folder), 20.0, util.cos_sim, True)
    with pytest.raises(TypeError, match="positional arguments"):
        InfoNCELoss(model_from(folder), 20.0, util.cos_sim, 64, None)


@pytest.mark.parametrize("options", [
    {"scale": 1.5}, {"similarity_fct": util.dot_score, "scale": 0.1}, SYMMETRIC, {"mini_batch_size": 3},
    {"mini_batch_num_tokens": 30}, {"mask_duplicates": True},
], ids=lambda options: next(iter(options)))  # fmt: skip
def test_options_assigned_later_count(options, folder):
    model, columns = model_from(folder), texts(3)
    columns[2][0] = columns[1][0]
    later = InfoNCELoss(model)
    for name, value in options.items():
        setattr(later, name, value)
    assert later.uses_gradient_cache == ("mini_batch" in str(options))
    given = {name: value for name, value in options.items() if name != "mini_batch_num_tokens"}
    torch.testing.assert_close(result(later, columns), result(InfoNCELoss(model, **given), columns))
    change = (result(later, columns)[0] - result(InfoNCELoss(model), columns)[0]).abs()
    assert (change > 1e-4) == ("mini_batch" not in str(options))


def test_columns_that_a_model_has_written_into(folder):
    """As a loss around this one gives them again."""
    model = model_from(folder)
    loss, columns = InfoNCELoss(model, mask_duplicates=True), features(model, texts(3))
    wanted = loss([{**column} for column in columns])
    written = [model(column) for column in columns]
    assert all(column["token_embeddings"].shape[:2] == column["input_ids"].shape for column in written)
    torch.testing.assert_close(loss(written), wanted)


def test_bad_columns_are_refused(folder):
    model = model_from(folder)
    for columns, options, message in (
        (1, {}, "got columns: 1"),
        (1, {"mini_batch_size": 2}, "got columns: 1"),
        (3, OF_PAIRS["both"], r"wants \(anchor, positive\) pairs, got columns: 3"),
    ):
        with pytest.raises(ValueError, match=message):
            InfoNCELoss(model, **options)(features(model, texts(columns)), None)
    pictures = [column | {"pixel_values": torch.zeros(B, 3, 4, 4)} for column in features(model, texts(2))]
    with pytest.raises(ValueError, match=r"mask_duplicates wants .* texts alone, got .*'pixel_values': \[7, 3, 4, 4\]"):
        InfoNCELoss(model, mask_duplicates=True)(pictures)


def test_static_embeddings():
    """Their texts are one row of tokens: compared as they come, but neither cached nor told apart."""
    model = SentenceTransformer(modules=[StaticEmbedding(tiny_tokenizer(), embedding_dim=8)], device="cpu")
    columns = texts(3)
    torch.testing.assert_close(*(result(loss(model), columns) for loss in (InfoNCELoss, MultipleNegativesRankingLoss)))
    with pytest.raises(ValueError, match="mini_batch_size must be None for a model of StaticEmbedding"):
        InfoNCELoss(model, mini_batch_size=2)
    with pytest.raises(ValueError, match=r"mask_duplicates wants input_ids and attention_mask \[B, T\]"):
        InfoNCELoss(model, mask_duplicates=True)(features(model, columns))
