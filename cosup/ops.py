"""The engine as ``torch.library`` operators: schema, fake kernels and derivatives. ``losses`` calls these two.

    nll_stats      statistics now; gradients, if asked, by a second sweep once the upstream gradient is known
    nll_and_grads  total = sum_n weight[n] * nll[n] and its gradients in one sweep

Both refuse targets out of range: an ``IndexError`` on a CPU, a device-side assertion (no synchronisation) on CUDA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosup.plan import plan
from cosup.walk import Problem, cost, walk


def _problem(x, w, target, scale, bias, row_id, col_id, softcap, ignore_index) -> Problem:
    """Check the targets and leave out ignored rows: by picking on a CPU, by idle coefficients on CUDA (no sync)."""
    m = len(w)
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    bad = valid & ((target < 0) | (target >= m))
    target, bias, row_id, col_id = (t if t is None else t.contiguous() for t in (target, bias, row_id, col_id))
    p = Problem(x, w, target, scale, bias, row_id, col_id, softcap)
    if x.device.type == "cpu":
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(f"target must be in [0, {m}), got {int(target[row])} in row {row}")
        if valid.all():
            return p
        rows = valid.nonzero().squeeze(1)
        return p._replace(target=target[rows], rows=rows, row_id=None if row_id is None else row_id[rows])
    torch._assert_async(~bad.any(), f"target must be in [0, {m})")
    if ignore_index is None:
        return p
    return p._replace(target=target.masked_fill(~valid, -1), skip=~valid)


def _plan(p: Problem, backend: str, workspace_bytes: int, grads: bool, weights_known: bool):
    picked = p.rows is not None or p.skip is not None
    c = cost(p.x, backend, gathered=picked)
    return plan(len(p.target), len(p.w), c, grads=grads, weights_known=weights_known, workspace_bytes=workspace_bytes)


def _per_row(p: Problem, state) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nll, lse, expected logit and columns above the target, over all N rows; zeros at ignored rows."""
    lse = state.lse()
    fields = (lse - state.target, lse, state.expected(), state.above)
    if p.rows is not None:
        return tuple(f.new_zeros(len(p.x)).index_copy_(0, p.rows, f) for f in fields)  # type: ignore[return-value]
    if p.skip is not None:
        return tuple(f.masked_fill(p.skip, 0) for f in fields)  # type: ignore[return-value]
    return fields


@torch.library.custom_op("cosup::nll_stats", mutates_args=())
def nll_stats(x: Tensor, w: Tensor, target: Tensor, scale: Tensor, bias: Tensor | None, row_id: Tensor | None,
              col_id: Tensor | None, softcap: float, ignore_index: int | None, rank: bool, need: list[bool],
              workspace_bytes: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """nll, lse, expected logit, columns above the target: each [N]. ``need``: gradients of x, w, bias, scale."""
    p = _problem(x, w, target, scale, bias, row_id, col_id, softcap, ignore_index)
    blocks = _plan(p, backend, workspace_bytes, grads=False, weights_known=False)
    state, *_ = walk(p, blocks, backend, rank=rank)
    return _per_row(p, state)


@nll_stats.register_fake
def _(x, w, target, scale, *_):
    rows = [torch.empty_like(target, dtype=scale.dtype) for _ in range(3)]
    return (*rows, torch.empty_like(target, dtype=torch.int32))


@torch.library.custom_op("cosup::nll_stats_backward", mutates_args=())
def nll_stats_backward(grad_nll: Tensor, grad_lse: Tensor, lse: Tensor, x: Tensor, w: Tensor, target: Tensor,
                       scale: Tensor, bias: Tensor | None, row_id: Tensor | None, col_id: Tensor | None, softcap: float,
                       ignore_index: int | None, need: list[bool], workspace_bytes: int, backend: str,
                       ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw, dbias for upstream gradients of nll and lse; empty where not needed."""
    p = _problem(x, w, target, scale, bias, row_id, col_id, softcap, ignore_index)
    blocks = _plan(p, backend, workspace_bytes, grads=True, weights_known=False)
    a, b = grad_nll + grad_lse, grad_nll
    if p.rows is not None:
        lse, a, b = lse[p.rows], a[p.rows], b[p.rows]
    elif p.skip is not None:
        a, b = a.masked_fill(p.skip, 0), b.masked_fill(p.skip, 0)
    _, *grads = walk(p, blocks, backend, lse=lse, a=a, b=b, need=(need[0], need[1], need[2]))
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


@nll_stats_backward.register_fake
def _(grad_nll, grad_lse, lse, x, w, target, scale, bias, row_id, col_id, softcap, ignore_index, need, *_):
    return _fake_grads(x, w, scale, need)


def _fake_grads(x, w, scale, need):
    dx, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w))
    dbias = w.new_empty(len(w), dtype=scale.dtype)
    return tuple(g if wanted else x.new_empty(0) for g, wanted in zip((dx, dw, dbias), need, strict=False))


def _stats_context(ctx, inputs, output):
    x, w, target, scale, bias, row_id, col_id, *options = inputs
    ctx.options = options
    ctx.save_for_backward(x, w, target, scale, bias, row_id, col_id, *output[:3])
    ctx.set_materialize_grads(False)


def _stats_backward(ctx, grad_nll, grad_lse, grad_expected, grad_above):
    x, w, target, scale, bias, row_id, col_id, nll, lse, expected = ctx.saved_tensors
    softcap, ignore_index, _, need, workspace_bytes, backend = ctx.options
    grad_nll, grad_lse = (torch.zeros_like(lse) if g is None else g for g in (grad_nll, grad_lse))
    dx = dw = dbias = dscale = None
    if any(need[:3]):
        grads = nll_stats_backward(grad_nll, grad_lse, lse, x, w, target, scale, bias, row_id, col_id, softcap,
                                   ignore_index, need, workspace_bytes, backend)  # fmt: skip
        dx, dw, dbias = (g if wanted else None for g, wanted in zip(grads, need, strict=False))
    if need[3]:  # z is linear in scale where this is asked: d lse / d log scale is the expected logit
        dscale = (grad_nll * (expected - (lse - nll)) + grad_lse * expected).sum() / scale
    return dx, dw, None, dscale, dbias, *8 * [None]


nll_stats.register_autograd(_stats_backward, setup_context=_stats_context)


@torch.library.custom_op("cosup::nll_and_grads", mutates_args=())
def nll_and_grads(x: Tensor, w: Tensor, target: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
                  row_id: Tensor | None, col_id: Tensor | None, softcap: float, ignore_index: int | None,
                  need: list[bool], workspace_bytes: int, backend: str,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """total, then nll, lse, expected logit, columns above the target [N], then dx, dw, dbias of the total."""
    p = _problem(x, w, target, scale, bias, row_id, col_id, softcap, ignore_index)
    blocks = _plan(p, backend, workspace_bytes, grads=True, weights_known=True)
    a = weight if p.rows is None else weight[p.rows]
    if p.skip is not None:
        a = a.masked_fill(p.skip, 0)
    state, *grads = walk(p, blocks, backend, a=a, b=a, need=(need[0], need[1], need[2]))
    rows = _per_row(p, state)
    return (weight * rows[0]).sum(), *rows, *(x.new_empty(0) if g is None else g for g in grads)


@nll_and_grads.register_fake
def _(x, w, target, weight, scale, bias, row_id, col_id, softcap, ignore_index, need, *_):
    rows = [torch.empty_like(target, dtype=scale.dtype) for _ in range(3)]
    above = torch.empty_like(target, dtype=torch.int32)
    return torch.empty_like(scale), *rows, above, *_fake_grads(x, w, scale, need)


def _grads_context(ctx, inputs, output):
    scale, ctx.need = inputs[4], inputs[10]
    total, nll, lse, expected, above, *grads = output
    ctx.save_for_backward(inputs[3], scale, nll, lse, expected, *grads)
    ctx.set_materialize_grads(False)


def _grads_backward(ctx, grad_total, *_):
    weight, scale, nll, lse, expected, *grads = ctx.saved_tensors
    if grad_total is None:
        return 13 * (None,)
    dx, dw, dbias = (_scaled(g, grad_total) if wanted else None for g, wanted in zip(grads, ctx.need, strict=False))
    dscale = (grad_total * weight * (expected - (lse - nll))).sum() / scale if ctx.need[3] else None
    dweight = grad_total * nll if ctx.needs_input_grad[3] else None
    return dx, dw, None, dweight, dscale, dbias, *7 * [None]


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """factor * grad, in grad's own memory where this is its last use."""
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * factor).to(grad.dtype)
    if factor.device.type == "cpu" and factor == 1:
        return grad
    return grad.mul_(factor)


nll_and_grads.register_autograd(_grads_backward, setup_context=_grads_context)
