"""The engine as ``torch.library`` operators: schema, fake kernels and derivatives. ``losses`` calls these two.

    nll_stats      statistics now; gradients, if asked, by a second sweep once the upstream gradient is known
    nll_and_grads  sum_n weight[n] * nll[n] and its gradients in one sweep

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
    x, w = (t if 1 in t.stride() else t.contiguous() for t in (x, w))  # else each GEMM would copy its part
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


def _per_row(p: Problem, state) -> tuple[Tensor, ...]:
    """nll, maximum, sum, expected logit and columns above the target, over all N rows; zeros at ignored rows."""
    fields = (state.nll(), state.max, state.sum, state.expected(), state.above)
    if p.rows is not None:
        return tuple(f.new_zeros(len(p.x)).index_copy_(0, p.rows, f) for f in fields)
    if p.skip is not None:
        return tuple(f.masked_fill(p.skip, 0) for f in fields)
    return fields


@torch.library.custom_op("cosup::nll_stats", mutates_args=())
def nll_stats(x: Tensor, w: Tensor, target: Tensor, scale: Tensor, bias: Tensor | None, row_id: Tensor | None,
              col_id: Tensor | None, softcap: float, ignore_index: int | None, rank: bool, need: list[bool],
              workspace_bytes: int, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """nll, maximum, sum of exp(z - maximum), expected logit, columns above the target: each [N].

    ``need``: which gradients a backward pass will make: of x, w, bias, scale.
    """
    p = _problem(x, w, target, scale, bias, row_id, col_id, softcap, ignore_index)
    blocks = _plan(p, backend, workspace_bytes, grads=False, weights_known=False)
    state, *_ = walk(p, blocks, backend, rank=rank)
    nll, top, total, expected, above = _per_row(p, state)
    return nll, top, total, expected, above


@nll_stats.register_fake
def _(x, w, target, scale, *_):
    rows = [torch.empty_like(target, dtype=scale.dtype) for _ in range(4)]
    return (*rows, torch.empty_like(target, dtype=torch.int32))


@torch.library.custom_op("cosup::nll_stats_backward", mutates_args=())
def nll_stats_backward(grad_nll: Tensor, top: Tensor, total: Tensor, x: Tensor, w: Tensor, target: Tensor,
                       scale: Tensor, bias: Tensor | None, row_id: Tensor | None, col_id: Tensor | None, softcap: float,
                       ignore_index: int | None, need: list[bool], workspace_bytes: int, backend: str,
                       ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw, dbias for an upstream gradient of nll; empty where not needed."""
    p = _problem(x, w, target, scale, bias, row_id, col_id, softcap, ignore_index)
    blocks = _plan(p, backend, workspace_bytes, grads=True, weights_known=False)
    a = grad_nll
    if p.rows is not None:
        top, total, a = top[p.rows], total[p.rows], a[p.rows]
    elif p.skip is not None:
        a = a.masked_fill(p.skip, 0)
    _, *grads = walk(p, blocks, backend, max_sum=(top, total), a=a, b=a, need=(need[0], need[1], need[2]))
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


@nll_stats_backward.register_fake
def _(grad_nll, top, total, x, w, target, scale, bias, row_id, col_id, softcap, ignore_index, need, *_):
    return _fake_grads(x, w, scale, need)


def _fake_grads(x, w, scale, need):
    dx, dw = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, w))
    dbias = w.new_empty(w.shape[0], dtype=scale.dtype)
    return tuple(g if wanted else x.new_empty(0) for g, wanted in zip((dx, dw, dbias), need, strict=False))


def _stats_context(ctx, inputs, output):
    *tensors, ctx.softcap, ctx.ignore_index, _, ctx.need, ctx.workspace_bytes, ctx.backend = inputs
    nll, top, total, expected, _ = output
    ctx.save_for_backward(*tensors, nll, top, total, expected)
    ctx.set_materialize_grads(False)


def _stats_backward(ctx, grad_nll, *_):
    _once(grad_nll)
    x, w, target, scale, bias, row_id, col_id, nll, top, total, expected = ctx.saved_tensors
    dx = dw = dbias = dscale = None
    if grad_nll is None:
        return 13 * (None,)
    if any(ctx.need[:3]):
        grads = nll_stats_backward(grad_nll, top, total, x, w, target, scale, bias, row_id, col_id, ctx.softcap,
                                   ctx.ignore_index, ctx.need, ctx.workspace_bytes, ctx.backend)  # fmt: skip
        dx, dw, dbias = (g if wanted else None for g, wanted in zip(grads, ctx.need, strict=False))
    if ctx.need[3]:
        dscale = _scale_grad(grad_nll, nll, top, total, expected, scale)
    return dx, dw, None, dscale, dbias, *8 * [None]


def _once(grad: Tensor | None) -> None:
    if torch.is_grad_enabled() and grad is not None and not torch.compiler.is_compiling():
        raise RuntimeError("cosup's losses have first derivatives only: create_graph=True is not supported")


def _scale_grad(grad_nll, nll, top, total, expected, scale):
    """d nll / d scale = (expected logit - target logit) / scale: logits are linear in scale wherever this is asked."""
    target_logit = top + total.log() - nll
    rows = torch.where(total == 0, 0.0, expected - target_logit)  # no sum: an ignored row
    return (grad_nll * rows).sum() / scale


nll_stats.register_autograd(_stats_backward, setup_context=_stats_context)


@torch.library.custom_op("cosup::nll_and_grads", mutates_args=())
def nll_and_grads(x: Tensor, w: Tensor, target: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None,
                  row_id: Tensor | None, col_id: Tensor | None, softcap: float, ignore_index: int | None,
                  need: list[bool], workspace_bytes: int, backend: str,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """sum_n weight[n] nll[n], then what ``nll_stats`` gives, then dx, dw, dbias of the sum (empty where not needed)."""
    p = _problem(x, w, target, scale, bias, row_id, col_id, softcap, ignore_index)
    blocks = _plan(p, backend, workspace_bytes, grads=True, weights_known=True)
    a = weight if p.rows is None else weight[p.rows]
    if p.skip is not None:
        a = a.masked_fill(p.skip, 0)
    state, *grads = walk(p, blocks, backend, a=a, b=a, need=(need[0], need[1], need[2]))
    nll, top, total, expected, above = _per_row(p, state)
    dx, dw, dbias = (x.new_empty(0) if g is None else g for g in grads)
    return (weight * nll).sum(), nll, top, total, expected, above, dx, dw, dbias


@nll_and_grads.register_fake
def _(x, w, target, weight, scale, bias, row_id, col_id, softcap, ignore_index, need, *_):
    rows = [torch.empty_like(target, dtype=scale.dtype) for _ in range(4)]
    above = torch.empty_like(target, dtype=torch.int32)
    return torch.empty_like(scale), *rows, above, *_fake_grads(x, w, scale, need)


def _grads_context(ctx, inputs, output):
    weight, scale, ctx.need = inputs[3], inputs[4], inputs[10]
    _, nll, top, total, expected, _, *grads = output
    ctx.save_for_backward(weight, scale, nll, top, total, expected, *grads)
    ctx.set_materialize_grads(False)


def _grads_backward(ctx, grad_loss, *_):
    _once(grad_loss)
    weight, scale, nll, top, total, expected, *grads = ctx.saved_tensors
    if grad_loss is None:
        return 13 * (None,)
    dx, dw, dbias = (_scaled(g, grad_loss) if wanted else None for g, wanted in zip(grads, ctx.need, strict=False))
    dscale = _scale_grad(grad_loss * weight, nll, top, total, expected, scale) if ctx.need[3] else None
    dweight = grad_loss * nll if ctx.needs_input_grad[3] else None
    return dx, dw, None, dweight, dscale, dbias, *7 * [None]


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """factor * grad, in grad's own memory where this is its last use."""
    traced = type(grad) is not Tensor
    if traced or torch._C._autograd._get_current_graph_task_keep_graph():
        return (grad * factor).to(grad.dtype) if grad.element_size() >= 4 else (grad.float() * factor).to(grad.dtype)
    if factor.device.type == "cpu" and factor == 1:
        return grad
    if factor.device.type != "cpu" and grad.element_size() < 4:  # there the factor would be rounded to 16 bits
        for part in grad.split(4096):
            part.copy_(part.float() * factor)
        return grad
    return grad.mul_(factor)


nll_and_grads.register_autograd(_grads_backward, setup_context=_grads_context)
