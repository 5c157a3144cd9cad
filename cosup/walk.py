"""The engine: visit the logits of x @ w.T tile by tile, keep the rows' statistics, and turn tiles into gradients.

    for a slab of columns, for a block of rows:
        GEMM the tile into one reused buffer                    1U
        stats   merge it into the rows' running statistic
        grad    turn it into coefficients in place, then two GEMMs: dx += c @ w, dw += c.T @ x     2U

Both losses, every strategy and every device run this one loop; ``plan`` decides the blocks, ``kernels`` do the tiles,
the vendor's library does the GEMMs. Shape suffixes: N rows, M columns, D features, r a block of rows, s a slab.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosup.kernels import native, reference
from cosup.kernels.reference import RowState
from cosup.plan import Cost, Plan, padded

_CONTIGUOUS: Any = {"memory_format": torch.contiguous_format}
BACKENDS = ("auto", "reference", "native", "triton")
DEFAULT_WORKSPACE = {"cpu": 256 << 20, "cuda": 1 << 30}  # bytes
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on CPU tensors
HAS_TRITON = importlib.util.find_spec("triton") is not None
REFERENCE_COPIES = 6  # tiles that the PyTorch kernels hold at once, by count of their temporaries


class Problem(NamedTuple):
    x: Tensor  # [N, D]
    w: Tensor  # [M, D]
    target: Tensor  # [N] int64, -1 where the row is ignored
    scale: Tensor  # scalar, in the dtype of the statistics
    bias: Tensor | None = None  # [M], in the dtype of the statistics
    row_id: Tensor | None = None  # [N] int64
    col_id: Tensor | None = None  # [M] int64
    softcap: float = 0.0
    rows: Tensor | None = None  # [n <= N] int64, the rows to visit; None: all of them
    skip: Tensor | None = None  # [N] bool, rows visited whose contents must not matter; None: none


def walk(p: Problem, plan: Plan, backend: str, *, max_sum: tuple[Tensor, Tensor] | None = None,
         a: Tensor | None = None, b: Tensor | None = None, need: tuple[bool, bool, bool] = (False, False, False),
         rank: bool = False):  # fmt: skip
    """One sweep over all tiles. Vectors over rows are over ``p.rows`` where those are given.

    Args:
        max_sum: Final maximum and sum of exponentials of each row; None: this sweep computes the statistics.
        a, b: Gradient coefficients, ``dz = a * p - b * [m == target]``; None: no gradients. Without ``max_sum`` every
            tile must hold whole rows.
        need: Which gradients to make: of x, w, bias.
        rank: Whether ``RowState.above`` will be read.

    Returns:
        RowState (empty where ``max_sum`` was given), dx [N, D], dw [M, D], dbias [M]; a gradient not asked is None.
    """
    x, w = p.x, p.w
    n, m = len(p.target), len(w)
    stats_dtype = p.scale.dtype
    tile_stats, tile_grad = tile_kernels(backend, x)
    state = RowState.empty(n if max_sum is None else 0, p.scale)
    several_rows, several_cols = plan.block_rows < n, plan.block_cols < m
    if rank and several_cols:
        _target_logits(p, state, plan)
    tile_buffer, half_buffer = _buffers(p, plan)
    if a is not None and b is not None:
        assert max_sum is not None or not several_cols
        a, b = a * p.scale, b * p.scale  # the chain from u = scale * dot to dot
    need_x, need_w, need_bias = need
    idle = n == 0 or m == 0
    dx = (torch.zeros_like if idle or p.rows is not None else torch.empty_like)(x, **_CONTIGUOUS) if need_x else None
    dw = (torch.zeros_like if idle else torch.empty_like)(w, **_CONTIGUOUS) if need_w else None
    dbias = torch.zeros(m, dtype=stats_dtype, device=x.device) if need_bias else None
    dx_sum = _accumulator(dx, n, several_cols)
    for s in _spans(m, plan.block_cols):
        w_s = w[s]
        dw_sum = _accumulator(dw, s.stop - s.start, several_rows)
        for r in _spans(n, plan.block_rows):
            x_r = _take(p, r)
            tile = tile_buffer[: r.stop - r.start, : s.stop - s.start]
            half = None if half_buffer is None else half_buffer[: r.stop - r.start, : s.stop - s.start]
            _dots(x_r, w_s, tile, half)
            features = (s.start, p.target[r], p.scale, _slice(p.bias, s), _slice(p.row_id, r), _slice(p.col_id, s),
                        p.softcap)  # fmt: skip
            if max_sum is None:
                tile_stats(tile, state.rows(r), *features)
            if a is None or b is None:
                continue
            max_r, sum_r = (state.max[r], state.sum[r]) if max_sum is None else (max_sum[0][r], max_sum[1][r])
            a_r = torch.where(a[r] == 0, 0.0, a[r] / sum_r)
            coef = _coefficients(tile_grad, tile, half, max_r, a_r, b[r], features)
            if dx_sum is not None:
                _add(dx_sum[r], coef, w_s, first=s.start == 0)
            elif dx is not None and p.rows is not None:
                dx.index_add_(0, p.rows[r], coef @ w_s)
            elif dx is not None:
                _add(dx[r], coef, w_s, first=s.start == 0)
            if dw is not None:
                _add(dw[s] if dw_sum is None else dw_sum, coef.mT, x_r, first=r.start == 0)
            if dbias is not None:
                dbias[s] += (coef if tile.is_cuda else tile).sum(0, dtype=stats_dtype)
        if dw is not None and dw_sum is not None:
            dw[s] = dw_sum
    if dx is not None and dx_sum is not None:
        dx[slice(None) if p.rows is None else p.rows] = dx_sum.to(dx.dtype)
    if dbias is not None:
        dbias /= p.scale
    return state, dx, dw, dbias


def cost(x: Tensor, backend: str, *, gathered: bool) -> Cost:
    """Bytes per unit that :func:`walk` holds for operands like x; ``gathered``: rows are picked or masked."""
    d, item = x.shape[1], x.element_size()
    wide = max(item, 4)
    apart = item < 4  # 16-bit operands: gradients are summed in float32 apart
    on_cpu = x.device.type == "cpu"
    tile = wide * (REFERENCE_COPIES if backend == "reference" else 1) + (item if apart and on_cpu else 0)
    return Cost(
        tile=tile,
        row=4 * wide + 4 + 6 * wide + 16,  # RowState; coefficients; packed targets and row numbers
        block_row=d * item * 2 if gathered else 0,
        table_row=d * (4 + (item + 4 if on_cpu else 0)) if apart else 0,  # on a CPU also the product and its scratch
        query_row=d * 4 if apart else 0,
    )


def resolve(backend: str, x: Tensor) -> str:
    """The kernels that ``backend="auto"`` means for a tensor, or the named ones if they can run there.

    Raises:
        ValueError: An unknown backend, or one that cannot run on this device and dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    device = x.device.type
    runs = {
        "reference": True,
        "native": device == "cpu" and x.dtype != torch.float64 and bool(native.AVAILABLE),
        "triton": (device == "cuda" or INTERPRETED) and x.dtype != torch.float64 and HAS_TRITON,
    }
    if backend == "auto":
        return next(
            name for name in ("native", "triton", "reference") if runs[name] and (name, device) != ("triton", "cpu")
        )
    if not runs[backend]:
        raise ValueError(f"backend {backend!r} does not run on {device} with {x.dtype}; see `cosup doctor`")
    return backend


def tile_kernels(backend: str, x: Tensor) -> tuple[Any, Any]:
    """The pair (tile_stats, tile_grad) of a backend that :func:`resolve` gave."""
    if backend == "native":
        return native.tile_stats, native.tile_grad
    if backend == "reference":
        if x.dtype != torch.float64 and not (native.AVAILABLE if x.device.type == "cpu" else HAS_TRITON):
            _warn_slow()
        return reference.tile_stats, reference.tile_grad
    from cosup.kernels.tile_grad import tile_grad  # Triton: absent on some platforms
    from cosup.kernels.tile_stats import tile_stats

    return tile_stats, tile_grad


@functools.cache
def _warn_slow() -> None:
    warnings.warn("cosup runs its slower PyTorch path: this device's kernels are missing (`cosup doctor` says more)",
                  stacklevel=2)  # fmt: skip


def _spans(n: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, n)) for i in range(0, n, max(block, 1))]


def _slice(vector: Tensor | None, part: slice) -> Tensor | None:
    return None if vector is None else vector[part]


def _buffers(p: Problem, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """The tile in the dtype of the statistics, and for 16-bit operands the same in theirs: on CUDA at the front of
    each float32 row (no further memory), on a CPU apart, since its GEMMs don't widen their output."""
    rows, cols = min(plan.block_rows, len(p.target)), padded(plan.block_cols)
    tile = torch.empty(rows, cols, dtype=p.scale.dtype, device=p.x.device)
    if p.x.element_size() >= 4:
        return tile, None
    if not p.x.is_cuda:
        return tile, torch.empty(rows, cols, dtype=p.x.dtype)
    return tile, tile.view(p.x.dtype)[:, :cols]


def _take(p: Problem, r: slice) -> Tensor:
    if p.rows is not None:
        return p.x[p.rows[r]]
    if p.skip is not None:
        return p.x[r].masked_fill(p.skip[r, None], 0.0)
    return p.x[r]


def _target_logits(p: Problem, state: RowState, plan: Plan) -> None:
    """Targets' logits before the sweep, for ranks when a target may stand in a later slab; in the tile's room."""
    d = max(1, p.x.shape[1])
    for r in _spans(len(p.target), max(1, plan.block_rows * plan.block_cols // (4 * d))):
        target_r = p.target[r].clamp(min=0)
        product_RD = _take(p, r).to(p.scale.dtype) * p.w[target_r]
        # raised by what a GEMM may round otherwise: an equal logit must not count as above
        slack_r = 4 * torch.finfo(p.scale.dtype).eps * product_RD.abs().sum(1)
        if p.x.element_size() < 4 and not p.x.is_cuda:
            slack_r += torch.finfo(p.x.dtype).eps * product_RD.sum(1).abs()
        u_r = (product_RD.sum(1) + slack_r) * p.scale
        if p.bias is not None:
            u_r += p.bias[target_r]
        state.target[r] = p.softcap * torch.tanh(u_r / p.softcap) if p.softcap else u_r


def _dots(x_r: Tensor, w_s: Tensor, tile: Tensor, half: Tensor | None) -> None:
    """tile = x_r @ w_s.T, accumulated in float32."""
    if half is None:
        torch.mm(x_r, w_s.mT, out=tile)
    elif tile.is_cuda:
        torch.mm(x_r, w_s.mT, out_dtype=tile.dtype, out=tile)
    else:
        torch.mm(x_r, w_s.mT, out=half)
        tile.copy_(half)


def _coefficients(tile_grad, tile: Tensor, half: Tensor | None, shift_r, a_r, b_r, features) -> Tensor:
    """Gradient coefficients of a tile in the operands' dtype, in the tile's own memory or in ``half``."""
    in_place = half is None or not tile.is_cuda
    tile_grad(tile, tile if in_place else half, shift_r, a_r, b_r, *features)
    if half is None:
        return tile
    if in_place:
        half.copy_(tile)
    return half


def _accumulator(grad: Tensor | None, n: int, several: bool) -> Tensor | None:
    """Float32 sums for n rows of a 16-bit gradient that is made of several parts; None: the gradient itself will do."""
    if grad is None or not several or grad.element_size() >= 4:
        return None
    return torch.zeros(n, grad.shape[1], dtype=torch.float32, device=grad.device)


def _add(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total (+)= a @ b with partial sums in the dtype of ``total``; operands are never widened."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)
