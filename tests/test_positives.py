"""Several positives of a query, as lists or by ids, against float64."""

import pytest
import torch
import torch.nn.functional as F

from cosup import info_nce
from cosup import positives as module
from oracles import DTYPES, D, M, N, bytes_for_pool, check, errors, of_positives

pytestmark = pytest.mark.usefixtures("narrow_slabs")
IDS = torch.randint(20, (N,)), torch.randint(2, 20, (M,))  # ids 0 and 1: no positive
LISTS = [torch.randperm(M)[: n % 5] for n in range(N)]


def given(form, device="cpu"):
    """What info_nce takes, and the matrix of what is positive."""
    if form == "ids":
        query, candidate = (ids.to(device) for ids in IDS)
        return {"positives": "ids", "query_ids": query, "candidate_ids": candidate}, query[:, None] == candidate
    start = F.pad(torch.tensor([len(row) for row in LISTS]).cumsum(0), (1, 0)).to(device)
    positive = torch.zeros(N, M, dtype=torch.bool, device=device)
    for n, row in enumerate(LISTS):
        positive[n, row] = True
    return {"positives": (start, torch.cat(LISTS).to(device))}, positive


def problem(dtype, device, positive):
    query, candidates = torch.randn(N, D, device=device).to(dtype), torch.randn(M, D, device=device).to(dtype)
    candidates[positive[: N // 3].int().argmax(1)] += 2 * query[: N // 3]  # some know an answer
    return query, candidates


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["one block", "row blocks", "slabs"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("pool", ["mean", "logsumexp"])
@pytest.mark.parametrize("form", ["ids", "lists"])
def test_error(form, pool, reduction, strategy, dtype, device):
    options, positive = given(form, device)
    query, candidates = problem(dtype, device, positive)
    bias, weight = torch.randn(M, device=device).to(dtype), torch.rand(N, device=device)
    weight[::7] = 0
    more = {"label_smoothing": 0.1, "reduction": reduction}
    options |= {"positives_pool": pool, "workspace_bytes": bytes_for_pool(strategy, query, False), **more}
    check(lambda q, c, b: info_nce(q, c, candidate_bias=b, sample_weight=weight, temperature=0.3, **options),
          lambda q, c, b: of_positives(q, c, 0.3, positive, pool, bias=b, weight=weight, **more),
          (query, candidates, bias))  # fmt: skip


def test_error_of_the_temperatures_gradient():
    """One number, whose error is small by luck at times: over 20 draws. The logsumexp is larger than the differences of
    logits that the gradient is made of, and so is its rounding: by way of it the error was 18 times plain PyTorch's.
    Statistics are taken from the largest logit of a row: at this temperature that costs three times."""
    squares = torch.zeros(2, dtype=torch.float64)
    positive = torch.rand(N, M) < 0.3
    options = {"positives": (F.pad(positive.sum(1).cumsum(0), (1, 0)), positive.nonzero()[:, 1])}
    for seed in range(20):
        torch.manual_seed(seed)
        inputs = torch.randn(N, D), torch.randn(M, D), torch.tensor(1.0)
        *_, (_, (ours, theirs, _)) = errors(
            lambda q, c, t: info_nce(q, c, temperature=t, positives_pool="logsumexp", **options),
            lambda q, c, t: of_positives(q, c, t, positive, "logsumexp"), inputs)  # fmt: skip
        squares += torch.tensor([ours, theirs]).square()
    assert squares[0] <= 6**2 * squares[1]


@pytest.mark.parametrize("pool", ["mean", "logsumexp"])
@pytest.mark.parametrize("budget", [None, 4000], ids=["whole rows", "slabs"])
def test_gradcheck(budget, pool):
    q, c, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 2), (9, 2), (9,)))
    temperature, weight = (torch.rand(s, dtype=torch.float64).requires_grad_() for s in ((), (5,)))
    lists = torch.tensor([0, 2, 2, 5, 6, 7]), torch.tensor([8, 0, 4, 3, 7, 7, 1])
    assert torch.autograd.gradcheck(
        lambda q, c, t, b, w: info_nce(q, c, temperature=t, candidate_bias=b, sample_weight=w, positives=lists,
                                       positives_pool=pool, label_smoothing=0.1, workspace_bytes=budget),
        (q, c, temperature, b, weight))  # fmt: skip


@pytest.mark.parametrize("pool", ["mean", "logsumexp"])
def test_one_positive_is_a_target(pool):
    q, c = torch.randn(N, D, requires_grad=True), torch.randn(M, D, requires_grad=True)
    target = torch.randint(M, (N,))
    results = []
    for options in ({"target": target}, {"positives": (torch.arange(N + 1), target), "positives_pool": pool}):
        loss, stats = info_nce(q, c, return_stats=True, **options)
        results.append((loss, *stats, *torch.autograd.grad(loss, (q, c))))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("budget", [None, 20_000], ids=["whole rows", "slabs"])
@pytest.mark.parametrize("form", ["ids", "lists"])
def test_ranks_are_of_the_best_positive_among_negatives(form, budget, device):
    options, positive = given(form, device)
    query, candidates = problem(torch.float32, device, positive)
    _, stats = info_nce(query, candidates, return_stats=True, workspace_bytes=budget, **options)
    z = F.normalize(query.double(), dim=1) @ F.normalize(candidates.double(), dim=1).mT / 0.05
    best = z.masked_fill(~positive, float("-inf")).amax(1)
    rank = torch.where(positive.any(1), 1 + ((z > best[:, None]) & ~positive).sum(1), 0)
    assert torch.equal(stats.rank, rank) and (rank == 1).any() and (rank > 5).any() and (rank == 0).any()
    log_p = z.log_softmax(1)
    entropy = torch.where(positive.any(1), -(log_p.exp() * log_p).sum(1), 0.0)
    torch.testing.assert_close(stats.entropy.double(), entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_positive_is_before_another(dtype, device):
    """Those of a query are alike to the last bit or two, whose order differs between products."""
    query = torch.randn(N, D, device=device).to(dtype)
    candidates = (query[:, None] + 1e-3 * torch.randn(N, 4, D, device=device)).to(dtype).flatten(0, 1)
    lists = 4 * torch.arange(N + 1, device=device), torch.arange(4 * N, device=device)
    _, stats = info_nce(query, candidates, positives=lists, return_stats=True)
    assert (stats.rank == 1).all()


def test_pairs_elsewhere_where_the_host_waits_for_nothing(monkeypatch):
    """As on CUDA: all pairs go through every tile, those that it does not have into its spare column."""
    options, positive = given("lists")
    tensors = [t.requires_grad_() for t in problem(torch.float32, "cpu", positive)]
    monkeypatch.setattr("cosup.walk.STRIP", 0)  # a tile is not cut into strips there
    results = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(module, "READ_BY_HOST", devices)
        for strategy in ("one block", "row blocks", "slabs"):
            loss = info_nce(*tensors, workspace_bytes=bytes_for_pool(strategy, tensors[0], False), **options)
            results.append((loss, *torch.autograd.grad(loss, tensors)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_fullgraph():
    def loss(q, c, start, col, query_ids, candidate_ids):
        ids = info_nce(q, c, positives="ids", query_ids=query_ids, candidate_ids=candidate_ids)
        return ids + info_nce(q, c, positives=(start, col), positives_pool="logsumexp")

    tensors = torch.randn(N, D, requires_grad=True), torch.randn(M, D, requires_grad=True)
    lists = given("lists")[0]["positives"]
    want, got = loss(*tensors, *lists, *IDS), torch.compile(loss, fullgraph=True, backend="aot_eager")(*tensors, *lists, *IDS)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(value, tensors) for value in (got, want)))


def test_no_positive_at_all():
    q, c = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    none = torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    for pool in ("mean", "logsumexp"):
        loss = info_nce(q, c, positives=none, positives_pool=pool)
        assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (q, c)))


# ruff: noqa: E501
LIST = torch.tensor([0, 1, 1, 3]), torch.tensor([4, 0, 1])
BAD = [
    (dict(positives=LIST, positives_pool="max"), ValueError, "positives_pool must be one of"),
    (dict(positives=LIST, target=torch.arange(3)), ValueError, "want target or positives, got both"),
    (dict(positives="labels"), ValueError, "positives must be .* got 'labels'"),
    (dict(positives=LIST[0]), ValueError, "positives must be"),
    (dict(positives=([0, 1, 2, 3], [0, 1, 2])), ValueError, "positives must be two tensors"),
    (dict(positives=LIST, candidates=torch.zeros(0, 8)), IndexError, r"positives\[1\] must be in \[0, 0\)"),
    (dict(positives=(LIST[0] * 0, LIST[1][:0]), candidates=torch.zeros(0, 8)), ValueError, "candidates must have rows where there are 3 queries"),
    (dict(positives="ids", candidate_ids=torch.arange(5)), ValueError, 'positives "ids" wants query_ids and candidate_ids'),
    (dict(positives=LIST, candidate_ids=torch.arange(5)), ValueError, "want positives as lists or ids, got both"),
    (dict(positives=LIST, symmetric=True), ValueError, "want positives or one of symmetric"),
    (dict(positives=LIST, hard_negatives=torch.zeros(3, 1, 8)), ValueError, "want positives or one of symmetric, hard_"),
    (dict(positives=(LIST[0][1:], LIST[1])), ValueError, r"positives\[0\] must be \[4\], got \[3\]"),
    (dict(positives=(LIST[0].flip(0), LIST[1])), ValueError, r"positives\[0\] must rise from 0 to 3"),
    (dict(positives=(LIST[0], LIST[1].int())), ValueError, r"positives\[1\] must be torch.int64"),
    (dict(positives=(LIST[0], LIST[1] + 1)), IndexError, r"positives\[1\] must be in \[0, 5\), got 5 in place 0"),
    (dict(positives=(LIST[0], torch.tensor([1, 2, 2]))), ValueError, r"positives\[1\] must name a candidate once for a query, got 2"),
]


@pytest.mark.parametrize("bad, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(bad, error, message):
    with pytest.raises(error, match=message):
        info_nce(**({"query": torch.randn(3, 8), "candidates": torch.randn(5, 8)} | bad))
