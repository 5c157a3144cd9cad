"""The losses against float64: our error is at most twice what plain PyTorch makes in the same dtype."""

import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import cosup
from cosup import co_supervision_loss, gemm, info_nce, linear_cross_entropy
from cosup.checks import as_integer
from cosup.kernels import native
from cosup.plan import used
from cosup.walk import cost, resolve
from oracles import BACKENDS, DTYPES, bytes_for, check, cross_entropy

pytestmark = pytest.mark.usefixtures("narrow_slabs")
SHAPES = [(1, 1, 2), (65, 33, 130), (130, 7, 301)]  # N, D, M: one row; ragged; more rows than features
HAS_GPU = torch.cuda.is_available()
STRATEGIES, REDUCTIONS = ["one block", "row blocks", "slabs"], ["mean", "sum", "none"]
# All of every shape, strategy and reduction on every backend; but in the interpreter, which takes its time, one shape,
# and each strategy and each reduction once.
CASES = [
    (backend, shape, strategy, reduction)
    for backend, shape, strategy, reduction in itertools.product(BACKENDS, SHAPES, STRATEGIES, REDUCTIONS)
    if backend != "triton" or HAS_GPU
    or (shape == SHAPES[1] and STRATEGIES.index(strategy) == REDUCTIONS.index(reduction))
]  # fmt: skip


@pytest.mark.parametrize("backend, shape, strategy, reduction", CASES, ids=str)
def test_linear_cross_entropy_error(shape, reduction, strategy, backend, device):
    n, d, m = shape
    x, w, b = torch.randn(n, d, device=device), torch.randn(m, d, device=device), torch.randn(m, device=device)
    target = torch.randint(m, (n,), device=device)
    w[target[: n // 2]] = x[: n // 2]  # half of the rows know their answer, so that gradients are not all alike
    target[1::3] = -100
    check(
        lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, backend=backend,
                                             workspace_bytes=bytes_for(strategy, x, m, backend, len(target[1::3]))),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, reduction=reduction), (x, w, b),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sixteen_bit_error(shape, reduction, strategy, dtype, device):
    n, d, m = shape
    x, w, b = (torch.randn(*size, device=device).mul(0.5).to(dtype) for size in ((n, d), (m, d), (m,)))
    target = torch.randint(m, (n,), device=device)
    target[1::3] = -100
    backend = "native" if device == "cpu" and native.AVAILABLE else "auto"
    check(
        lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction,
                                             workspace_bytes=bytes_for(strategy, x, m, backend, len(target[1::3]))),
        lambda x, w, b: F.cross_entropy(F.linear(x, w, b), target, reduction=reduction), (x, w, b),
    )  # fmt: skip
    temperature = torch.tensor(0.3, device=device)
    target = target.clamp(min=0)
    check(
        lambda x, w, t: info_nce(x, w, target, temperature=t, reduction=reduction,
                                 workspace_bytes=bytes_for(strategy, x, m, backend)),
        lambda x, w, t: F.cross_entropy(F.normalize(x) @ F.normalize(w).mT / t, target, reduction=reduction),
        (x, w, temperature),
    )  # fmt: skip


@pytest.mark.skipif(not gemm.has_onednn(), reason="there is but one product here")
def test_error_of_the_product_that_another_processor_takes(monkeypatch):
    monkeypatch.setattr(gemm, "ONEDNN", not gemm.ONEDNN)
    for strategy in STRATEGIES:
        test_linear_cross_entropy_error(SHAPES[2], "mean", strategy, "auto", "cpu")


def test_table_gradient_over_many_blocks_is_summed_in_float32():
    """Of 512 like partial sums in bfloat16 the later ones would be lost; plain PyTorch makes one sum."""
    x, w = torch.rand(32768, 4).bfloat16(), 0.1 * torch.randn(32, 4).bfloat16()
    budget = used(32768, 32, 64, 32, cost(x, "native" if native.AVAILABLE else "reference", gathered=True), True)
    target = torch.randint(16, (32768,))  # half of the columns gain from every row, half lose
    check(lambda x, w: linear_cross_entropy(x, w, target, workspace_bytes=budget),
          lambda x, w: F.cross_entropy(x @ w.mT, target), (x, w))  # fmt: skip


def test_gradient_of_rows_over_many_strips_is_summed_in_float32():
    """As above, over 2,048 strips of columns; the target's share is left small, so that their sum is what counts."""
    x, w = 0.1 * torch.randn(32, 4).bfloat16(), torch.rand(32768, 4).bfloat16()
    w[:32] = 0
    target = torch.arange(32)
    check(lambda x, w: linear_cross_entropy(x, w, target), lambda x, w: F.cross_entropy(x @ w.mT, target), (x, w))


GENERATOR = torch.Generator().manual_seed(0)
FEATURES = {
    "plain": {},
    "class weight": {"weight": torch.rand(130, generator=GENERATOR) + 0.1},
    "label smoothing": {"label_smoothing": 0.2},
    "z-loss": {"z_loss": 0.05},
    "scale": {"logit_scale": 0.7},
    "softcap": {"logit_softcap": 2.5},
    "token weight": {"token_weight": torch.rand(5, 13, generator=GENERATOR)},
    "shift": {"shift": 2},
}
FEATURES["all"] = {name: value for options in FEATURES.values() for name, value in options.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("feature", FEATURES)
def test_error_of_every_feature(feature, reduction, strategy, dtype, device):
    backend = resolve("auto", torch.empty(0, dtype=dtype, device=device))
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in FEATURES[feature].items()}
    x, w, b = (torch.randn(*size, device=device).to(dtype) for size in ((5, 13, 33), (130, 33), (130,)))
    target = torch.randint(130, (5, 13), device=device)
    target[:, 1::4] = -100
    budget = bytes_for(strategy, x.flatten(0, 1), 130, backend, int((target == -100).sum()) + 7)
    check(lambda x, w, b: linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, workspace_bytes=budget,
                                               **options),
          lambda x, w, b: cross_entropy(x, w, b, target, reduction=reduction, **options), (x, w, b))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES[1:] if HAS_GPU else [torch.float16], ids=str)
@pytest.mark.parametrize("budget", [1 << 20, 20_000], ids=["whole rows", "slabs"])
@pytest.mark.parametrize("feature", [*FEATURES, "ids"])
def test_fused_statistics(feature, budget, dtype, device):
    """Loss and statistics where no gradient is asked, ranks too: products are never rounded to 16 bits."""
    x, w, b = (torch.randn(*size, device=device).to(dtype) for size in ((5, 13, 24), (2600, 24), (2600,)))
    target, ids = torch.randint(2600, (5, 13), device=device), torch.randint(900, (2600,), device=device)

    def run(x, w, b, backend):
        common = dict(reduction="none", return_stats=True, workspace_bytes=budget, backend=backend)
        if feature == "ids":
            return info_nce(x[0], w, target[0], temperature=0.3, normalize=False, candidate_ids=ids, **common)
        options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in FEATURES[feature].items()}
        if "weight" in options:
            options["weight"] = options["weight"].repeat(20)
        ignored = target.masked_fill(target % 4 == 1, -100)
        return linear_cross_entropy(x, w, ignored, linear_bias=b, **common, **options)

    (loss, stats), (exact_loss, exact) = run(x, w, b, "fused"), run(x.double(), w.double(), b.double(), "auto")
    for ours, truth in zip((loss, *stats), (exact_loss, *exact), strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("softcap", [None, 2.5])
def test_log_prob_and_entropy_have_gradients(softcap, strategy, dtype, device):
    backend = "native" if device == "cpu" and native.AVAILABLE else "auto"
    x, w, b = (torch.randn(*size, device=device).to(dtype) for size in ((65, 33), (130, 33), (130,)))
    target = torch.randint(130, (65,), device=device)
    target[1::4] = -100
    keep = target != -100

    def plain(x, w, b):
        z = F.linear(x, w, b)
        z = (softcap * torch.tanh(z / softcap) if softcap else z) / 0.7
        log_p = z.log_softmax(1)
        own = log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
        return torch.stack([own, -(log_p.exp() * log_p).sum(1), z.logsumexp(1)]) * keep

    def ours(x, w, b):
        budget = bytes_for(strategy, x, 130, backend, int((~keep).sum()))
        stats = cosup.linear_log_prob(x, w, target, linear_bias=b, temperature=0.7, logit_softcap=softcap,
                                      workspace_bytes=budget)  # fmt: skip
        return torch.stack([stats.log_prob, stats.entropy, stats.lse])

    check(ours, plain, (x, w, b))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen base", "trained base"])
def test_error_of_an_adapted_head(frozen, reduction, strategy, dtype, device):
    backend = "native" if device == "cpu" and native.AVAILABLE else "auto"
    sizes = ((65, 33), (4, 33), (130, 4), (130, 33))
    x, a, b, w = (torch.randn(*size, device=device).to(dtype) for size in sizes)
    target = torch.randint(130, (65,), device=device)
    target[1::4] = -100
    budget = bytes_for(strategy, torch.empty(65, 37, dtype=dtype, device=device), 130, backend, len(target[1::4]))

    def base(rest, like):
        return w.to(like.dtype) if frozen else rest[0]

    check(lambda x, a, b, *rest: linear_cross_entropy(x, base(rest, x), target, lora=(a, b, 0.3), logit_scale=0.7,
                                                      reduction=reduction, workspace_bytes=budget),
          lambda x, a, b, *rest: F.cross_entropy(0.7 * (x @ base(rest, x).mT + 0.3 * (x @ a.mT) @ b.mT), target,
                                                 reduction=reduction),
          (x, a, b) if frozen else (x, a, b, w))  # fmt: skip


def test_an_adapter_by_its_hidden_state():
    """The same as by its matrices; what it holds at ignored rows is nobody's."""
    x, a, b, w = (torch.randn(*size, requires_grad=True) for size in ((3, 7, 33), (4, 33), (130, 4), (130, 33)))
    target = torch.randint(130, (3, 7))
    target[1] = -100
    ignored = (target == -100)[..., None]
    results = []
    for lora in ((a, b, 0.3), (torch.where(ignored, torch.nan, 0.3 * (x @ a.mT)), b)):
        loss = linear_cross_entropy(x, w, target, lora=lora)
        results.append((loss, *torch.autograd.grad(loss, (x, a, b, w))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batch_invariant_rows(dtype, device, monkeypatch):
    """A row's statistics and gradient have the same bits alone, in any batch, at any place, with neighbours ignored."""
    monkeypatch.setattr("cosup.walk.STRIP", 1 << 14)  # else large batches would take other strips than small ones
    x, w = (torch.randn(k, 96, device=device).to(dtype) for k in (300, 777))
    target = torch.randint(777, (300,), device=device)

    def rows(pick, target, **options):
        part = x[pick].requires_grad_()
        stats = cosup.linear_log_prob(part, w, target[pick], batch_invariant=True, **options)
        (dx,) = torch.autograd.grad(stats.log_prob.sum() + stats.entropy.sum(), part)
        loss = linear_cross_entropy(part, w, target[pick], reduction="sum", batch_invariant=True, **options)
        return *stats, dx, *torch.autograd.grad(loss, part)

    whole = rows(torch.arange(300), target)
    for pick in (torch.arange(1), torch.arange(7, 9), torch.randperm(300)[:65], torch.randperm(300)):
        for ours, all_rows in zip(rows(pick, target), whole, strict=True):
            assert torch.equal(ours, all_rows[pick])
    ignored = target.clone()
    ignored[::2] = -100
    for ours, all_rows in zip(rows(torch.arange(300), ignored), whole, strict=True):
        assert torch.equal(ours[1::2], all_rows[1::2]) and not ours[::2].any()
    torch.testing.assert_close(whole[0], cosup.linear_log_prob(x, w, target).nll)


def test_entropy_keeps_its_digits_at_huge_logits():
    """Two equal columns far above the rest: the entropy is log 2, whatever their logit."""
    x, w = torch.full((3, 1), 1e4), torch.tensor([[1.0], [1.0], [0.0]])
    entropy = cosup.linear_log_prob(x, w, torch.zeros(3, dtype=torch.int64)).entropy
    torch.testing.assert_close(entropy, torch.full((3,), 2.0).log())


def test_class_weight_of_an_absent_class_may_be_infinite():
    x, w, target, weight = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([1, 2, -100, 3]), torch.ones(5)
    weight[0] = float("inf")
    plain = F.cross_entropy(x @ w.mT, target, weight)
    torch.testing.assert_close(linear_cross_entropy(x, w, target, weight=weight), plain)


@pytest.mark.parametrize("backend", [*BACKENDS])
def test_a_class_left_out_by_its_bias(backend, device):
    """With label smoothing its share of the loss is infinite, as in PyTorch; the gradients are finite."""
    x, w = torch.randn(4, 3, device=device), torch.randn(5, 3, device=device)
    bias = torch.tensor([0.1, 0.2, 0.3, 0.4, float("-inf")], device=device)
    target = torch.tensor([1, 2, 0, 3], device=device)
    for smoothing in (0.0, 0.2):
        results = []
        for ours in (True, False):
            tensors = a, b, c = [t.clone().requires_grad_() for t in (x, w, bias)]
            if ours:
                value = linear_cross_entropy(a, b, target, linear_bias=c, label_smoothing=smoothing, backend=backend)
            else:
                value = F.cross_entropy(F.linear(a, b, c), target, label_smoothing=smoothing)
            results.append((value, *torch.autograd.grad(value, tensors)))
        torch.testing.assert_close(*results)


def test_rows_without_their_own_column_have_a_gradient():
    """Smoothing of 1 and a z-loss that cancels the softmax: only the soft targets' term is left."""
    bias = torch.tensor([-0.5], requires_grad=True)
    loss = linear_cross_entropy(torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0]), linear_bias=bias,
                                label_smoothing=1.0, z_loss=1.0)  # fmt: skip
    assert torch.autograd.grad(loss, bias)[0].item() == -1


def test_overlapping_rows_of_the_head():
    for step in (1, 2, 3, 4, 5):
        x, w = torch.randn(8, 4), torch.randn(40).unfold(0, 4, step)[:6]
        target = torch.arange(8) % 5
        torch.testing.assert_close(linear_cross_entropy(x, w, target), F.cross_entropy(x @ w.mT, target))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_budget_is_refused_before_the_backward_pass(dtype):
    x, w = torch.randn(70, 16).to(dtype).requires_grad_(), torch.randn(300, 16).to(dtype)
    target = torch.randint(300, (70,))
    for reduction in ("none", "mean"):
        with pytest.raises(ValueError, match="workspace_bytes must be at least") as refused:
            linear_cross_entropy(x, w, target, reduction=reduction, workspace_bytes=1)
        least = int(str(refused.value).split("at least ")[1].split()[0])
        linear_cross_entropy(x, w, target, reduction=reduction, workspace_bytes=least).sum().backward()


def test_token_weight_gets_its_gradient():
    x, w, tw = torch.randn(6, 4), torch.randn(9, 4), torch.rand(6, requires_grad=True)
    target = torch.tensor([0, 1, -100, 3, 4, 5])
    options = {"label_smoothing": 0.1, "z_loss": 0.1}
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(x.requires_grad_(), w, target, token_weight=tw, reduction=reduction, **options)
        rows = linear_cross_entropy(x, w, target, reduction="none", **options) * tw
        plain = rows.sum() / (tw * (target != -100)).sum() if reduction == "mean" else rows.sum()
        torch.testing.assert_close(torch.autograd.grad(loss, tw), torch.autograd.grad(plain, tw))


@pytest.mark.parametrize("backend, shape, strategy, reduction", CASES, ids=str)
def test_info_nce_error(shape, reduction, strategy, backend, device):
    """With a learned temperature, a rectangular pool, explicit targets and ids that mask copies of the positive."""
    (n, d, m), normalize = shape, reduction != "sum"
    x, w = torch.randn(n, d, device=device), torch.randn(m, d, device=device)
    temperature = torch.tensor(0.3, device=device)
    target, ids = torch.randint(m, (n,), device=device), torch.randint(-(-m // 2), (m,), device=device)

    def plain(x, w, temperature):
        if normalize:
            x, w = F.normalize(x), F.normalize(w)
        same = (ids == ids[target][:, None]) & (torch.arange(m, device=device) != target[:, None])
        z = (x @ w.mT / temperature).masked_fill(same, float("-inf"))
        return F.cross_entropy(z, target, reduction=reduction)

    check(lambda x, w, t: info_nce(x, w, target, temperature=t, normalize=normalize, candidate_ids=ids, backend=backend,
                                   reduction=reduction, workspace_bytes=bytes_for(strategy, x, m, backend)),
          plain, (x, w, temperature))  # fmt: skip


@pytest.mark.parametrize("strategy", ["row blocks", "slabs"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_come_from_the_same_pass(strategy, backend, device):
    x, w = torch.randn(70, 9, device=device), torch.randn(200, 9, device=device)
    target = torch.randint(200, (70,), device=device)
    w[target[:20]] = 3 * x[:20]
    target[3::5] = -100
    loss, stats = linear_cross_entropy(x, w, target, return_stats=True, backend=backend,
                                       workspace_bytes=bytes_for(strategy, x, 200, backend))  # fmt: skip
    z = (x @ w.mT).double()
    keep, log_p = target != -100, z.log_softmax(1)
    own = z.gather(1, target.clamp(min=0)[:, None])
    torch.testing.assert_close(loss, stats.nll[keep].mean())
    for got, want in [(stats.lse, z.logsumexp(1)), (stats.entropy, -(log_p.exp() * log_p).sum(1)),
                      (stats.log_prob, log_p.gather(1, target.clamp(min=0)[:, None]).squeeze(1))]:  # fmt: skip
        torch.testing.assert_close(got.double(), want * keep, rtol=1e-5, atol=2e-5)
    assert torch.equal(stats.rank, ((z > own).sum(1) + 1) * keep)
    assert torch.equal(stats.top1, (z.argmax(1) == target) & keep) and stats.top1.any() and not stats.top1.all()
    assert not any(field.requires_grad for field in stats)


@settings(deadline=None)
@given(
    n=st.integers(0, 70), d=st.integers(0, 9), m=st.integers(1, 140),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    layout=st.integers(0, 3), subset=st.integers(1, 7), ignored=st.sampled_from([0.0, 0.5, 1.0]), slabs=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]), z_loss=st.sampled_from([0.0, 0.1]), weighted=st.booleans(),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_shape_stride_and_subset_of_gradients(n, d, m, reduction, layout, subset, ignored, slabs, smoothing, z_loss,
                                                  weighted, seed):  # fmt: skip
    """float64, so that a wrong index shows and rounding does not."""
    torch.manual_seed(seed)
    randn = functools.partial(torch.randn, dtype=torch.float64)
    make = [
        lambda *s: randn(*s),
        lambda *s: randn(*s[::-1]).mT,
        lambda *s: randn(s[0], 2 * s[1])[:, ::2],
        lambda *s: randn(s[0], 1).expand(*s),
    ][layout]
    tensors = [make(n, d), make(m, d), randn(m)]
    for i, t in enumerate(tensors):
        tensors[i] = t.detach().requires_grad_(bool(subset >> i & 1))
    x, w, b = tensors
    before = [t.detach().clone() for t in tensors]
    target = torch.randint(m, (n,)).masked_fill_(torch.rand(n) < ignored, -100)
    budget = bytes_for("slabs", x, m, "reference") if slabs else None
    weight = torch.rand(m).double() + 0.1 if weighted else None
    ours = linear_cross_entropy(x, w, target, linear_bias=b, reduction=reduction, workspace_bytes=budget, weight=weight,
                                label_smoothing=smoothing, z_loss=z_loss)  # fmt: skip
    z = F.linear(x, w, b)
    plain = F.cross_entropy(z, target, weight, reduction=reduction, label_smoothing=smoothing)
    keep = target != -100
    penalty = z_loss * z.logsumexp(1) ** 2 * keep
    divisor = 1 if weight is None else weight[target.clamp(min=0)]
    plain = plain + (penalty if reduction == "none" else penalty.sum())
    if reduction == "mean":
        plain = plain - penalty.sum() + penalty.sum() / (divisor * keep).sum()
        plain = plain.nan_to_num() if not keep.any() else plain
    torch.testing.assert_close(ours, plain)
    wanted = [t for t in tensors if t.requires_grad]
    if not (target != -100).any():
        got = torch.autograd.grad(ours.sum(), wanted)
        assert all((g == 0).all() for g in got)
    else:
        up = torch.randn_like(ours)
        torch.testing.assert_close(torch.autograd.grad(ours, wanted, up), torch.autograd.grad(plain, wanted, up))
    assert all(torch.equal(t, s) for t, s in zip(tensors, before, strict=True))


def test_only_the_gradients_asked_are_computed(monkeypatch):
    """A frozen table costs no GEMM for its gradient: 2 products per tile, not 3."""
    products = []
    monkeypatch.setattr(gemm, "add", lambda *a, real=gemm.add, **k: products.append(1) or real(*a, **k))
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(9, 4)
    info_nce(x, w, normalize=False).backward()
    assert len(products) == 1
    linear_cross_entropy(x.detach(), w, torch.zeros(8, dtype=torch.int64))
    assert len(products) == 1
    low_rank = torch.randn(2, 4, requires_grad=True), torch.randn(9, 2, requires_grad=True), 1.0
    linear_cross_entropy(x.detach(), w, torch.zeros(8, dtype=torch.int64), lora=low_rank)
    assert len(products) == 1 + 3  # the low-rank part of the tile, and its two gradients


def test_a_nan_row_keeps_to_itself():
    x, w, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    clean = linear_cross_entropy(x, w, target, reduction="none")
    x[2], x[4] = float("nan"), float("inf")
    loss, stats = linear_cross_entropy(x, w, target, reduction="none", return_stats=True)
    assert not stats.top1[[2, 4]].any() and (stats.rank[[2, 4]] == 9).all()  # a run that diverged retrieves nothing
    assert loss.isnan().tolist() == [False, False, True, False, True, False]
    assert torch.equal(loss[[0, 1, 3, 5]], clean[[0, 1, 3, 5]])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_may_hold_anything(backend, device):
    x, w, target = (
        torch.randn(6, 4, device=device),
        torch.randn(9, 4, device=device),
        torch.randint(9, (6,), device=device),
    )
    target[2] = -100
    results = []
    for filler in (0.0, float("nan")):
        x[2] = filler
        a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
        loss = linear_cross_entropy(a, b, target, backend=backend)
        results.append((loss, *torch.autograd.grad(loss, (a, b))))
    torch.testing.assert_close(*results)
    assert (results[1][1][2] == 0).all()


def test_nothing_to_learn_is_zero_and_connected():
    x, w = torch.randn(5, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    for rows, target in ((x, torch.full((5,), -100)), (x[:0], torch.empty(0, dtype=torch.int64))):
        loss = linear_cross_entropy(rows, w, target)
        assert loss == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))
    loss = info_nce(x[:0], w)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, (x, w)))
    loss = co_supervision_loss(torch.randn(2, 3, 4, requires_grad=True), w, torch.full((2, 3), -100), x[:0], x[:0]).loss
    assert loss == 0 and loss.requires_grad


def test_zero_vectors_and_small_temperature_are_finite():
    x = torch.randn(6, 8).to(torch.bfloat16)
    x[0] = 0
    x.requires_grad_()
    loss = info_nce(x, x.detach().clone(), temperature=0.01)
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()


def test_second_backward_works_or_raises():
    x, w, target = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True), torch.randint(9, (6,))
    loss = linear_cross_entropy(x, w, target)
    first = torch.autograd.grad(3 * loss, (x, w), retain_graph=True)
    kept = [g.clone() for g in first]
    torch.testing.assert_close(torch.autograd.grad(3 * loss, (x, w), retain_graph=True), tuple(kept))
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), tuple(g / 3 for g in kept))
    torch.testing.assert_close(first, tuple(kept))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, (x, w))


def test_other_modes_of_differentiation_are_refused():
    x, w, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))

    def loss(x):
        return linear_cross_entropy(x, w, target)

    for transform in (torch.func.grad(loss), lambda x: torch.func.vmap(loss)(x[None])):
        with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
            transform(x)
    with pytest.raises(RuntimeError, match="reverse-mode gradients only"):
        torch.func.jvp(loss, (x,), (x,))


def test_float16_sums_over_many_rows_do_not_overflow():
    """An outlier feature of 60 in 4096 rows sums to above 65504; its mean does not."""
    x, w = torch.randn(4096, 8), 0.02 * torch.randn(20, 8)
    x[:, 0] += 60
    x, w = x.half(), w.half().requires_grad_()
    assert torch.autograd.grad(linear_cross_entropy(x, w, torch.zeros(4096, dtype=torch.int64)), w)[0].isfinite().all()


def test_rank_of_a_duplicate_does_not_depend_on_the_slabs():
    query = F.normalize(torch.randn(64, 384))
    pool = torch.cat([query, F.normalize(torch.randn(500, 384)), query])
    target = torch.arange(64) + 564
    for dtype in (torch.float32, torch.bfloat16):
        x, w = query.to(dtype), pool.to(dtype)
        budget = used(64, 628, 64, 208, cost(x, "native" if native.AVAILABLE else "reference", gathered=False), False)
        stats = info_nce(x, w, target, normalize=False, return_stats=True, workspace_bytes=budget)[1]
        assert stats.top1.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_top1_hardly_depends_on_the_slabs(dtype):
    """The second best column: a 16-bit logit may tie with the best, but no more often than in one piece."""
    x, w = (2 * torch.randn(256, 64)).to(dtype), (torch.randn(4000, 64) / 2).to(dtype)
    target = (x.double() @ w.double().mT).argsort(1, descending=True)[:, 1]
    hits = [linear_cross_entropy(x, w, target, return_stats=True, workspace_bytes=budget)[1].top1.float().mean()
            for budget in (None, 120_000)]  # fmt: skip
    assert abs(hits[0] - hits[1]) < 0.01


def test_one_row_of_a_strided_target():
    x, w = torch.randn(1, 1, 4), torch.randn(9, 4)
    assert linear_cross_entropy(x, w, torch.randint(9, (1, 4))[:, ::4]).isfinite()


@pytest.mark.parametrize("mode", ["joint", "ntp", "nsp"])
def test_a_dropped_term_keeps_its_graph(mode):
    hidden, w, b, passages = (torch.randn(*s, requires_grad=True) for s in ((2, 3, 4), (9, 4), (9,), (5, 4)))
    temperature = torch.tensor(0.1, requires_grad=True)
    inputs = (hidden, w, b, passages, temperature)
    labels, query = torch.ones(2, 3, dtype=torch.int64), hidden[:, 0][:0]
    options = dict(linear_bias=b, mode=mode, temperature=temperature)
    loss = co_supervision_loss(hidden, w, labels, query, passages, **options).loss
    assert all(g is not None for g in torch.autograd.grad(loss, inputs, allow_unused=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    loss = linear_cross_entropy(x, w, torch.randint(9, (6,)), reduction=reduction).sum()
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss, (x, w), create_graph=True)


def test_autocast_is_honoured():
    x, w = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.randint(9, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, w, target)
    assert torch.equal(loss, linear_cross_entropy(x.bfloat16(), w.bfloat16(), target))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (x, w)))


def test_co_supervision_is_the_sum_of_its_parts():
    hidden, w, labels = torch.randn(2, 5, 4, requires_grad=True), torch.randn(9, 4), torch.randint(9, (2, 5))
    labels[0, 2] = -100
    query, passages, ids = hidden[:, 2], torch.randn(3, 4), torch.tensor([1, 2, 1])
    ntp = F.cross_entropy((hidden[:, :-1] @ w.mT).flatten(0, 1), labels[:, 1:].flatten())
    nsp = info_nce(query, passages, candidate_ids=ids)
    both = co_supervision_loss(hidden, w, labels, query, passages, candidate_ids=ids, nsp_weight=0.3)
    torch.testing.assert_close(both.loss, ntp + 0.3 * nsp)
    assert (both.ntp_count, both.nsp_count) == (7, 2)
    for mode, want in (("ntp", ntp), ("nsp", 0.3 * nsp)):
        one = co_supervision_loss(hidden, w, labels, query, passages, candidate_ids=ids, nsp_weight=0.3, mode=mode)
        torch.testing.assert_close(one.loss, want)
    parts = co_supervision_loss(hidden, w, labels, query, passages, ntp_normalizer=14, nsp_normalizer=4)
    torch.testing.assert_close(parts.ntp_loss, ntp / 2)
    for count in (0.5, torch.tensor(0.5)):  # any number divides
        parts = co_supervision_loss(hidden, w, labels, query, passages, ntp_normalizer=count, nsp_normalizer=count)
        want = (14 * ntp, 4 * info_nce(query, passages))
        torch.testing.assert_close((parts.ntp_loss, parts.nsp_loss), want)
    learned = torch.tensor(0.0, requires_grad=True)
    both = co_supervision_loss(hidden, w, labels, query, passages, nsp_weight=learned)
    torch.testing.assert_close(torch.autograd.grad(both.loss, learned)[0], both.nsp_loss.detach())


def test_modules_call_the_functions():
    x, target = torch.randn(6, 4), torch.randint(9, (6,))
    head = cosup.nn.LinearCrossEntropyLoss(4, 9, bias=True, reduction="sum")
    want = linear_cross_entropy(x, head.linear.weight, target, linear_bias=head.linear.bias, reduction="sum")
    assert torch.equal(head(x, target), want)
    contrast = cosup.nn.InfoNCELoss(0.1, learn_temperature=True)
    contrast(x, x).backward()
    assert contrast.log_temperature.grad.abs() > 0
    torch.testing.assert_close(contrast(x, x), info_nce(x, x, temperature=0.1))
    hidden, labels = torch.randn(2, 3, 4), torch.randint(9, (2, 3))
    module = cosup.nn.CoSupervisionLoss(nsp_weight=0.5)
    args = (hidden, head.linear.weight, labels, x, x)
    assert torch.equal(module(*args).loss, co_supervision_loss(*args, nsp_weight=0.5).loss)


X, W, T = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)
def test_numbers_of_any_kind(device):
    x, w, target = torch.randn(5, 3, device=device), torch.randn(7, 3, device=device), torch.arange(5, device=device)
    want = linear_cross_entropy(x, w, target, ignore_index=3)
    for index in (np.int64(3), torch.tensor(3)):
        assert torch.equal(linear_cross_entropy(x, w, target, ignore_index=index), want)
        assert type(as_integer("index", index)) is int  # as a kernel's argument must be


BAD_LINEAR = [
    (dict(input=X[:, :2]), r"input \[..., D\] and linear_weight \[M, D\], got \[4, 2\] and \[5, 3\]"),
    (dict(input=X.half()), "one floating dtype, got torch.float16 and torch.float32"),
    (dict(linear_weight=W.to("meta")), "one device, got cpu and meta"),
    (dict(target=T[:3]), r"target must be \[4\], got \[3\]"),
    (dict(target=T.int()), "target must be torch.int64, got torch.int32"),
    (dict(linear_bias=torch.zeros(4)), r"linear_bias must be \[5\], got \[4\]"),
    (dict(token_weight=T), "token_weight must be floating, got torch.int64"),
    (dict(weight=torch.ones(4)), r"weight must be \[5\], got \[4\]"),
    (dict(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
    (dict(label_smoothing=None), r"label_smoothing must be in \[0, 1\], got None"),
    (dict(z_loss=-1.0), "z_loss must be at least 0 and finite, got -1.0"),
    (dict(shift=-1), "shift must be an integer of at least 0, got -1"),
    (dict(shift=0.5), "shift must be an integer of at least 0, got 0.5"),
    (dict(input=X[0], target=T[0], shift=1), r"input must be \[..., T, D\] with a shift, got \[3\]"),
    (dict(lora=(torch.ones(2, 3), torch.ones(4, 2), 1.0)), r"lora must be \(A \[r, 3\], B \[5, r\], .*B \[4, 2\]"),
    (dict(lora=(W[:2], torch.ones(5, 2), float("nan"))), r"(?s)lora must be .* finite scaling\) .*, got .*nan\)"),
    (dict(lora=(torch.ones(3, 2), torch.ones(5, 2))), r"or \(h \[\.\.\., r\], B\), got h \[3, 2\]"),
    (dict(lora=(1, 2, 3)), r"lora must be .*, got \(1, 2, 3\)"),
    (dict(lora=5), "lora must be .*, got 5"),
    (dict(logit_scale=torch.ones(())), r"logit_scale must be a number, .*, got tensor\(1.\)"),
    (dict(workspace_bytes=1e6), "workspace_bytes must be an integer of at least 0, got 1000000.0"),
    (dict(ignore_index=None), "ignore_index must be an integer, got None"),
    (dict(ignore_index=1.5), "ignore_index must be an integer, got 1.5"),
    (dict(ignore_index=True), "ignore_index must be an integer, got True"),
    (dict(reduction="avg"), "reduction must be one of .*, got 'avg'"),
    (dict(logit_scale=0.0), "logit_scale must be a number, positive and finite .*, got 0.0"),
    (dict(logit_softcap=-1.0), "logit_softcap must be a number, positive and finite .*, got -1.0"),
    (dict(workspace_bytes=10), "workspace_bytes must be at least [0-9]+ .*, got 10"),
    (dict(backend="cuda"), "backend must be one of .*, got 'cuda'"),
]
BAD_NCE = [
    (dict(query=X[0]), r"query must be \[N, D\], got \[3\]"),
    (dict(candidates=X[:2]), "candidates must have a row for each of the 4 queries .*, got 2 rows"),
    (dict(temperature=0.0), "temperature must be a number, positive and finite .*, got 0.0"),
    (dict(temperature=1e-50), "temperature must be .* .1e-30 to 1e30., got 1e-50"),
    (dict(temperature=torch.tensor(-1.0)), "temperature must be positive and finite, got -1.0"),
    (dict(temperature=torch.tensor(0.0)), "temperature must be positive and finite, got 0.0"),
    (dict(temperature=torch.tensor(float("inf"))), "temperature must be positive and finite, got inf"),
    (dict(temperature=torch.ones(2)), r"temperature must be one number .*, got \[2\]"),
    (dict(candidate_ids=T), r"candidate_ids must be \[5\], got \[4\]"),
    (dict(query_ids=T), "query_ids without candidate_ids"),
]


@pytest.mark.parametrize("bad, message", BAD_LINEAR, ids=[next(iter(b)) for b, _ in BAD_LINEAR])
def test_linear_cross_entropy_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{"input": X, "linear_weight": W, "target": T, **bad})


@pytest.mark.parametrize("bad, message", BAD_NCE, ids=[next(iter(b)) for b, _ in BAD_NCE])
def test_info_nce_refuses(bad, message):
    with pytest.raises(ValueError, match=message):
        info_nce(**{"query": X, "candidates": W, **bad})


@pytest.mark.parametrize("value", [5, -1])
def test_a_label_out_of_range_is_named(value):
    target = torch.tensor([0, 4, value, 9])
    with pytest.raises(IndexError, match=rf"target must be in \[0, 5\), got {value} in row 2"):
        linear_cross_entropy(X, W, target)
    with pytest.raises(IndexError, match=rf"got {value} in row 2"):
        info_nce(X, W, target, candidate_ids=torch.arange(5))
