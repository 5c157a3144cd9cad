"""sigmoid_loss against float64, and against open_clip's SigLipLoss."""

import pytest
import torch
import torch.nn.functional as F

from cosup import gemm, nn, ops, sigmoid_loss
from cosup.bench import peers
from cosup.plan import Strategy, plan, used
from cosup.walk import cost, resolve
from oracles import BACKENDS, DTYPES, D, M, N, check, of_pairs, pool

pytestmark = pytest.mark.usefixtures("narrow_slabs")
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = {
    "plain": {},
    "inner products": {"normalize": False},
    "ids": {"candidate_ids": torch.randint(40, (M,), generator=GENERATOR)},
    "sample weight": {"sample_weight": torch.rand(N, generator=GENERATOR)},
}
FEATURES["all"] = {k: v for options in FEATURES.values() for k, v in options.items()}
FEATURES["ids of queries"] = FEATURES["ids"] | {"query_ids": torch.randint(40, (N,), generator=GENERATOR)}


def workspace(strategy, query, monkeypatch):
    """A budget for one block, for blocks of rows by strips, or for slabs of columns as where a tile is one strip."""
    if strategy == "slabs":
        monkeypatch.setattr("cosup.walk.STRIP", 0)
    if strategy == "one block":
        monkeypatch.setattr("cosup.walk.LEAST_ROWS", {"cpu": N, "cuda": N})
    c = cost(query, resolve("auto", query), gathered=False, sigmoid=True)
    if strategy == "one block":
        budget = 1 << 24
    else:
        budget = used(N, M, 20, 48 if strategy == "slabs" else M, c._replace(strip=c.strip and 16), True)
    p = plan(N, M, c, grads=True, weights_known=True, workspace_bytes=budget)
    assert p.strategy is Strategy.GRADS_IN_FORWARD
    assert (p.block_cols < M) == (strategy == "slabs") and (p.block_rows < N) == (strategy != "one block")
    assert (p.strip_cols < p.block_cols) == (strategy != "slabs")
    return budget


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", ["one block", "row blocks", "slabs"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("feature", FEATURES)
def test_error_of_every_feature(feature, reduction, strategy, dtype, device, monkeypatch):
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in FEATURES[feature].items()}
    query, candidates, target = pool(dtype, device)
    inputs = [query, candidates, *(torch.tensor(v, dtype=dtype, device=device) for v in (0.3, -2.0))]
    if options.get("normalize") is False:
        inputs[2] = 20 * inputs[2]
    names = [name for name in ("sample_weight",) if name in options]
    inputs += [options.pop(name).to(dtype) for name in names]
    budget = workspace(strategy, query, monkeypatch)

    def ours(q, c, t, b, *weight):
        return sigmoid_loss(q, c, target, temperature=t, bias=b, reduction=reduction, workspace_bytes=budget,
                            **options, **dict(zip(names, weight, strict=True)))  # fmt: skip

    def plain(q, c, t, b, *weight):
        return of_pairs(q, c, t, b, target, reduction=reduction, **options, **dict(zip(names, weight, strict=True)))

    check(ours, plain, inputs)


@pytest.mark.parametrize("backend", [*BACKENDS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_error_on_every_backend(reduction, backend, device):
    query, candidates, target = pool(torch.float32, device)
    options = {k: v.to(device) for k, v in FEATURES["all"].items() if isinstance(v, torch.Tensor)}
    check(lambda q, c, t, b: sigmoid_loss(q, c, target, temperature=t, bias=b, reduction=reduction, backend=backend,
                                          workspace_bytes=60_000, **options),
          lambda q, c, t, b: of_pairs(q, c, t, b, target, reduction=reduction, **options),
          (query, candidates, torch.tensor(0.1, device=device), torch.tensor(-10.0, device=device)))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_trained_scale_in_any_dtype(dtype, device):
    """Logits from -120 to 100: what is tiny keeps its digits, what is large its gradient."""
    query, candidates, target = pool(dtype, device)
    numbers = (torch.tensor(v, dtype=dtype, device=device) for v in (0.01, -16.5))
    check(lambda q, c, t, b: sigmoid_loss(q, c, target, temperature=t, bias=b),
          lambda q, c, t, b: of_pairs(q, c, t, b, target), (query, candidates, *numbers))  # fmt: skip


@pytest.mark.parametrize("reduction, products", [("mean", 1), ("sum", 1), ("none", 2)])
@pytest.mark.parametrize("budget", [None, 30_000])
def test_one_sweep_at_any_budget(budget, reduction, products, monkeypatch, device):
    """Each logit is multiplied once where the weights are known."""
    query, candidates, target = pool(torch.float32, device)
    count, dots = [], gemm.dots
    monkeypatch.setattr(gemm, "dots", lambda a, b, out, **k: count.append(out.numel()) or dots(a, b, out))
    loss = sigmoid_loss(query.requires_grad_(), candidates, target, reduction=reduction, workspace_bytes=budget)
    loss.sum().backward()
    assert sum(count) == products * N * M


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("budget", [None, 3000], ids=["one block", "several"])
def test_gradcheck(budget, reduction):
    """Of every continuous argument."""
    q, c = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 2), (9, 2)))
    temperature, bias, weight = (torch.rand(s, dtype=torch.float64).requires_grad_() for s in ((), (), (5,)))
    ids, target = torch.randint(6, (9,)), torch.randperm(9)[:5]

    def loss(q, c, t, b, weight):
        return sigmoid_loss(q, c, target, temperature=t, bias=b, sample_weight=weight, candidate_ids=ids,
                            reduction=reduction, workspace_bytes=budget)  # fmt: skip

    assert torch.autograd.gradcheck(loss, (q, c, temperature, bias, weight))


def test_only_what_is_asked():
    """Frozen operands get no gradient, and a frozen pair's temperature and bias still get theirs."""
    q, c, t = pool(torch.float64, "cpu")
    asked = dict(query=q, candidates=c, temperature=torch.tensor(0.3), bias=torch.tensor(-2.0))
    asked = {k: v.double() for k, v in asked.items()}
    whole = {k: v.clone().requires_grad_() for k, v in asked.items()}
    want = torch.autograd.grad(sigmoid_loss(target=t, **whole), whole.values())
    for (name, value), grad in zip(asked.items(), want, strict=True):
        alone = value.clone().requires_grad_()
        loss = sigmoid_loss(target=t, **(asked | {name: alone}))
        torch.testing.assert_close(torch.autograd.grad(loss, alone)[0], grad)
    assert not sigmoid_loss(target=t, **asked).requires_grad


@pytest.mark.parametrize("backend", BACKENDS[:-1])
def test_opcheck(backend):
    x, w = (torch.randn(*s, requires_grad=True) for s in ((7, 3), (11, 3)))
    scale, bias, weight = (torch.rand(s).requires_grad_() for s in ((), (), (7,)))
    target, ids = torch.randperm(11)[:7], torch.randint(5, (11,))
    for of_rows in (weight, None):
        arguments = (x, w, target, of_rows, scale, bias, ids[target], ids, True, [True] * 3, 1 << 20, backend)
        torch.library.opcheck(ops.sigmoid_loss, arguments)
    frozen = (x, w.detach(), target, weight.detach(), scale.detach(), bias.detach(), None, None)
    torch.library.opcheck(ops.sigmoid_loss, (*frozen, True, [True, False, False], 1 << 20, backend))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile(reduction):
    w = torch.randn(50, 16, requires_grad=True)
    numbers = [torch.tensor(v, requires_grad=True) for v in (0.1, -3.0)]
    ids = torch.randint(30, (50,))

    def loss(x, w, t, b):
        return 2 * sigmoid_loss(x.sin(), w, temperature=t, bias=b, candidate_ids=ids, reduction=reduction,
                                sample_weight=w[:33, 1].abs())  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if reduction == "mean" else "aot_eager")
    for _ in range(2):
        x = torch.randn(33, 16, requires_grad=True)
        eager, graph = loss(x, w, *numbers), compiled(x, w, *numbers)
        up = torch.rand_like(eager)
        torch.testing.assert_close(graph, eager)
        torch.testing.assert_close(torch.autograd.grad(graph, (x, w, *numbers), up),
                                   torch.autograd.grad(eager, (x, w, *numbers), up))  # fmt: skip


def test_equals_open_clip():
    """It takes vectors of unit length, and the inverse of the temperature."""
    try:
        theirs = peers.open_clip_losses().SigLipLoss()
    except ImportError as error:
        pytest.skip(str(error))
    q, c, scale, bias = (torch.randn(s, dtype=torch.float64) for s in ((N, D), (N, D), (), ()))
    tensors = [t.requires_grad_() for t in (q, c, 10 + scale, bias - 10)]
    results = []
    for loss in (lambda q, c, s, b: sigmoid_loss(q, c, temperature=1 / s, bias=b),
                 lambda q, c, s, b: theirs(F.normalize(q), F.normalize(c), s, b)):  # fmt: skip
        value = loss(*tensors)
        results.append((value.detach(), *torch.autograd.grad(value, tensors)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("bias", [-1e4, -1e3, 0.0, 1e4])
def test_extreme_logits(bias):
    """Of 1e4 in both directions: as in float64, and nothing is NaN."""
    q, c = 100 * torch.eye(4, 8), 100 * torch.cat([torch.eye(4, 8).flip(0), -torch.eye(4, 8), torch.zeros(1, 8)])
    results = []
    for dtype in (torch.float32, torch.float64):
        tensors = [t.to(dtype).requires_grad_() for t in (q, c, torch.tensor(1.0), torch.tensor(bias))]
        loss = sigmoid_loss(tensors[0], tensors[1], temperature=tensors[2], bias=tensors[3], normalize=False)
        grads = torch.autograd.grad(loss, tensors)
        assert loss.isfinite() and all(g.isfinite().all() for g in grads)
        results.append([t.detach().float() for t in (loss, *grads)])
    torch.testing.assert_close(*results)


def test_zero_vectors():
    """Their logit is the bias with all; the gradients are finite."""
    q, c = torch.zeros(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    loss = sigmoid_loss(q, c, bias=-1.0)
    torch.testing.assert_close(loss, F.softplus(torch.tensor(1.0)) + 4 * F.softplus(torch.tensor(-1.0)))
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (q, c)))


@pytest.mark.parametrize("m", [0, 5])
@pytest.mark.parametrize("reduction, shape", [("mean", ()), ("sum", ()), ("none", (0,))])
def test_no_queries(reduction, shape, m):
    q, c, b = torch.zeros(0, 8, requires_grad=True), torch.randn(m, 8, requires_grad=True), torch.tensor(0.0)
    loss = sigmoid_loss(q, c, bias=b.requires_grad_(), reduction=reduction)
    assert loss.shape == shape and not loss.any()
    assert all(not g.any() for g in torch.autograd.grad(loss.sum(), (q, c, b)))


def test_all_candidates_are_the_positive():
    """No negative is left: the loss is the positive's alone, the others get no gradient."""
    q, c = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    loss = sigmoid_loss(q, c, candidate_ids=torch.zeros(6, dtype=torch.int64), temperature=1.0, bias=0.0)
    torch.testing.assert_close(loss, F.softplus(-F.cosine_similarity(q, c[:4])).mean())
    assert not torch.autograd.grad(loss, c)[0][4:].any()


def test_nan_stays_in_its_row(device):
    query, candidates, target = pool(torch.float32, device)
    query[3] = float("nan")
    loss = sigmoid_loss(query.requires_grad_(), candidates, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), query)
    assert loss.isnan().nonzero().tolist() == [[3]] and grad.isnan().any(1).nonzero().tolist() == [[3]]


def test_module_learns_temperature_and_bias():
    module = nn.SigmoidLoss(temperature=0.2, bias=-3.0, reduction="sum")
    q, c, t = pool(torch.float32, "cpu")
    weight = torch.rand(N)
    loss = module(q, c, t, sample_weight=weight)
    torch.testing.assert_close(loss, sigmoid_loss(q, c, t, temperature=0.2, bias=-3.0, sample_weight=weight,
                                                  reduction="sum"))  # fmt: skip
    loss.backward()
    assert {name: bool(p.grad) for name, p in module.named_parameters()} == {"log_temperature": True, "bias": True}


# ruff: noqa: E501
BAD = [
    (dict(query=torch.zeros(8)), ValueError, r"query must be \[N, D\], got \[8\]"),
    (dict(candidates=torch.zeros(5, 7)), ValueError, r"want query \[..., D\] and candidates \[M, D\], got \[3, 8\] and \[5, 7\]"),
    (dict(candidates=torch.zeros(0, 8)), ValueError, "candidates must have a row for each of the 3 queries"),
    (dict(bias=float("nan")), ValueError, "bias must be a finite number, got nan"),
    (dict(bias=float("-inf")), ValueError, "bias must be a finite number, got -inf"),
    (dict(bias="1"), ValueError, "bias must be a finite number, got '1'"),
    (dict(bias=torch.zeros(2)), ValueError, r"bias must be one floating number on cpu, got torch.float32 \[2\]"),
    (dict(bias=torch.tensor(1)), ValueError, "bias must be one floating number on cpu, got torch.int64"),
    (dict(temperature=0.0), ValueError, "temperature must be a number, positive"),
    (dict(temperature=torch.tensor(-1.0)), ValueError, "temperature must be positive and finite, got -1"),
    (dict(sample_weight=torch.zeros(5)), ValueError, r"sample_weight must be \[3\], got \[5\]"),
    (dict(query_ids=torch.zeros(3).long()), ValueError, "query_ids without candidate_ids"),
    (dict(candidate_ids=torch.zeros(4).long()), ValueError, r"candidate_ids must be \[5\], got \[4\]"),
    (dict(reduction="all"), ValueError, "reduction must be one of"),
    (dict(gather="all"), ValueError, "gather must be one of"),
    (dict(backend="cuda"), ValueError, "backend must be one of"),
    (dict(workspace_bytes=-1), ValueError, "workspace_bytes must be an integer of at least 0, got -1"),
    (dict(workspace_bytes=8), ValueError, "workspace_bytes must be at least .* for 3 rows and 5 columns, got 8"),
    (dict(workspace_bytes=8, reduction="none"), ValueError, "workspace_bytes must be at least .* got 8"),
    (dict(target=torch.tensor([0, 1, 5])), IndexError, r"target must be in \[0, 5\), got 5 in row 2"),
    (dict(target=torch.tensor([0, -1, 2])), IndexError, r"target must be in \[0, 5\), got -1 in row 1"),
]


@pytest.mark.parametrize("bad, error, message", BAD, ids=[m for *_, m in BAD])
def test_bad_input(bad, error, message):
    good = {"query": torch.randn(3, 8, requires_grad=True), "candidates": torch.randn(5, 8)}
    with pytest.raises(error, match=message):
        sigmoid_loss(**(good | bad))


def test_a_budget_for_the_forward_pass_alone_is_refused_at_once():
    """bfloat16's gradients are summed apart, in room that the statistics do not need."""
    query, candidates, target = pool(torch.bfloat16, "cpu")
    least = 12_000
    assert sigmoid_loss(query, candidates, target, reduction="none", workspace_bytes=least).isfinite().all()
    with pytest.raises(ValueError, match="workspace_bytes must be at least"):
        sigmoid_loss(query.requires_grad_(), candidates.requires_grad_(), target, reduction="none", workspace_bytes=least)
