"""Triton: the sigmoid loss of a tile of inner products, and its gradient coefficients. One program owns one row.

Formula, names and the meaning of every argument: ``cosup.kernels.reference``. As for the softmax, coefficients may lie
at the front of the tile's own rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosup.kernels.reference import RowState
from cosup.kernels.tile_stats import BLOCK_S, WARPS, tile_logits


@triton.jit
def exp_of_negative(x):
    """e^x of x <= 0 to the last digits: a GPU's own, exp2(x log2(e)), has the rounding error of its argument."""
    x = tl.where(x < -200.0, -200.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693145751953125) - n * 1.42860677e-6  # ln(2) in two parts, of which n times the first is exact
    return tl.exp2(n) * tl.exp(r)


@triton.jit
def sigmoid_softplus(y):
    """sigma(y), and softplus(y) = max(y, 0) + log1p(exp(-|y|)), to the last digits where they are tiny too."""
    e = exp_of_negative(-tl.abs(y))
    s = e / (2.0 + e)  # log1p(e) = 2 atanh(s), a series to s^15
    s2 = s * s
    p = ((2.0 / 15 * s2 + 2.0 / 13) * s2 + 2.0 / 11) * s2 + 2.0 / 9
    p = ((p * s2 + 2.0 / 7) * s2 + 2.0 / 5) * s2 + 2.0 / 3
    return tl.where(y < 0, e, 1.0) / (1.0 + e), tl.maximum(y, 0.0) + s * (p * s2 + 2.0)


@triton.jit
def signed_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, scale, row, s, S, own, HAS_BIAS: tl.constexpr,
                  HAS_ID: tl.constexpr):  # fmt: skip
    """y and its sign: z and 1, but -z and -1 at the target, column ``own`` of the tile."""
    hit = (s == own) & (s < S)  # the target may be the first column of the next tile
    z, _ = tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, dot_ptr, scale, row, s, S, hit, 0.0, HAS_BIAS, HAS_ID,
                       False, False, False)  # fmt: skip
    return tl.where(hit, -z, z), tl.where(hit, -1.0, 1.0)


@triton.jit
def _sigmoid_stats_kernel(dot_ptr, stride_R, sum_ptr, edot_ptr, soft_ptr, target_ptr, scale_ptr, bias_ptr, row_id_ptr,
                          col_id_ptr, col0, S, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr,
                          BLOCK_S: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dot_ptr += row * stride_R
    scale = tl.load(scale_ptr)
    target = tl.load(target_ptr + row)
    run_sum = tl.load(sum_ptr + row)
    run_dot = tl.load(edot_ptr + row)
    run_soft = tl.load(soft_ptr + row)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
        y, sign = signed_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, scale, row, s, S, target - col0,
                                HAS_BIAS, HAS_ID)  # fmt: skip
        g, loss = sigmoid_softplus(y)
        g *= sign
        run_sum += tl.sum(loss, 0)
        run_soft += tl.sum(g, 0)
        run_dot += tl.sum(g * tl.load(dot_ptr + s, s < S, other=0.0), 0) * scale
    tl.store(sum_ptr + row, run_sum)
    tl.store(edot_ptr + row, run_dot)
    tl.store(soft_ptr + row, run_soft)


def sigmoid_stats(dot_RS: Tensor, state: RowState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
                  *unused):  # fmt: skip
    R, S = dot_RS.shape
    if R == 0 or S == 0:
        return
    absent = target_R  # a pointer that a kernel without the feature never reads
    with torch.cuda.device_of(dot_RS):  # the launch goes to the current device
        _sigmoid_stats_kernel[(R,)](
            dot_RS, dot_RS.stride(0), state.sum, state.dot, state.soft, target_R, scale,
            absent if bias_S is None else bias_S, absent if row_id_R is None else row_id_R,
            absent if col_id_S is None else col_id_S, col0, S, HAS_BIAS=bias_S is not None,
            HAS_ID=row_id_R is not None, BLOCK_S=min(BLOCK_S, triton.next_power_of_2(S)), num_warps=WARPS,
        )  # fmt: skip


@triton.jit
def _sigmoid_grad_kernel(dot_ptr, stride_R, out_ptr, out_stride_R, a_ptr, target_ptr, scale_ptr, bias_ptr, row_id_ptr,
                         col_id_ptr, col0, S, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr,
                         BLOCK_S: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dot_ptr += row * stride_R
    out_ptr += row * out_stride_R
    scale = tl.load(scale_ptr)
    target = tl.load(target_ptr + row)
    a = tl.load(a_ptr + row)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
        y, sign = signed_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, scale, row, s, S, target - col0,
                                HAS_BIAS, HAS_ID)  # fmt: skip
        g, _ = sigmoid_softplus(y)
        c = tl.where(a == 0, 0.0, a * sign * g)
        tl.debug_barrier()  # every thread has read its part of the block before any writes
        tl.store(out_ptr + s, c.to(out_ptr.dtype.element_ty), s < S)


def sigmoid_grad(dot_RS: Tensor, out_RS: Tensor, shift_R, a_R, b_R, col0, target_R, scale, bias_S=None, row_id_R=None,
                 col_id_S=None, *unused):  # fmt: skip
    R, S = dot_RS.shape
    if R == 0 or S == 0:
        return
    absent = target_R  # a pointer that a kernel without the feature never reads
    with torch.cuda.device_of(dot_RS):  # the launch goes to the current device
        _sigmoid_grad_kernel[(R,)](
            dot_RS, dot_RS.stride(0), out_RS, out_RS.stride(0), a_R, target_R, scale,
            absent if bias_S is None else bias_S, absent if row_id_R is None else row_id_R,
            absent if col_id_S is None else col_id_S, col0, S, HAS_BIAS=bias_S is not None,
            HAS_ID=row_id_R is not None, BLOCK_S=min(BLOCK_S, triton.next_power_of_2(S)), num_warps=WARPS,
        )  # fmt: skip
