"""Rows to skip, counted on the device: the others gathered, multiplied and put back as if the host had picked them."""

import inspect

import pytest
import torch

from cosup import counting, linear_cross_entropy, ops, walk
from cosup.counting import describable
from cosup.kernels.product import NARROW, ROWS_AT_ONCE, WIDE, product, tile_for
from cosup.kernels.rows import gather, look_up, order, put
from cosup.plan import Strategy, used
from operators import arguments, need


def skipped(n, share, device):
    return torch.rand(n, device=device) < share


@pytest.mark.parametrize("n", [1, 300, 5000])
@pytest.mark.parametrize("share", [0, 0.6, 1])
def test_order(n, share, device):
    skip, target = skipped(n, share, device), torch.arange(n, device=device) + 7
    rows, moved, count = order(skip, target)
    assert torch.equal(moved, target[rows]) and count == (~skip).sum()
    assert torch.equal(rows, torch.cat([(~skip).nonzero(), skip.nonzero()]).squeeze(1))


@pytest.mark.parametrize("n", [1, 300, 5000])
@pytest.mark.parametrize("ignore", [-100, 3, 99])
@pytest.mark.parametrize("wrong", [None, -1, 50])
def test_look_up(n, ignore, wrong, device):
    target = torch.randint(50, (n,), device=device)
    target[::3] = ignore
    if wrong is not None:
        target[n // 2] = wrong
    found, skip, good = look_up(target, ignore, 50)
    assert torch.equal(skip, target == ignore) and torch.equal(found, target.masked_fill(target == ignore, -1))
    assert bool(good) == (wrong is None)


@pytest.mark.parametrize("share", [0, 0.6, 1])
@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
def test_gather_and_put(share, layout, device):
    x = torch.randn(300, 40, device=device).half()
    x = x.mT.contiguous().mT if layout == "columns" else x[:, ::2] if layout == "strided" else x
    skip = skipped(300, share, device)
    x[skip] = float("nan")
    rows, _, count = order(skip, skip.long())
    found, n = gather(x, rows, count), int(count)
    assert torch.equal(found[:n], x[rows[:n]])
    assert not found[n : -(-n // ROWS_AT_ONCE) * ROWS_AT_ONCE].any()
    back = torch.full_like(x, 7.0, memory_format=torch.contiguous_format)
    put(found.float(), rows, count, back)
    assert torch.equal(back, x.masked_fill(skip[:, None], 0.0))


@pytest.mark.parametrize("count", [0, 1, 128, 200, 300])
@pytest.mark.parametrize("of_rows, a_layout, b_layout, out_dtype, add", [
    (True, "rows", "columns", torch.float16, False), (True, "rows", "rows", torch.float32, True),
    (False, "columns", "rows", torch.float16, False), (False, "columns", "columns", torch.float32, True),
])  # fmt: skip
def test_product(count, of_rows, a_layout, b_layout, out_dtype, add, device):
    """Each element as exact as a float32 sum; rows beyond the last tile, and what is not counted, are left alone."""
    m, n, k = (300, 72, 40) if of_rows else (40, 72, 304)
    a, b = torch.randn(m, k, device=device).half(), torch.randn(k, n, device=device).half()
    if of_rows:
        a[count:] = 0
    else:
        a[:, count:], b[count:] = 0, 0
        a[:, -(-count // ROWS_AT_ONCE) * ROWS_AT_ONCE :] = float("nan")
    a = a.mT.contiguous().mT if a_layout == "columns" else a
    b = b.mT.contiguous().mT if b_layout == "columns" else b
    room = torch.full((m, n + 8), 5.0, device=device, dtype=out_dtype)
    product(a, b, room[:, :n], torch.tensor(count, dtype=torch.int32, device=device), of_rows=of_rows, add=add)
    rows = -(-count // ROWS_AT_ONCE) * ROWS_AT_ONCE if of_rows else m
    kept = slice(None) if of_rows else slice(0, count)
    true = a[:rows, kept].double() @ b[kept].double() + 5 * add
    worst = a[:rows, kept].double().abs() @ b[kept].double().abs() + 5 * add
    error = (room[:rows, :n].double() - true).abs()
    unit = torch.finfo(out_dtype).eps / 2
    assert (error <= unit * true.abs() + k**0.5 * torch.finfo(torch.float32).eps * worst).all()
    assert (room[:, n:] == 5).all() and (room[rows:] == 5).all()


def test_tiles_leave_no_processor_idle():
    assert tile_for(8192, 4096, 132) == tile_for(2048, 4096, 132) == WIDE
    assert tile_for(8192, 768, 132) == NARROW  # 192 wide tiles in two rounds, 384 narrow ones in three


def test_what_can_be_described(device):
    w = torch.zeros(64, 40, device=device).half()
    assert describable(w) and describable(w.mT) and describable(w[:, 8:16])
    assert not any(map(describable, (w[:, 1:9], w[:, ::2], w[:0], torch.zeros(64, 41, device=device).half())))


def test_what_is_countable(device):
    """Rows of a dense 16-bit problem; and the room in which x's gradient is made is in the plan."""
    x, w = torch.zeros(64, 40, device=device).half(), torch.zeros(200, 40, device=device).half()
    on = counting.countable(x, w, "triton")
    assert on == counting.countable(x, w, walk.NARROW) == (device == "cpu" or counting.is_hopper(x.device))
    assert not counting.countable(x, w, "reference") and not counting.countable(x.float(), w.float(), "triton")
    assert not counting.countable(x[:, :36], w[:, :36], "triton") and not counting.countable(x, w[:, 1:], "triton")
    kept, left = (walk.cost(x, walk.NARROW, gathered=True, counted=counted) for counted in (True, False))
    assert used(64, 200, 64, 200, kept, True) == used(64, 200, 64, 200, left, True) + 64 * 40 * 2
    assert used(64, 200, 64, 100, kept, True) == used(64, 200, 64, 100, left, True)


@pytest.mark.parametrize("option", ["linear_bias", "lora", "batch_invariant"])
def test_what_is_summed_over_the_rows_is_not_counted(option, counts, device):
    x, w = torch.randn(40, 24, device=device).half(), torch.randn(72, 24, device=device).half().requires_grad_()
    target = torch.arange(40, device=device).masked_fill_(skipped(40, 0.5, device), -100)
    low_rank = torch.randn(8, 24, device=device).half(), torch.randn(72, 8, device=device).half(), 1.0
    given = {"linear_bias": torch.randn(72, device=device), "lora": low_rank, "batch_invariant": True}[option]
    linear_cross_entropy(x, w, target, **{option: given}, backend="triton").backward()
    assert counts[0] is None and w.grad.isfinite().all()


@pytest.fixture
def counts(monkeypatch):
    """Rows of a CPU's tensors are counted too, and few ones."""
    real = ops._problem

    def problem(*positional, **named):
        given = inspect.signature(real).bind(*positional, **named)
        given.arguments["invariant"] = True  # rows to skip stay in their place, as on CUDA
        return real(*given.args, **given.kwargs)

    monkeypatch.setattr(ops, "_problem", problem)
    monkeypatch.setattr(counting, "ROWS", 1)
    monkeypatch.setattr(counting, "MULTIPLICATIONS", 1)
    found, walked = [], ops.walk
    monkeypatch.setattr(ops, "walk", lambda p, *a, **k: found.append(p.kept) or walked(p, *a, **k))
    return found


# the second of the blocks is kept in part, with rows beyond those that are multiplied; the third not at all
PLANS = {"one block": {}, "blocks": {"block_rows": 70},
         "slabs": {"strategy": Strategy.RECOMPUTE, "block_rows": 70, "block_cols": 64, "strip_cols": 64}}  # fmt: skip


@pytest.mark.parametrize("backend, rows, share, rank", [
    ("triton", "blocks", 0.5, True), ("triton", "slabs", 0.5, True), ("triton", "one block", 1, True),
    (walk.NARROW, "one block", 0, True), (walk.NARROW, "blocks", 0.5, True), (walk.NARROW, "slabs", 0.5, False),
    (walk.NARROW, "slabs", 0.5, True),
])  # fmt: skip
def test_of_known_weights(backend, rows, share, rank, counts, device, monkeypatch, filthy_memory):
    """Loss, statistics and gradients against float64, at most twice the error of plain PyTorch's 16 bits."""
    n, m, d = 150, 104, 24
    x, w = torch.randn(n, d, device=device).half(), torch.randn(m, d, device=device).half()
    w[m // 2 :] = w[: m // 2]  # a class as likely as the target is not above it, before it and after it
    target = torch.randint(m, (n,), device=device)
    target[skipped(n, share, device)] = -100
    target[7] = -100
    real = ops.plan
    monkeypatch.setattr(ops, "plan", lambda *a, **k: real(*a, **k)._replace(**PLANS[rows]))
    keep, one = (target >= 0).float(), torch.ones((), device=device)
    smooth, soft, square = 0.1 * keep / m, torch.rand(m, device=device), 0.01 * keep
    weight = keep.masked_fill(target < 0, 7.0)  # which nobody reads
    filthy = x.masked_fill((target < 0)[:, None], float("nan"))
    p = [t.clone().requires_grad_() for t in (filthy, w)]
    found = ops.loss_and_grads(*arguments(
        ops.loss_and_grads, x=p[0], w=p[1], target=target, b=weight, e=smooth, q=square, scale=one, soft=soft,
        ignore_index=-100, rank=rank, need=need("x", "w"), backend=backend))  # fmt: skip
    ours = [found[0].detach(), *torch.autograd.grad(found[0], p)]
    assert counts[0] == (target >= 0).sum()

    def plain(x, w):
        p = [t.requires_grad_() for t in (x, w)]
        z = (p[0] @ p[1].mT).to(torch.promote_types(x.dtype, torch.float32))
        z = z.masked_fill((target < 0)[:, None], 0.0)
        loss = torch.nn.functional.cross_entropy(z, target, reduction="sum") - (smooth[:, None] * soft * z).sum()
        loss = loss + (square * z.logsumexp(1).square() / 2).sum()
        return [loss.detach(), *torch.autograd.grad(loss, p)], z.detach()

    true, z = plain(x.double(), w.double())
    theirs, _ = plain(x.clone(), w.clone())
    slack = torch.finfo(x.dtype).eps / 2 * z.abs().max() * n**0.5  # of a sum of rounded logits, by chance less
    for a, b, t, more in zip(ours, theirs, true, (slack, 0, 0), strict=True):
        assert (a.double() - t).norm() <= 2 * (b.double() - t).norm() + 1e-6 * t.norm() + more
    nll, lse, entropy, _, _, _, _, above, *_ = found[1:]
    kept = target >= 0
    log_p = z.log_softmax(1)
    expected = (-log_p.gather(1, target.clamp(min=0)[:, None])[:, 0], z.logsumexp(1), -(log_p.exp() * log_p).sum(1))
    for got, want in zip((nll, lse, entropy), expected, strict=True):
        torch.testing.assert_close(got.double(), want.masked_fill(~kept, 0.0), rtol=0, atol=0.02)
    assert not ours[1][~kept].any() and not above[~kept].any()
    if rank:  # of the tile's own logits, but where rounding decides
        z = z.to(x.dtype) if backend == walk.NARROW and rows != "slabs" else z
        expected = (z > z.gather(1, target.clamp(min=0)[:, None])).sum(1).masked_fill(~kept, 0)
        assert ((above - expected).abs() <= 1).all() and (above != expected).sum() <= 0.1 * kept.sum()


@pytest.mark.parametrize("reduction, rows", [("none", "slabs"), ("sum", "blocks")])
def test_it_is_the_same_loss(reduction, rows, counts, device, monkeypatch):
    """float16 waits for its upstream gradient: bits apart, what it is where the rows stay in their place."""
    n = 150 if rows == "blocks" else 90
    x, w = torch.randn(n, 24, device=device).half(), torch.randn(72, 24, device=device).half()
    target = torch.randint(72, (n,), device=device).masked_fill_(skipped(n, 0.5, device), -100)
    real, found = ops.plan, []
    monkeypatch.setattr(ops, "plan", lambda *a, **k: real(*a, **k)._replace(**PLANS[rows]))
    for least in (1, 1 << 30):
        monkeypatch.setattr(counting, "MULTIPLICATIONS", least)
        p = [t.clone().requires_grad_() for t in (x, w)]
        loss, stats = linear_cross_entropy(*p, target, reduction=reduction, logit_softcap=5.0, z_loss=0.01,
                                           return_stats=True, backend="triton")  # fmt: skip
        up = torch.linspace(0.5, 2, loss.numel(), device=device).view(loss.shape)
        found.append([loss.detach(), *stats, *torch.autograd.grad(loss, p, up)])
    assert counts[0] is not None and counts[-1] is None
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)
