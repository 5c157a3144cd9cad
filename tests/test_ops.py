"""The registered operators: derivatives, fake kernels, whole-graph compilation, and memory as planned."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosup import gemm, info_nce, linear_cross_entropy, linear_log_prob, ops, sigmoid_loss
from cosup.bench.measure import peak_bytes
from cosup.kernels import native
from cosup.plan import Strategy, plan, used
from cosup.walk import NARROW, cost
from operators import arguments, need

BACKENDS = ["reference", *(["native"] if native.AVAILABLE else [])]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("budget", [None, 2000], ids=["whole rows", "slabs"])
def test_gradcheck(reduction, budget):
    x, w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((5, 2), (30, 2), (30,)))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    target, ids = torch.randint(30, (5,)), torch.randint(12, (30,))
    assert torch.autograd.gradcheck(
        lambda x, w, t: info_nce(x, w, target, temperature=t, candidate_ids=ids, reduction=reduction,
                                 workspace_bytes=budget), (x, w, temperature))  # fmt: skip
    target[2] = -100
    assert torch.autograd.gradcheck(
        lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, logit_softcap=3.0, reduction=reduction,
                                             workspace_bytes=budget), (x, w, b))  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    def opcheck(operator, **given):
        torch.library.opcheck(operator, arguments(operator, backend=backend, **given))

    x, w, b = (torch.randn(*s, requires_grad=True) for s in ((7, 3), (11, 3), (11,)))
    x2, w2, scale = (torch.randn(s).abs().requires_grad_() for s in ((7, 2), (11, 2), ()))
    weight, soft = torch.rand(7, requires_grad=True), torch.rand(11)
    target, ids = torch.randperm(11)[:7], torch.randint(5, (11,))
    every, rows = need("x", "w", "bias", "x2", "w2", "scale"), dict(x=x, w=w, target=target)
    weights = dict(b=weight, c=weight, e=weight, q=weight)
    features = dict(bias=b, soft=soft)
    one = features | dict(row_id=ids[target], col_id=ids, x2=x2, w2=w2, margin=0.1, gap=5.0)
    several = features | dict(pair_start=torch.tensor([0, 2, 2, 3, 4, 5, 6, 7]), pair_col=torch.randperm(11)[:7],
                              pool="logsumexp")  # fmt: skip
    still = dict(scale=scale.detach())  # the entropy has no gradient of the scale
    for symmetric in (False, True):
        opcheck(ops.nll_stats, **rows, **still, **one, symmetric=symmetric, need=need("x", "w", "bias", "x2", "w2"))
        opcheck(ops.loss_and_grads, **rows, **weights, v=weight if symmetric else None, scale=scale, **one, need=every)
    opcheck(ops.nll_stats, **rows, **still, **several, need=need("x", "w", "bias"))
    opcheck(ops.loss_and_grads, **rows, **weights, scale=scale, **several, need=need("x", "w", "bias", "scale"))
    frozen = dict(w=w.detach(), b=weight.detach(), ignore_index=-100)
    opcheck(ops.loss_and_grads, **rows | frozen, **still, need=need("x"))
    x, w, x2, w2, weight = (t.detach() for t in (x, w, x2, w2, weight))
    rows, top, of_columns = dict(x=x, w=w, target=target), torch.randn(7), torch.rand(11)
    upstream = dict(grad_nll=weight, grad_lse=top, grad_entropy=top, grad_soft=top, grad_column=top)
    known = dict(entropy=weight, top=top, total=weight, col_top=of_columns, col_total=of_columns, pair_logit=top[:0])
    opcheck(ops.nll_stats_backward, **upstream, **known, **rows, **still, soft=soft, x2=x2, w2=w2, symmetric=True,
            need=every)  # fmt: skip
    torch.library.opcheck(ops.column_values, arguments(ops.column_values, vector=soft, target=target))
    torch.library.opcheck(ops.pairs_of_ids, (ids[target], ids))
    triangle = dict(ids=ids[target], x=x.clone().requires_grad_(), scale=scale)
    opcheck(ops.lse_of_others, **triangle, need=True)
    opcheck(ops.lse_of_others_backward, grad=weight, top=top, total=weight, x=x, **still)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_dispatcher_is_asked_where_anything_but_autograd_listens(reduction):
    """Else its wrapping of the operators is left out, and every bit is the same."""
    x, w, target = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True), torch.arange(9)

    class Listener(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            names.add(function.name())
            return function(*arguments, **(options or {}))

    def run(x=x):
        loss = linear_cross_entropy(x, w, target, reduction=reduction)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), (x, w))]

    direct, names = run(), set()
    with Listener():
        heard = run()
    assert {"cosup::loss_and_grads" if reduction == "mean" else "cosup::nll_stats_backward"} < names
    assert all(torch.equal(a, b) for a, b in zip(direct, heard, strict=True))
    with torch.profiler.profile() as profile:
        run()
    assert not [e for e in profile.events() if e.name.startswith("cosup::")]
    class Own(torch.Tensor):
        pass

    loss = linear_cross_entropy(x.detach().as_subclass(Own), w, target, reduction=reduction)
    assert type(loss) is Own and torch.equal(loss.as_subclass(torch.Tensor), direct[0])
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        x, w, target = (fake.from_tensor(t) for t in (x, w, target))
    assert isinstance(linear_cross_entropy(x, w, target, reduction=reduction), FakeTensor)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fullgraph_compile(reduction):
    """The compiled losses, with work before and after them in one graph, equal the eager ones."""
    w, b = torch.randn(50, 16, requires_grad=True), torch.randn(50, requires_grad=True)
    temperature = torch.tensor(0.1, requires_grad=True)
    target, ids = torch.randint(50, (33,)), torch.randint(30, (50,))
    target[3] = -100

    def token(x, w, b):
        return 2 * linear_cross_entropy(x.sin(), w, target, linear_bias=b, reduction=reduction)

    def sequence(x, w, t):
        loss, stats = info_nce(x.sin(), w, temperature=t, candidate_ids=ids, reduction=reduction, return_stats=True)
        return 2 * loss + 0 * stats.rank.sum()

    def all_of_it(x, w, t):
        return info_nce(x.sin(), w, temperature=t, candidate_ids=ids, reduction=reduction, symmetric=True, margin=0.1,
                        hard_negatives=x[:, None].cos(), candidate_bias=w[:, 0], sample_weight=w[:33, 1].abs(),
                        label_smoothing=0.1)  # fmt: skip

    # each operator once by Inductor; a graph is as whole without it
    for loss, third, backend in ((token, b, "inductor"), (sequence, temperature, "aot_eager"),
                                 (all_of_it, temperature, "inductor" if reduction == "mean" else "aot_eager")):
        compiled = torch.compile(loss, fullgraph=True, backend=backend)
        for n in (33, 33):
            x = torch.randn(n, 16, requires_grad=True)
            eager, graph = loss(x, w, third), compiled(x, w, third)
            up = torch.rand_like(eager)
            torch.testing.assert_close(graph, eager)
            torch.testing.assert_close(torch.autograd.grad(graph, (x, w, third), up),
                                       torch.autograd.grad(eager, (x, w, third), up))  # fmt: skip


def test_reference_path_stays_within_its_budget():
    """float64 takes it always; the entropy's gradient holds the most tiles."""
    x, w = (torch.randn(k, 64, dtype=torch.float64, requires_grad=True) for k in (500, 3000))
    target = torch.randint(3000, (500,))

    def run():
        stats = linear_log_prob(x, w, target, workspace_bytes=4 << 20)
        return torch.autograd.grad((stats.entropy + stats.nll).sum(), (x, w))

    assert peak_bytes(run) - x.nbytes - w.nbytes < 1.02 * (4 << 20)


@pytest.mark.skipif(not native.AVAILABLE, reason="the reference path holds further tiles")
def test_thresholds_of_ranks_are_in_the_budget():
    """Where no gradient is asked the tile fills it: they are made before."""
    x, w, target = torch.randn(1024, 64), torch.randn(4096, 64), torch.randint(4096, (1024,))
    budget = 1 << 19

    def run():
        return linear_cross_entropy(x, w, target, workspace_bytes=budget, return_stats=True)

    run()
    _, stats = run()
    assert peak_bytes(run) - sum(t.nbytes for t in stats) < 1.02 * budget


def of_dtypes(*cases):
    """Each case of each dtype; but not wide ones in float16: it has bfloat16's plan and slow products."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [(dtype, *case) for dtype in dtypes for case in cases if dtype != torch.float16 or case[-1] <= 64]


@pytest.mark.skipif(not native.AVAILABLE, reason="the reference path holds further tiles")
@pytest.mark.parametrize("ignored", [0, 100])
@pytest.mark.parametrize(
    "dtype, reduction, budget, n, m, d",
    of_dtypes(
        ("mean", 4 << 20, 1024, 4096, 64),
        ("mean", 8 << 20, 1024, 4096, 600),
        ("none", 2 << 20, 1024, 4096, 64),
        ("none", 1 << 19, 1024, 4096, 64),
        ("none", 4 << 20, 256, 1024, 2048),  # the sum of the table's gradient is the largest part
        ("mean", 16 << 20, 1024, 4096, 300),  # packed parts of operands
        ("mean", 8 << 20, 4096, 400, 384),  # packed parts of a few columns
    ),
    ids=str,
)
def test_peak_memory_is_as_planned(reduction, budget, n, m, d, ignored, dtype, monkeypatch):
    """Tensors alive above inputs and gradients: never above the plan, and not far below it."""
    monkeypatch.setattr(gemm, "ONEDNN", gemm.has_onednn())  # which takes more than torch.mm
    x, w = (torch.randn(k, d, dtype=dtype).requires_grad_() for k in (n, m))
    target = torch.randint(m, (n,))
    target[:ignored] = -100
    p = plan(n - ignored, m, cost(x, "native", gathered=ignored > 0), grads=True, weights_known=reduction != "none",
             workspace_bytes=budget)  # fmt: skip

    def run():  # with ranks, whose thresholds are made before the tile
        options = {"reduction": reduction, "workspace_bytes": budget, "return_stats": True}
        loss = linear_cross_entropy(x, w, target, **options)[0]
        return torch.autograd.grad(loss.sum(), (x, w))

    above = peak_bytes(run) - x.nbytes - w.nbytes  # of the gradients
    assert 0.85 * p.workspace_bytes < above < 1.02 * p.workspace_bytes + (64 << 10)  # oneDNN's own scratch


@pytest.mark.skipif(not native.AVAILABLE, reason="the reference path holds further tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("frozen", ["input", "weight"])
@pytest.mark.parametrize("reduction, mib, d", [("mean", 4, 64), ("none", 0.5, 64), ("none", 4, 1024), ("mean", 2, 384)])
def test_what_is_frozen_takes_no_room(reduction, mib, d, frozen, dtype):
    """None is planned for it, none is taken."""
    budget = int(mib * 2**20)
    x = torch.randn(1024, d, dtype=dtype, requires_grad=frozen != "input")
    w = torch.randn(4096, d, dtype=dtype, requires_grad=frozen != "weight")
    target = torch.randint(4096, (1024,))

    def run():
        loss = linear_cross_entropy(x, w, target, reduction=reduction, workspace_bytes=budget)
        return torch.autograd.grad(loss.sum(), (x if x.requires_grad else w,))

    above = peak_bytes(run) - (x if x.requires_grad else w).nbytes  # of the gradient
    assert 0.7 * budget < above < 1.02 * budget + (64 << 10)  # oneDNN's own scratch


@pytest.mark.skipif(not native.AVAILABLE, reason="the reference path holds further tiles")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "dtype, budget, d", of_dtypes((4 << 20, 64), (8 << 20, 600), (1 << 20, 64), (1 << 19, 64)), ids=str
)
def test_peak_memory_of_pairs_is_as_planned(budget, d, reduction, dtype):
    """As above, of the sigmoid loss: its tile is one strip, whatever the number of columns."""
    n, m = 1024, 4096
    x, w = (torch.randn(k, d, dtype=dtype).requires_grad_() for k in (n, m))
    p = plan(n, m, cost(x, "native", gathered=False, sigmoid=True), grads=True, weights_known=True,
             workspace_bytes=budget)  # fmt: skip

    def run():
        loss = sigmoid_loss(x, w, normalize=False, reduction=reduction, workspace_bytes=budget)
        return torch.autograd.grad(loss.sum(), (x, w))

    above = peak_bytes(run) - x.nbytes - w.nbytes  # of the gradients
    assert 0.8 * p.workspace_bytes < above < 1.02 * p.workspace_bytes + (64 << 10)  # with AVX-512 oneDNN has scratch
    assert p.workspace_bytes < m * n * 4 / 2


def test_fake_outputs_are_as_real(device):
    """Shapes and dtypes under FakeTensorMode for 16-bit operands, whose statistics are float32."""
    x, w = (torch.randn(k, 4, dtype=torch.bfloat16, device=device, requires_grad=True) for k in (6, 9))
    target = torch.randint(9, (6,), device=device)
    real = linear_cross_entropy(x, w, target, reduction="none")
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = linear_cross_entropy(
            mode.from_tensor(x), mode.from_tensor(w), mode.from_tensor(target), reduction="none"
        )
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


class OnlyOn(TorchDispatchMode):
    """No tensor of another device."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in tensors} <= {self.device}, f"{function} of another device"
        return result


def meta_adds_in_float32() -> bool:
    x, total = torch.empty(2, 2, dtype=torch.bfloat16, device="meta"), torch.empty(2, 2, device="meta")
    try:
        torch.addmm(total, x, x, out_dtype=total.dtype, out=total)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("budget", [1 << 24, 1 << 20], ids=["whole rows", "slabs"])
def test_the_host_reads_nothing_of_a_gpu(budget, dtype, monkeypatch):
    """As whole graphs and CUDA graphs need it: no value is asked, nothing copied from or to the host. Shown on the meta
    device, whose tensors have no values to ask for, by the operators' own code in place of their fake kernels."""
    if dtype == torch.bfloat16 and not meta_adds_in_float32():
        pytest.skip("this torch's addmm cannot take out_dtype on the meta device, as 2.11")
    backward = ops.nll_stats_backward
    for name in ("nll_stats", "loss_and_grads", "nll_stats_backward", "column_values", "sigmoid_loss", "lse_of_others",
                 "lse_of_others_backward"):
        monkeypatch.setattr(ops, name, torch.no_grad()(getattr(ops, name)._init_fn))
    for room in ("losses", "contrastive"):  # not known of that device
        monkeypatch.setattr(f"cosup.{room}.autocast", lambda *tensors: tensors)
    monkeypatch.setitem(ops.INVARIANT_ROWS, "meta", 256)
    sizes = ((300, 16), (1000, 16), (1000,))
    x, w, b = (torch.randn(*s, dtype=dtype, device="meta", requires_grad=True) for s in sizes)
    target, ids = (torch.zeros(n, dtype=torch.int64, device="meta") for n in (300, 1000))
    row, column = torch.rand(300, device="meta"), torch.rand(1000, device="meta")
    common = dict(workspace_bytes=budget, backend="reference")
    with OnlyOn("meta"):
        for reduction in ("mean", "none"):
            linear_cross_entropy(x, w, target, linear_bias=b, weight=column, label_smoothing=0.1, z_loss=0.1,
                                 token_weight=row, logit_scale=0.7, logit_softcap=3.0, reduction=reduction,
                                 return_stats=True, **common)  # fmt: skip
            linear_cross_entropy(x, w, target, lora=(x[:4], w[:, :4], 0.5), batch_invariant=True, reduction=reduction,
                                 **common)  # fmt: skip
            info_nce(x, w, target, candidate_ids=ids, temperature=row[0], reduction=reduction, symmetric=True,
                     hard_negatives=x[:, None], candidate_bias=column, sample_weight=row, margin=0.1,
                     return_stats=True, **common)  # fmt: skip
            info_nce(x, w, target, candidate_ids=ids, label_smoothing=0.1, reduction=reduction, **common)
            info_nce(x, w, target, false_negative_margin=0.1, reduction=reduction, **common)
            info_nce(x, w, candidate_ids=ids, query_negatives=True, candidate_negatives=True, temperature=row[0],
                     reduction=reduction, **common)  # fmt: skip
            lists = torch.zeros(301, dtype=torch.int64, device="meta"), ids[:400]
            info_nce(x, w, positives=lists, positives_pool="logsumexp", temperature=row[0], reduction=reduction,
                     candidate_bias=column, label_smoothing=0.1, return_stats=True, **common)  # fmt: skip
            sigmoid_loss(x, w, target, candidate_ids=ids, temperature=row[0], bias=row[1], sample_weight=row,
                         reduction=reduction, **common)  # fmt: skip
        linear_log_prob(x, w, target, linear_bias=b, temperature=0.7, **common)
        scale = torch.ones((), device="meta")
        upstream = dict.fromkeys(("grad_nll", "grad_lse", "grad_entropy", "grad_soft", "grad_column"), row)
        known = dict(entropy=row, top=row, total=row, col_top=column, col_total=column, pair_logit=row[:0])
        grads = ops.nll_stats_backward(*arguments(
            backward, **upstream, **known, x=x, w=w, target=target, scale=scale, bias=column, soft=column,
            ignore_index=-100, symmetric=True, need=need("x", "w", "bias"), **common))  # fmt: skip
        assert ops.lse_of_others_backward(row, row, row, x, scale, ids[:300], budget, "reference").shape == x.shape
    assert [g.shape for g in grads[:3]] == [x.shape, w.shape, b.shape]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("block_rows, rows, columns", [(40, torch.float32, torch.bfloat16), (24, *2 * [torch.float32])])
def test_few_sums_of_16_bits_are_made_in_float32(reduction, block_rows, rows, columns, monkeypatch):
    """A GPU's library splits long sums of few numbers, and joins them in the dtype of what it writes. The numbers of
    w are not few here, but in several blocks of rows they are sums of several parts. All of it is counted."""
    monkeypatch.setattr("cosup.walk.FEW", {"cpu": 40 * 16})
    totals, real = [], gemm.add
    monkeypatch.setattr(gemm, "add", lambda total, *a, **k: totals.append(total) or real(total, *a, **k))
    watch(monkeypatch, block_rows=block_rows)
    x, w = (torch.randn(n, 16).bfloat16().requires_grad_() for n in (40, 50))
    loss = linear_cross_entropy(x, w, torch.randint(50, (40,)), reduction=reduction, backend="reference")
    loss.sum().backward()
    kinds = {(len(t), t.dtype) for t in totals}
    assert kinds == {(n, rows) for n in {block_rows, 40 - 40 // block_rows * block_rows or 40}} | {(50, columns)}
    c, bare = (cost(x, "reference", gathered=False)._replace(few=few) for few in (40 * 16, 0))
    apart = 4 * 16 * (block_rows if rows == torch.float32 else 0)
    assert used(40, 50, block_rows, 50, c, True) == used(40, 50, block_rows, 50, bare, True) + apart


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_rows_give_no_gradient_where_sums_are_apart(reduction, monkeypatch):
    """The room of the sums holds whatever stood there before."""
    monkeypatch.setattr("cosup.walk.FEW", {"cpu": 1 << 23})
    monkeypatch.setattr(torch, "empty", lambda *size, **k: torch.full(size, float("nan"), **k))
    x, w = torch.zeros(0, 16).bfloat16().requires_grad_(), torch.randn(50, 16).bfloat16().requires_grad_()
    linear_cross_entropy(x, w, torch.zeros(0, dtype=torch.int64), reduction=reduction).sum().backward()
    assert x.grad.shape == (0, 16) and (w.grad == 0).all()


SLABS = {"strategy": Strategy.RECOMPUTE, "block_rows": 24, "block_cols": 80, "strip_cols": 80}


def watch(monkeypatch, **fields):
    """The plans that are made from here on, with these fields."""
    plans, real = [], ops.plan

    def plan(*arguments, **options):
        plans.append(real(*arguments, **options)._replace(**fields))
        return plans[-1]

    monkeypatch.setattr(ops, "plan", plan)
    return plans


@pytest.mark.parametrize("kind, rows", [("flat", "blocks"), ("right", "one block"), ("right", "blocks"),
                                        ("wrong", "one block"), ("symmetric", "one block"), ("smoothed", "blocks"),
                                        ("right", "slabs"), ("wrong", "slabs"), ("symmetric", "slabs")])
def test_rounded_tiles_are_as_exact_as_plain(kind, rows, device, monkeypatch):
    """16-bit tiles, against float64: never twice plain's error, whose logits are rounded too. Where rows are right, and
    so the target's logit decides, far less in the loss and less in the gradients."""
    n, m, d = 64, 200, 64
    x, w = torch.randn(n, d, device=device), torch.randn(m, d, device=device)
    target = torch.randperm(m, device=device)[:n]
    if kind in ("right", "wrong"):
        near = target if kind == "right" else torch.randint(m, (n,), device=device)
        x = x / 8 + torch.linspace(0, 0.3, n, device=device)[:, None] * w[near]
    x, w = x.half(), w.half()
    weight, one = torch.ones(n, device=device), torch.ones((), device=device)
    if kind != "symmetric":
        target[5], weight[5] = -100, 0
    soft = torch.rand(m, device=device) if kind == "smoothed" else None
    share = 0.1 * weight / m if kind == "smoothed" else None
    of_columns = weight / 2 if kind == "symmetric" else None

    def plain(x, w):
        z = (x @ w.mT).to(torch.promote_types(x.dtype, torch.float32))
        loss = torch.nn.functional.cross_entropy(z, target, reduction="sum")
        if kind == "smoothed":
            loss = loss - (share[:, None] * soft * z).sum()
        if kind == "symmetric":
            loss = loss + ((z.logsumexp(0)[target] - z.gather(1, target[:, None])[:, 0]) * of_columns).sum()
        return loss

    planned = watch(monkeypatch, **{"one block": {}, "blocks": {"block_rows": 24}, "slabs": SLABS}[rows])
    p = [t.clone().requires_grad_() for t in (x, w)]
    # invariant: ignored rows stay in their place on a CPU too
    found = ops.loss_and_grads(*arguments(
        ops.loss_and_grads, x=p[0], w=p[1], target=target, b=weight, e=share, v=of_columns, scale=one, soft=soft,
        ignore_index=-100, rank=False, need=need("x", "w"), backend=NARROW, invariant=True))  # fmt: skip
    ours = [found[0].detach(), *torch.autograd.grad(found[0], p)]
    p = [t.double().requires_grad_() for t in (x, w)]
    loss = plain(*p)
    true = [loss.detach(), *torch.autograd.grad(loss, p)]
    p = [t.clone().requires_grad_() for t in (x, w)]
    loss = plain(*p)
    theirs = [loss.detach(), *torch.autograd.grad(loss, p)]
    assert planned[-1].strategy is (Strategy.RECOMPUTE if rows == "slabs" else Strategy.GRADS_IN_FORWARD)
    mine, plains = ([(a.double() - t).norm() for a, t in zip(of, true, strict=True)] for of in (ours, theirs))
    assert all(a <= 2 * b + 1e-6 * t.norm() for a, b, t in zip(mine, plains, true, strict=True))
    if kind == "right":
        assert mine[0] < plains[0] / 2 and mine[2] < 0.9 * plains[2]
        assert mine[1] < 0.9 * plains[1] or (rows == "slabs" and device == "cpu")  # which rounds each slab's product


@pytest.mark.parametrize("reduction, symmetric", [("mean", False), ("none", False), ("mean", True)])
def test_two_sweeps_have_the_same_logits(reduction, symmetric, monkeypatch, device):
    """Products of other shapes may round otherwise, and a statistic of them would not be that of the second sweep's."""
    monkeypatch.setattr(gemm, "ONEDNN", gemm.has_onednn())  # else blocks are as wide with gradients as without
    found, real = [], gemm.dots
    monkeypatch.setattr(gemm, "dots", lambda a, b, out, **k: found.append((real(a, b, out, **k), out.clone())[1]))
    q, k = (torch.randn(n, 16, device=device, requires_grad=True) for n in (300, 2000))
    loss, _ = info_nce(q, k, workspace_bytes=300_000, reduction=reduction, symmetric=symmetric, return_stats=True)
    loss.sum().backward()
    half = len(found) // 2
    assert half > 2 and len(found) == 2 * half  # for statistics alone blocks would be wider, and fewer
    assert all(torch.equal(one, other) for one, other in zip(found[:half], found[half:], strict=True))
