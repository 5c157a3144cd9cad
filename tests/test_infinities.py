"""0 times infinity is 0: a loss of nothing divided by 0, masked columns, rows and terms whose weight is 0."""

import math

import pytest
import torch
import torch.nn.functional as F

import cosup
from cosup.compat import cut_cross_entropy, liger
from oracles import BACKENDS, DTYPES

INF, NAN = math.inf, math.nan
N, D, M = 7, 5, 11


def head(dtype=torch.float32, device="cpu", rows=(N,)):
    x, w = (torch.randn(*size, D, device=device).to(dtype).requires_grad_() for size in (rows, (M,)))
    return x, w, torch.full(rows, -100, device=device)


def low_rank(x, w, target, **options):
    a, b = (torch.ones(size, dtype=x.dtype, device=x.device) for size in ((2, D), (M, 2)))
    return cosup.linear_cross_entropy(x, w, target, lora=(a, b, 1.0), **options)


def token_weight(x, w, target):
    return cosup.linear_cross_entropy(x, w, target, token_weight=x.float().sum(-1))


def of_liger(x, w, target, **options):
    return liger.liger_fused_linear_cross_entropy(x, w, target, **options)


def of_cce(x, w, target, **options):
    return cut_cross_entropy.linear_cross_entropy(x, w, target, **options)


LOSSES = {
    "mean": cosup.linear_cross_entropy,
    "sum": lambda *a: cosup.linear_cross_entropy(*a, reduction="sum"),
    "rows": lambda *a: cosup.linear_cross_entropy(*a, reduction="none"),
    "shifted": lambda *a: cosup.linear_cross_entropy(*a, reduction="sum", shift=1),
    "with statistics": lambda *a: cosup.linear_cross_entropy(*a, return_stats=True)[0],
    "smoothed": lambda *a: cosup.linear_cross_entropy(*a, label_smoothing=0.1, z_loss=0.1, logit_softcap=2.0),
    "class weights": lambda *a: cosup.linear_cross_entropy(*a, weight=torch.ones(M, device=a[0].device)),
    "token weights": token_weight,
    "low rank": low_rank,
    "invariant": lambda *a: cosup.linear_cross_entropy(*a, batch_invariant=True),
    "log-probabilities": lambda *a: sum(getattr(cosup.linear_log_prob(*a), f) for f in ("log_prob", "lse", "entropy")),
    "Liger": of_liger,
    "Liger, class weights": lambda *a: of_liger(*a, ce_weight=torch.ones(M, device=a[0].device), lse_square_scale=0.1),
    "Liger, scaled": lambda *a: of_liger(*a, use_token_scaling=True),
    "CCE": lambda *a: of_cce(*a, shift=1),
    "CCE with lse": lambda *a: sum(part.sum() for part in of_cce(*a, return_lse=True)),
}


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("factor", [INF, NAN])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_of_nothing_has_no_gradient_whatever_it_is_divided_by(loss, factor, dtype, device):
    x, w, target = head(dtype, device)
    value = LOSSES[loss](x, w, target)
    grads = torch.autograd.grad(value, (x, w), torch.full_like(value, factor))
    assert not any(grad.count_nonzero() for grad in grads)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_compiled_loss_of_nothing(reduction):
    def mean_of_nothing(x, w, target):
        return cosup.linear_cross_entropy(x, w, target, reduction=reduction).sum() / (target != -100).sum()

    x, w, target = head()
    loss = torch.compile(mean_of_nothing, backend="aot_eager", fullgraph=True)(x, w, target)
    assert not any(grad.count_nonzero() for grad in torch.autograd.grad(loss, (x, w)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_an_ignored_row_has_no_gradient_beside_infinite_ones(reduction, backend, device):
    """As in PyTorch, where those of the other rows and of the table are infinite or NaN."""
    x, w, target = head(device=device)
    target[3:] = torch.arange(4, device=device)
    plain = F.cross_entropy(x @ w.mT, target, reduction=reduction)
    loss = cosup.linear_cross_entropy(x, w, target, reduction=reduction, backend=backend)
    for value in (plain, loss):
        dx, dw = torch.autograd.grad(value, (x, w), torch.full_like(value, INF))
        assert not dx[:3].any() and not dx[3:].isfinite().any() and not dw.isfinite().any()


def test_pools_of_nothing():
    query, candidates = (torch.randn(n, D, requires_grad=True) for n in (N, M))
    temperature = torch.tensor(0.5, requires_grad=True)
    inputs, zeros = (query, candidates, temperature), torch.zeros(N)
    start, none = torch.zeros(N + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    options = {"temperature": temperature, "sample_weight": zeros}
    losses = [
        cosup.info_nce(query, candidates, **options),
        cosup.info_nce(query, candidates, **options, symmetric=True, reduction="none"),
        cosup.info_nce(query, candidates, **options, query_negatives=True),
        cosup.info_nce(query, candidates, temperature=temperature, positives=(start, none)),
        cosup.info_nce(query, candidates, temperature=temperature, positives=(start, none), reduction="none"),
        cosup.sigmoid_loss(query, candidates, **options, reduction="sum"),
        cosup.sigmoid_loss(query, candidates, **options, reduction="none"),
    ]
    for loss in losses:
        for factor in (INF, NAN):
            grads = torch.autograd.grad(loss, inputs, torch.full_like(loss, factor), retain_graph=True)
            assert not any(grad.count_nonzero() for grad in grads)


@pytest.mark.parametrize("mode", ["joint", "ntp", "nsp"])
def test_co_supervision_of_nothing(mode):
    x, w, labels = head(rows=(2, 4))
    query, candidates, temperature = x[0, :0], torch.randn(3, D, requires_grad=True), torch.ones((), requires_grad=True)
    out = cosup.co_supervision_loss(x, w, labels, query, candidates, torch.zeros(0, dtype=torch.int64), mode=mode,
                                    temperature=temperature, ntp_normalizer=0, nsp_normalizer=0)  # fmt: skip
    assert out.loss == 0
    grads = torch.autograd.grad(out.loss / 0, (x, w, candidates, temperature), allow_unused=True)
    assert not any(grad is not None and grad.count_nonzero() for grad in grads)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("option", [{}, {"symmetric": True}, {"margin": 0.1}, {"query_negatives": True}], ids=str)
def test_a_masked_candidate_leaves_the_temperature_its_gradient(option, reduction, dtype, device):
    """As if it were not there."""
    query, candidates = torch.randn(N, D, device=device).to(dtype), torch.randn(M, D, device=device).to(dtype)
    temperature, bias = torch.tensor(0.3, device=device, requires_grad=True), torch.zeros(M, device=device)
    bias[-3:] = -INF
    inputs = (query.requires_grad_(), candidates.requires_grad_(), temperature)
    results = []
    for kept in (slice(None), slice(M - 3)):
        loss = cosup.info_nce(query, candidates[kept], temperature=temperature, reduction=reduction,
                              candidate_bias=bias[kept], **option)  # fmt: skip
        results.append(torch.autograd.grad(loss.sum(), inputs))
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    assert results[0][2] != 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_weight_may_have_an_infinite_loss(backend, reduction, device):
    x, w, target = head(device=device)
    target[:] = torch.arange(N, device=device)
    bias, weight = torch.zeros(M, device=device), torch.ones(N, device=device)
    bias[2], weight[2], weight[4] = -INF, 0, 0
    weight.requires_grad_()
    kept = torch.arange(N, device=device) != 2
    options = {"linear_bias": bias, "reduction": reduction, "z_loss": 0.1, "backend": backend}
    loss = cosup.linear_cross_entropy(x, w, target, token_weight=weight, **options)
    want = cosup.linear_cross_entropy(x[kept], w, target[kept], token_weight=weight[kept], **options)
    assert loss.isfinite().all()
    torch.testing.assert_close(loss.sum(), want.sum())
    found, wanted = (torch.autograd.grad(value.sum(), (x, w)) for value in (loss, want))
    torch.testing.assert_close(found, wanted)
    rows = cosup.linear_cross_entropy(x, w, target, **{**options, "reduction": "none"})
    loss = cosup.linear_cross_entropy(x, w, target, token_weight=weight, **options)
    of_weights = (rows - loss) / weight.sum() if reduction == "mean" else rows  # of weights that are 0 too
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), weight)[0], of_weights)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("option", [{}, {"symmetric": True}, {"query_negatives": True}], ids=str)
def test_a_query_without_weight_may_have_a_masked_positive(option, reduction):
    query, candidates = torch.randn(N, D, requires_grad=True), torch.randn(M, D, requires_grad=True)
    temperature, bias, weight = torch.tensor(0.5, requires_grad=True), torch.zeros(M), torch.ones(N)
    bias[N - 1], weight[N - 1] = -INF, 0
    inputs = (query, candidates, temperature)
    weight.requires_grad_()
    options = {"temperature": temperature, "candidate_bias": bias, "reduction": reduction, **option}
    loss = cosup.info_nce(*inputs[:2], sample_weight=weight, **options)
    *grads, of_weights = torch.autograd.grad(loss.sum(), (*inputs, weight))
    assert loss.isfinite().all() and all(grad.isfinite().all() for grad in (*grads, of_weights[:-1]))
    if not option:
        torch.testing.assert_close(loss.sum(), cosup.info_nce(query[:-1], candidates, **options).sum())


def test_a_query_of_sigmoid_loss_without_weight_may_have_an_infinite_one():
    query, candidates, weight = torch.randn(N, D), torch.randn(M, D), torch.ones(N)
    query[2], weight[2] = INF, 0
    loss = cosup.sigmoid_loss(query, candidates, sample_weight=weight.requires_grad_(), normalize=False)
    (grad,) = torch.autograd.grad(loss, weight)
    assert loss.isfinite() and grad.isfinite().tolist() == [n != 2 for n in range(N)]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_masked_one_of_several_positives(backend):
    """Of their logsumexp it is none; where all are masked the loss is infinite, not NaN."""
    query, candidates = torch.randn(3, D, requires_grad=True), torch.randn(M, D)
    temperature, bias = torch.tensor(0.5, requires_grad=True), torch.zeros(M)
    bias[1] = -INF
    start, columns = torch.tensor([0, 2, 3, 4]), torch.tensor([0, 1, 3, 4])
    options = {"positives_pool": "logsumexp", "candidate_bias": bias, "temperature": temperature, "backend": backend}
    loss = cosup.info_nce(query, candidates, positives=(start, columns), **options)
    want = cosup.info_nce(query, candidates, positives=((start - 1).clamp(min=0), columns[[0, 2, 3]]), **options)
    assert torch.equal(loss, want)
    for found, wanted in zip(*(torch.autograd.grad(v, (query, temperature)) for v in (loss, want)), strict=True):
        torch.testing.assert_close(found, wanted)
    masked = (torch.tensor([0, 1, 2, 3]), torch.tensor([1, 3, 4]))
    rows = cosup.info_nce(query, candidates, positives=masked, reduction="none", **options)
    assert rows[0] == INF and rows[1:].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "fused"])
def test_a_class_without_weight_may_be_masked(backend, device):
    """Its logit is -inf, and its share of the smoothed target 0."""
    x, w, target = head(torch.float16 if backend == "fused" else torch.float32, device)
    target[:] = torch.arange(N, device=device)
    bias, weight = torch.zeros(M, device=device), torch.ones(M, device=device)
    bias[-2:], weight[-2:] = -INF, 0
    options = {"label_smoothing": 0.2, "backend": backend}
    with torch.no_grad():
        loss = cosup.linear_cross_entropy(x, w, target, linear_bias=bias, weight=weight, **options)
    z = (x @ w.mT).float()[:, :-2].log_softmax(1)
    want = -(0.8 * z.gather(1, target[:, None])[:, 0] + 0.2 / M * z.sum(1)).mean()
    torch.testing.assert_close(loss, want, rtol=1e-3 if backend == "fused" else 1e-5, atol=0)
    if backend != "fused":
        loss = cosup.linear_cross_entropy(x, w, target, linear_bias=bias, weight=weight, **options)
        torch.testing.assert_close(torch.autograd.grad(loss, (x, w)), torch.autograd.grad(want, (x, w)))


def test_a_term_without_weight_may_be_infinite():
    x, w, labels = head(rows=(2, 4))
    labels[:, 1:] = 1
    query, candidates = torch.randn(3, D, requires_grad=True), torch.full((3, D), INF, requires_grad=True)
    out = cosup.co_supervision_loss(x, w, labels, query, candidates, nsp_weight=0.0, normalize=False)
    assert not out.nsp_loss.isfinite() and torch.equal(out.loss, out.ntp_loss)
    assert not any(grad.count_nonzero() for grad in torch.autograd.grad(out.loss, (query, candidates)))
