"""Triton: merge a tile of inner products into the running statistic of its rows, or of its columns.

One program owns one row, or a few columns.

Formula, names and the meaning of every argument: ``cosup.kernels.reference``. The tile is read once, never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosup.kernels.reference import ColumnState, RowState

BLOCK_S = 2048  # columns per step; four float32 per thread and step at 8 warps is too few, sixteen spills
WARPS = 8
ROWS, COLUMNS = 32, 128  # that a program of the columns' statistic takes at once


@triton.jit
def to_logits(dot, scale, bias, softcap, HAS_CAP: tl.constexpr):
    """Logits of inner products, and d(logit)/du of the softcap."""
    u = dot * scale + bias
    chain = tl.full(u.shape, 1.0, tl.float32)
    if HAS_CAP:
        v = u / softcap
        v2 = v * v
        # near 0 the polynomial of Cephes' tanhf (Moshier): the quotient would cancel
        p = (((-5.70498872745e-3 * v2 + 2.06390887954e-2) * v2 - 5.37397155531e-2) * v2 + 1.33314422036e-1) * v2
        e = tl.exp(-2.0 * tl.abs(v))
        far = (1.0 - e) / (1.0 + e)
        t = tl.where(tl.abs(v) < 0.625, (p - 3.33332819422e-1) * v2 * v + v, tl.where(v < 0, -far, far))
        chain = 1.0 - t * t
        u = t * softcap
    return u, chain


@triton.jit
def tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, margin, row, s, S, column, target, softcap,
                HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr, HAS_CAP: tl.constexpr,
                HAS_LIMIT: tl.constexpr):  # fmt: skip
    """Logits of columns s of one row; -inf outside the tile and at masked columns. Also d(logit)/du of the softcap."""
    dot = tl.load(dot_ptr + s, s < S, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + s, s < S, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    u, chain = to_logits(dot, scale, bias, softcap, HAS_CAP)
    u = tl.where(s < S, u, float("-inf"))
    if HAS_LIMIT:
        u = tl.where((dot * scale > tl.load(limit_ptr + row)) & (column != target), float("-inf"), u)
    if HAS_ID:
        same = tl.load(col_id_ptr + s, s < S, other=0) == tl.load(row_id_ptr + row)
        u = tl.where(same & (column != target), float("-inf"), u)
    return tl.where(column == target, u - margin * scale, u), chain


@triton.jit
def _stats_kernel(dot_ptr, stride_R, max_ptr, sum_ptr, edot_ptr, target_logit_ptr, softdot_ptr, above_ptr, target_ptr,
                  scale_ptr, bias_ptr, row_id_ptr, col_id_ptr, col0, S, softcap, soft_ptr, margin, limit_ptr,
                  HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SOFT: tl.constexpr,
                  HAS_LIMIT: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dot_ptr += row * stride_R
    scale = tl.load(scale_ptr)
    target = tl.load(target_ptr + row)
    threshold = tl.load(target_logit_ptr + row)
    own = target - col0  # the target's place in this tile
    if (own >= 0) & (own < S):
        z, _ = tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, 0.0, row, own + tl.arange(0, 1),
                           S, target, target, softcap, HAS_BIAS, HAS_ID, HAS_CAP, HAS_LIMIT)  # fmt: skip
        threshold = tl.sum(z, 0)
        tl.store(target_logit_ptr + row, threshold)
    run_max = tl.load(max_ptr + row)
    run_sum = tl.load(sum_ptr + row)
    run_dot = tl.load(edot_ptr + row)
    run_soft = tl.load(softdot_ptr + row)
    above = tl.load(above_ptr + row)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
        z, _ = tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, margin, row, s, S, col0 + s,
                           target, softcap, HAS_BIAS, HAS_ID, HAS_CAP, HAS_LIMIT)  # fmt: skip
        above += tl.sum(((z > threshold) & (col0 + s != target)).to(tl.int32), 0)
        if HAS_SOFT:
            soft = tl.load(soft_ptr + s, s < S, other=0.0)
            left_out = (s >= S) | (z == float("-inf")) if HAS_ID or HAS_LIMIT else s >= S
            run_soft += tl.sum(tl.where(left_out, 0.0, soft * z), 0)
        new = tl.maximum(run_max, tl.max(z, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
        z -= safe
        e = tl.exp(z)
        lag = tl.where(run_sum == 0, 0.0, run_max - safe)
        decay = tl.exp(run_max - safe)
        run_dot = (run_dot + run_sum * lag) * decay + tl.sum(tl.where(e == 0, 0.0, e * z), 0)
        run_sum = run_sum * decay + tl.sum(e, 0)
        run_max = new
    tl.store(max_ptr + row, run_max)
    tl.store(sum_ptr + row, run_sum)
    tl.store(edot_ptr + row, run_dot)
    tl.store(softdot_ptr + row, run_soft)
    tl.store(above_ptr + row, above)


def tile_stats(dot_RS: Tensor, state: RowState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
               softcap=0.0, soft_S=None, margin=0.0, limit_R=None):  # fmt: skip
    R, S = dot_RS.shape
    if R == 0 or S == 0:
        return
    unused = target_R  # a pointer that a kernel without the feature never reads
    with torch.cuda.device_of(dot_RS):  # the launch goes to the current device
        _stats_kernel[(R,)](
            dot_RS, dot_RS.stride(0), state.max, state.sum, state.dot, state.target, state.soft, state.above, target_R,
            scale,
            unused if bias_S is None else bias_S, unused if row_id_R is None else row_id_R,
            unused if col_id_S is None else col_id_S, col0, S, softcap, unused if soft_S is None else soft_S, margin,
            unused if limit_R is None else limit_R, HAS_BIAS=bias_S is not None, HAS_ID=row_id_R is not None,
            HAS_CAP=bool(softcap), HAS_SOFT=soft_S is not None, HAS_LIMIT=limit_R is not None,
            BLOCK_S=min(BLOCK_S, triton.next_power_of_2(S)), num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _column_kernel(dot_ptr, stride_R, max_ptr, sum_ptr, edot_ptr, target_ptr, scale_ptr, bias_ptr, row_id_ptr,
                   col_id_ptr, col0, R, S, softcap, margin, limit_ptr, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr,
                   HAS_CAP: tl.constexpr, HAS_LIMIT: tl.constexpr, BLOCK_R: tl.constexpr,
                   BLOCK_S: tl.constexpr):  # fmt: skip
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr + s, s < S, other=0.0).to(tl.float32)[None, :] if HAS_BIAS else 0.0
    run_max = tl.load(max_ptr + s, s < S, other=float("-inf"))
    run_sum = tl.load(sum_ptr + s, s < S, other=0.0)
    run_dot = tl.load(edot_ptr + s, s < S, other=0.0)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        inside = (r < R)[:, None] & (s < S)[None, :]
        dot = tl.load(dot_ptr + r.to(tl.int64)[:, None] * stride_R + s[None, :], inside, other=0.0).to(tl.float32)
        z, _ = to_logits(dot, scale, bias, softcap, HAS_CAP)
        z = tl.where(inside, z, float("-inf"))
        hit = (col0 + s)[None, :] == tl.load(target_ptr + r, r < R, other=-1)[:, None]
        if HAS_LIMIT:
            limit = tl.load(limit_ptr + r, r < R, other=0.0)
            z = tl.where((dot * scale > limit[:, None]) & (hit == 0), float("-inf"), z)
        if HAS_ID:
            row_id = tl.load(row_id_ptr + r, r < R, other=0)
            col_id = tl.load(col_id_ptr + s, s < S, other=0)
            z = tl.where((row_id[:, None] == col_id[None, :]) & (hit == 0), float("-inf"), z)
        z = tl.where(hit, z - margin * scale, z)
        new = tl.maximum(run_max, tl.max(z, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
        z -= safe[None, :]
        e = tl.exp(z)
        lag = tl.where(run_sum == 0, 0.0, run_max - safe)
        decay = tl.exp(run_max - safe)
        run_dot = (run_dot + run_sum * lag) * decay + tl.sum(tl.where(e == 0, 0.0, e * z), 0)
        run_sum = run_sum * decay + tl.sum(e, 0)
        run_max = new
    tl.store(max_ptr + s, run_max, s < S)
    tl.store(sum_ptr + s, run_sum, s < S)
    tl.store(edot_ptr + s, run_dot, s < S)


def column_stats(dot_RS: Tensor, state: ColumnState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
                 softcap=0.0, soft_S=None, margin=0.0, limit_R=None):  # fmt: skip
    R, S = dot_RS.shape
    if R == 0 or S == 0:
        return
    unused = target_R
    with torch.cuda.device_of(dot_RS):
        _column_kernel[(triton.cdiv(S, COLUMNS),)](
            dot_RS, dot_RS.stride(0), *state, target_R, scale, unused if bias_S is None else bias_S,
            unused if row_id_R is None else row_id_R, unused if col_id_S is None else col_id_S, col0, R, S, softcap,
            margin, unused if limit_R is None else limit_R, HAS_BIAS=bias_S is not None, HAS_ID=row_id_R is not None,
            HAS_CAP=bool(softcap), HAS_LIMIT=limit_R is not None, BLOCK_R=ROWS, BLOCK_S=COLUMNS, num_warps=4,
        )  # fmt: skip
