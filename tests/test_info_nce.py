"""info_nce's features against float64, and against the losses that people come from."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cosup import info_nce, nn, ops
from cosup.bench import peers
from cosup.gemm import dots
from cosup.plan import plan, used
from cosup.walk import cost, resolve
from oracles import DTYPES, D, M, N, bytes_for_pool, check, contrastive, pool

pytestmark = pytest.mark.usefixtures("narrow_slabs")

GENERATOR = torch.Generator().manual_seed(0)
FEATURES = {
    "plain": {},
    "symmetric": {"symmetric": True},
    "ids": {"candidate_ids": torch.randint(40, (M,), generator=GENERATOR)},
    "candidate bias": {"candidate_bias": torch.randn(M, generator=GENERATOR)},
    "sample weight": {"sample_weight": torch.rand(N, generator=GENERATOR)},
    "margin": {"margin": 0.2},
    "false negatives": {"false_negative_margin": 0.1},
    "label smoothing": {"label_smoothing": 0.2},
    "hard negatives": {"hard_negatives": torch.randn(N, 3, D, generator=GENERATOR)},
}
FEATURES["query negatives"] = {"query_negatives": True}
FEATURES["candidate negatives, ids"] = FEATURES["ids"] | {"candidate_negatives": True}
FEATURES["all negatives"] = FEATURES["hard negatives"] | {"query_negatives": True, "candidate_negatives": True}
FEATURES["symmetric, ids"] = FEATURES["symmetric"] | FEATURES["ids"]
FEATURES["symmetric, weight, smoothing"] = FEATURES["symmetric"] | FEATURES["sample weight"] | FEATURES["label smoothing"]
FEATURES["smoothing, ids"] = FEATURES["label smoothing"] | FEATURES["ids"]
LEFT = ("false_negative_margin", "candidate_negatives")
FEATURES["all"] = {k: v for options in FEATURES.values() for k, v in options.items() if k not in LEFT}
FEATURES["all, false negatives"] = FEATURES["all"] | {"false_negative_margin": 0.1, "label_smoothing": 0.0}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["one block", "row blocks", "slabs"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("feature", FEATURES)
def test_error_of_every_feature(feature, reduction, strategy, dtype, device):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in FEATURES[feature].items()}
    query, candidates, target = pool(dtype, device)
    inputs = [query, candidates]
    names = [name for name in ("candidate_bias", "hard_negatives") if name in options]
    inputs += [options.pop(name).to(dtype) for name in names]
    budget = bytes_for_pool(strategy, query, options.get("symmetric", False))

    def run(loss, query, candidates, *others, **more):
        given = dict(zip(names, others, strict=True))
        return loss(query, candidates, target=target, temperature=0.3, reduction=reduction, **options, **given, **more)

    check(lambda *t: run(info_nce, *t, workspace_bytes=budget), lambda *t: run(contrastive, *t), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["one slab", "slabs"])
@pytest.mark.parametrize("ids", [None, torch.randint(40, (M,), generator=GENERATOR)], ids=["", "ids"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_of_triangles(reduction, ids, strategy, dtype, device):
    """As many candidates as queries: both kinds of negatives are of a square, of which one half is visited."""
    query, candidates = (torch.randn(M, D, device=device).to(dtype) for _ in range(2))
    candidates[: M // 2] += query[: M // 2]
    options = {"query_negatives": True, "candidate_negatives": True, "temperature": 0.3, "reduction": reduction,
               "candidate_ids": None if ids is None else ids.to(device)}  # fmt: skip
    target = torch.arange(M, device=device)
    c = cost(query, resolve("auto", query), gathered=False, symmetric=True)
    c = c._replace(strip=c.strip and 16)
    budget = 1 << 28 if strategy == "one slab" else used(M, M, 16, 48, c, True) + 64 * c.tile
    p = plan(M, M, c, grads=True, weights_known=False, workspace_bytes=budget)
    assert (p.block_cols < M) == (strategy == "slabs")
    check(lambda q, c: info_nce(q, c, workspace_bytes=budget, **options),
          lambda q, c: contrastive(q, c, target=target, **options), (query, candidates))  # fmt: skip


def test_a_triangle_is_half_of_a_square(monkeypatch):
    """Of the products, counted."""
    counted = []
    monkeypatch.setattr("cosup.walk.gemm.dots", lambda x, w, out, **k: (counted.append(out.numel()), dots(x, w, out)))
    x = torch.randn(800, 8, requires_grad=True)
    lse, *_ = ops.lse_of_others(x, torch.ones(()), None, True, None, "reference")
    torch.autograd.grad(lse.sum(), x)
    assert sum(counted) <= 2 * 0.6 * 800**2
    torch.testing.assert_close(lse, (x @ x.mT).fill_diagonal_(float("-inf")).logsumexp(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["one block", "slabs"])
@pytest.mark.parametrize("feature", FEATURES)
def test_error_of_the_temperatures_gradient(feature, strategy, dtype, device):
    """A single number may be exact by luck: root mean squares over several problems."""
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in FEATURES[feature].items()}
    errors = []
    for seed in range(8):
        torch.manual_seed(seed)
        query, candidates, target = pool(dtype, device)
        budget = bytes_for_pool(strategy, query, options.get("symmetric", False))

        def run(loss, dtype, query=query, candidates=candidates, target=target, **more):
            given = {k: v.to(dtype) if k in ("candidate_bias", "hard_negatives") else v for k, v in options.items()}
            tensors = [t.to(dtype) for t in (query, candidates)]
            temperature = torch.tensor(0.3, device=device).to(query.dtype).to(dtype).requires_grad_()
            value = loss(*tensors, temperature=temperature, target=target, **given, **more)
            return torch.autograd.grad(value, temperature)[0].double()

        truth = run(contrastive, torch.float64)
        errors.append([run(info_nce, dtype, workspace_bytes=budget) - truth, run(contrastive, dtype) - truth, truth])
    ours, theirs, size = torch.tensor(errors).square().mean(0).sqrt().tolist()
    assert ours <= 2 * (theirs + 0.5 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("budget", [None, 4000], ids=["whole rows", "slabs"])
def test_gradcheck(budget, symmetric):
    """Of every continuous argument."""
    q, c, h, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 2), (9, 2), (5, 2, 2), (9,)))
    temperature, weight = (torch.rand(s, dtype=torch.float64).requires_grad_() for s in ((), (5,)))
    ids, target = torch.randint(6, (9,)), torch.randperm(9)[:5]
    for hard in (None, h):
        inner = {"query_negatives": hard is not None, "candidate_negatives": hard is not None and not symmetric}

        def loss(q, c, t, b, weight, *hard, inner=inner):
            return info_nce(q, c, target, temperature=t, candidate_bias=b, sample_weight=weight, margin=0.1,
                            hard_negatives=hard[0] if hard else None, symmetric=symmetric, candidate_ids=ids,
                            label_smoothing=0.1, workspace_bytes=budget, **inner)  # fmt: skip

        inputs = (q, c, temperature, b, weight, *([] if hard is None else [hard]))
        assert torch.autograd.gradcheck(loss, inputs)


def test_stats_with_query_negatives(device):
    query, candidates, target = pool(torch.float32, device)
    _, stats = info_nce(query, candidates, target, temperature=0.3, query_negatives=True, return_stats=True)
    q, c = (F.normalize(t.double(), dim=1) for t in (query, candidates))
    z = q @ c.mT / 0.3
    row = torch.cat([z, (q @ q.mT / 0.3).fill_diagonal_(float("-inf"))], 1)
    own, log_p = z.gather(1, target[:, None]), row.log_softmax(1)
    assert torch.equal(stats.rank, (z > own).sum(1) + 1)  # among the candidates
    entropy = -(log_p.exp() * log_p).nan_to_num(0.0).sum(1)
    for got, want in ((stats.lse, row.logsumexp(1)), (stats.entropy, entropy), (stats.nll, row.logsumexp(1) - own[:, 0])):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hard", [None, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_stats(symmetric, hard, device):
    query, candidates, target = pool(torch.float32, device)
    hard = None if hard is None else torch.randn(N, hard, D, device=device)
    options = {"temperature": 0.3, "symmetric": symmetric, "margin": 0.2, "hard_negatives": hard}
    _, stats = info_nce(query, candidates, target, return_stats=True, **options)
    _, by_slabs = info_nce(query, candidates, target, return_stats=True, workspace_bytes=20_000, **options)
    q, c = (F.normalize(t.double(), dim=1) for t in (query, candidates))
    z = q @ c.mT / 0.3
    if hard is not None:
        z = torch.cat([z, torch.einsum("nd,nhd->nh", q, F.normalize(hard.double(), dim=2)) / 0.3], 1)
    own = z.gather(1, target[:, None])
    above = (z > own).sum(1)
    lowered = z.scatter(1, target[:, None], own - 0.2 / 0.3)
    log_p = lowered.log_softmax(1)
    for found in (stats, by_slabs):
        assert torch.equal(found.rank, above + 1) and torch.equal(found.top1, above == 0) and found.top1.any()
        for got, want in ((found.nll, -log_p.gather(1, target[:, None])[:, 0]), (found.lse, lowered.logsumexp(1)),
                          (found.entropy, -(log_p.exp() * log_p).sum(1))):  # fmt: skip
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.log_prob, -found.nll)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_equals_sentence_transformers(cached, symmetric):
    pytest.importorskip("sentence_transformers")
    theirs = peers.sentence_transformers(0.05, symmetric, cached=cached)
    _equal(theirs, lambda q, c, t: info_nce(q, c, t, temperature=0.05, normalize=False, symmetric=symmetric))


def test_equals_sentence_transformers_with_further_candidates():
    """Their hard negatives are candidates of every query; their default is cosine."""
    losses = pytest.importorskip("sentence_transformers.losses")
    loss = losses.MultipleNegativesRankingLoss(peers.NOTHING, 20.0)
    _equal(lambda q, c, t: loss.compute_loss_from_embeddings([q, *c.chunk(2)], t),
           lambda q, c, t: info_nce(q, c, t, temperature=0.05), candidates=2 * N)  # fmt: skip


def test_equals_sentence_transformers_with_negatives_of_either_kind():
    """Their joint softmax; their documents of a query are its positive alone."""
    losses = pytest.importorskip("sentence_transformers.losses")
    directions = ("query_to_doc", "query_to_query", "doc_to_doc")
    loss = losses.MultipleNegativesRankingLoss(peers.NOTHING, 20.0, directions=directions, partition_mode="joint")
    _equal(lambda q, c, t: loss.compute_loss_from_embeddings([q, c], t),
           lambda q, c, t: info_nce(q, c, temperature=0.05, query_negatives=True, candidate_negatives=True))  # fmt: skip


def test_equals_open_clip():
    """It takes vectors of unit length."""
    try:
        theirs = peers.open_clip(0.05)
    except ImportError as error:
        pytest.skip(str(error))
    _equal(lambda q, c, t: theirs(F.normalize(q), F.normalize(c), t),
           lambda q, c, t: info_nce(q, c, temperature=0.05, symmetric=True))  # fmt: skip


def _equal(theirs, ours, candidates=N):
    tensors = [torch.randn(k, D, dtype=torch.float64, requires_grad=True) for k in (N, candidates)]
    results = []
    for loss in (ours, theirs):
        value = loss(*tensors, torch.arange(N))
        results.append((value.detach(), *torch.autograd.grad(value, tensors)))
    torch.testing.assert_close(*results)


def test_low_temperature_in_sixteen_bits(device):
    """Logits to 100, in both directions: finite, and no worse than plain PyTorch."""
    query, candidates, target = pool(torch.bfloat16, device)
    check(lambda q, c, t: info_nce(q, c, target, temperature=t, symmetric=True),
          lambda q, c, t: contrastive(q, c, temperature=t, target=target, symmetric=True),
          (query, candidates, torch.tensor(0.01, dtype=torch.bfloat16, device=device)))  # fmt: skip


@pytest.mark.parametrize("symmetric", [False, True])
def test_all_candidates_masked(symmetric):
    """All are the query's own passage: there is no negative, the loss is 0, and nothing is NaN."""
    q, c = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    loss = info_nce(q, c, candidate_ids=torch.zeros(6, dtype=torch.int64), temperature=temperature, symmetric=symmetric)
    grads = torch.autograd.grad(loss, (q, c, temperature))
    assert abs(loss.item()) < 1e-6 and all(g.abs().max() < 1e-5 for g in grads)


def test_no_other_query_and_no_other_candidate():
    q, c = torch.randn(1, 8, requires_grad=True), torch.randn(1, 8, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    loss, stats = info_nce(q, c, temperature=temperature, query_negatives=True, candidate_negatives=True, return_stats=True)
    assert loss == 0 and stats.entropy == 0 and stats.rank == 1
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (q, c, temperature)))


def test_zero_vectors():
    """Their similarity is 0 to all; the gradients are finite."""
    q, c = torch.zeros(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = info_nce(q, c, symmetric=True)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (q, c)))
    assert torch.isclose(info_nce(q, c), torch.tensor(5.0).log())


# ruff: noqa: E501
BAD = [
    (dict(target=torch.tensor([0, 1, 1])), ValueError, "target must be distinct rows of candidates where symmetric, got row 1 for 2"),
    (dict(candidate_bias=torch.zeros(4)), ValueError, r"candidate_bias must be \[5\], got \[4\]"),
    (dict(candidate_bias=torch.zeros(5, dtype=torch.int64)), ValueError, "candidate_bias must be floating, got torch.int64"),
    (dict(sample_weight=torch.zeros(5)), ValueError, r"sample_weight must be \[3\], got \[5\]"),
    (dict(hard_negatives=torch.zeros(3, 8)), ValueError, r"hard_negatives must be \[3, H, 8\] of torch.float32, got \[3, 8\]"),
    (dict(hard_negatives=torch.zeros(3, 2, 8).double()), ValueError, "hard_negatives must be .* got .* of torch.float64"),
    (dict(margin=float("nan")), ValueError, "margin must be a finite number, got nan"),
    (dict(false_negative_margin="0.1"), ValueError, "false_negative_margin must be a finite number, got '0.1'"),
    (dict(label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    (dict(label_smoothing=0.1, false_negative_margin=0.1), ValueError, "want label_smoothing or false_negative_margin, got both"),
    (dict(candidate_negatives=True), ValueError, "want symmetric or candidate_negatives, got both"),
    (dict(query_negatives=True, layout="ring"), ValueError, 'layout "ring" wants gather "exact"'),
    (dict(layout="star"), ValueError, "layout must be one of"),
    (dict(temperature=0.0), ValueError, "temperature must be a number, positive"),
    (dict(target=torch.tensor([0, 1, 5])), IndexError, r"target must be in \[0, 5\), got 5 in row 2"),
    (dict(candidates=torch.zeros(0, 8)), ValueError, "candidates must have a row for each of the 3 queries"),
]


@pytest.mark.parametrize("bad, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(bad, error, message):
    good = {"query": torch.randn(3, 8), "candidates": torch.randn(5, 8), "symmetric": True}
    with pytest.raises(error, match=message):
        info_nce(**(good | bad))


def test_a_frozen_pool_may_be_mapped_from_a_file(tmp_path):
    """Read slab by slab, and never written."""
    pool = torch.randn(5000, 16)
    np.save(tmp_path / "pool.npy", pool.numpy())
    mapped = torch.from_numpy(np.load(tmp_path / "pool.npy", mmap_mode="c"))
    query, target = torch.randn(7, 16, requires_grad=True), torch.randint(5000, (7,))
    results = []
    for candidates in (pool, mapped):
        loss = info_nce(query, candidates, target, normalize=False, temperature=1.0, workspace_bytes=40_000)
        results.append((loss.detach(), *torch.autograd.grad(loss, query)))
    torch.testing.assert_close(*results)


def test_matryoshka(device):
    query, candidates, target = pool(torch.float64, device)
    hard = torch.randn(N, 2, D, dtype=torch.float64, device=device)
    tensors = [t.requires_grad_() for t in (query, candidates, hard)]
    loss = nn.MatryoshkaLoss(nn.InfoNCELoss(0.3, symmetric=True), dims=(8, 20, D), weights=(0.5, 1.0, 2.0))
    parts = [contrastive(query[:, :d], candidates[:, :d], temperature=0.3, target=target, symmetric=True,
                     hard_negatives=hard[..., :d]) for d in (8, 20, D)]  # fmt: skip
    got, want = loss(query, candidates, target, hard_negatives=hard), 0.5 * parts[0] + parts[1] + 2 * parts[2]
    torch.testing.assert_close((got, *torch.autograd.grad(got, tensors)), (want, *torch.autograd.grad(want, tensors)))


def test_matryoshka_without_one_of_its_prefixes():
    query, candidates, target = pool(torch.float32, "cpu")
    query[0, -1] = float("inf")  # beyond the prefixes that count
    loss = nn.MatryoshkaLoss(nn.InfoNCELoss(0.3, normalize=False), dims=(8, D), weights=(0.5, 0.0))
    want = 0.5 * info_nce(query[:, :8], candidates[:, :8], target, temperature=0.3, normalize=False)
    assert torch.equal(loss(query, candidates, target), want) and want.isfinite()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((nn.InfoNCELoss(), ()), "dims must be lengths of at least 1"),
        ((nn.InfoNCELoss(), (8, 0)), "dims must be lengths of at least 1"),
        ((nn.InfoNCELoss(), (8, 16), (1.0,)), "weights must be as many as dims, 2, got 1"),
        ((nn.InfoNCELoss(), (8, 16), (0.0, 0.0)), "weights must not all be 0"),
        ((nn.InfoNCELoss(return_stats=True), (8,)), "loss must be an InfoNCELoss without return_stats"),
        ((info_nce, (8,)), "loss must be an InfoNCELoss without return_stats"),
        ((nn.InfoNCELoss(), (D + 1,)), f"want vectors of one length, at least {D + 1} of dims, got {D} and {D}"),
    ],
)
def test_bad_matryoshka(arguments, message):
    with pytest.raises(ValueError, match=message):
        nn.MatryoshkaLoss(*arguments)(torch.randn(3, D), torch.randn(3, D))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("budget", [None, 1 << 20], ids=["one block", "blocks"])
def test_symmetric_where_half_of_a_batch_has_no_weight(budget, dtype):
    """A tile may have no row and no column with a weight."""
    q, c = (torch.randn(2048, 32).to(dtype).requires_grad_() for _ in range(2))
    weight = torch.ones(2048)
    weight[1024:] = 0
    for scale, w in ((1.0, weight), (0.0, None)):
        loss = info_nce(q, c, symmetric=True, sample_weight=w, temperature=0.005, reduction="none", workspace_bytes=budget)
        grads = torch.autograd.grad(scale * loss.sum(), (q, c))
        assert all(g.isfinite().all() for g in grads)
        assert not scale or grads[0][:1024].any(1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_symmetric_where_pairs_without_weight_are_far_above_the_others(dtype):
    """Their logits may be more above the statistics of the others than an exponential can be."""
    size = torch.ones(256, 1)
    size[128:] = 10
    q, c = ((size * torch.randn(256, 32)).to(dtype).requires_grad_() for _ in range(2))
    weight = (size[:, 0] == 1).float()
    loss = info_nce(q, c, symmetric=True, sample_weight=weight, temperature=5.0, normalize=False)

    def plain(to):
        z = to(q) @ to(c).mT / 5
        nll = (z.logsumexp(0) + z.logsumexp(1)) / 2 - z.diagonal()
        return torch.autograd.grad((weight * nll).sum() / weight.sum(), (q, c))

    for grads in zip(torch.autograd.grad(loss, (q, c)), plain(lambda t: t), plain(torch.Tensor.double), strict=True):
        ours, theirs, wanted = (grad.double() for grad in grads)
        assert (ours - wanted).norm() <= 2 * (theirs - wanted).norm() + torch.finfo(dtype).eps * wanted.norm()


@pytest.mark.parametrize("option", [{}, {"query_negatives": True}, {"hard_negatives": torch.ones(3, 1, 8)}], ids=str)
def test_no_weight_at_all(option):
    q, c = torch.randn(3, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    loss = info_nce(q, c, sample_weight=torch.zeros(3), **option)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (q, c)))


@pytest.mark.parametrize("option", [{}, {"reduction": "none"}, {"query_negatives": True}], ids=str)
def test_inside_activation_checkpointing(option):
    q, c = torch.randn(6, 8, requires_grad=True), torch.randn(9, 8, requires_grad=True)
    temperature = torch.tensor(0.2, requires_grad=True)

    def loss(q, c, t):
        return info_nce(q, c, temperature=t, **option).mean()

    results = [torch.autograd.grad(value, (q, c, temperature)) for value in
               (loss(q, c, temperature), checkpoint(loss, q, c, temperature, use_reentrant=False))]  # fmt: skip
    torch.testing.assert_close(*results)


def test_far_negatives_keep_the_digits_of_float64():
    """Those of all candidates together are e^-21 of theirs, a millionth of which float64 can tell."""
    query, *candidates = torch.eye(3, dtype=torch.float64)
    loss = info_nce(query.expand(2, 3), torch.stack(candidates), temperature=1 / 21, hard_negatives=query.expand(2, 8, 3))
    torch.testing.assert_close(loss.item(), math.log(8) + 21 + math.log1p(math.exp(-21) / 4), rtol=1e-15, atol=0)


def test_smoothing_keeps_the_digits_of_float64():
    q, c = torch.randn(6, 5, dtype=torch.float64), torch.randn(9, 5, dtype=torch.float64)
    want = contrastive(q, c, temperature=0.05, target=torch.arange(6), label_smoothing=0.1)
    torch.testing.assert_close(info_nce(q, c, label_smoothing=0.1), want, rtol=1e-14, atol=0)


def test_a_row_of_zeros_in_float16():
    q, c = torch.zeros(3, 8, dtype=torch.float16, requires_grad=True), torch.randn(5, 8).half().requires_grad_()
    assert all(g.isfinite().all() for g in torch.autograd.grad(info_nce(q, c), (q, c)))


def test_fused_statistics_are_not_for_triangles(device):
    query, candidates, target = (t if t.dtype == torch.int64 else t.half() for t in pool(torch.float32, device))
    options = {"query_negatives": True, "temperature": 0.3}
    values = [info_nce(query, candidates, target, backend=name, **options) for name in ("fused", "reference")]
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)
