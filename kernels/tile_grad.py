"""Triton: turn a tile of inner products into gradient coefficients, in place. One program owns one row.

Formula, names and the meaning of every argument: ``cosup.kernels.reference``. ``out_RS`` may be a narrower view of the
tile's own memory (16-bit coefficients at the front of each float32 row): a program writes a block only after all of its
threads have read it, and never ahead of what is still to be read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosup.kernels.tile_stats import BLOCK_S, WARPS, tile_logits


@triton.jit
def _grad_kernel(dot_ptr, stride_R, out_ptr, out_stride_R, shift_ptr, a_ptr, b_ptr, target_ptr, scale_ptr,
                 bias_ptr, row_id_ptr, col_id_ptr, col0, S, softcap, soft_ptr, margin, limit_ptr, e_ptr, h_ptr,
                 col_shift_ptr, col_a_ptr, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr, HAS_CAP: tl.constexpr,
                 HAS_SOFT: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_H: tl.constexpr, HAS_COLUMNS: tl.constexpr,
                 BLOCK_S: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    dot_ptr += row * stride_R
    out_ptr += row * out_stride_R
    scale = tl.load(scale_ptr)
    target = tl.load(target_ptr + row)
    shift = tl.load(shift_ptr + row)
    a = tl.load(a_ptr + row)
    b = tl.load(b_ptr + row)
    idle = (a == 0) & (b == 0)
    if HAS_SOFT:
        e = tl.load(e_ptr + row)
        idle = idle & (e == 0)
    if HAS_H:
        h = tl.load(h_ptr + row)
    for s0 in range(0, S, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S).to(tl.int64)
        z, chain = tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, margin, row, s, S, col0 + s,
                               target, softcap, HAS_BIAS, HAS_ID, HAS_CAP, HAS_LIMIT)  # fmt: skip
        p = tl.exp(z - shift)
        if HAS_H:
            p = tl.where(p == 0, 0.0, (a + h * (z - shift)) * p)
        else:
            p = a * p
        c = p - tl.where(col0 + s == target, b, 0.0)
        if HAS_SOFT:
            soft = tl.load(soft_ptr + s, s < S, other=0.0)
            c -= tl.where(z == float("-inf"), 0.0, e * soft) if HAS_ID or HAS_LIMIT else e * soft
        if HAS_COLUMNS:
            col_a = tl.load(col_a_ptr + s, s < S, other=0.0)
            c = (c + col_a * tl.exp(z - tl.load(col_shift_ptr + s, s < S, other=0.0))) * chain
        else:
            c = tl.where(idle, 0.0, c * chain)
        tl.debug_barrier()  # every thread has read its part of the block before any writes
        tl.store(out_ptr + s, c.to(out_ptr.dtype.element_ty), s < S)


def tile_grad(dot_RS: Tensor, out_RS: Tensor, shift_R, a_R, b_R, col0, target_R, scale, bias_S=None, row_id_R=None,
              col_id_S=None, softcap=0.0, soft_S=None, margin=0.0, limit_R=None, e_R=None, h_R=None, col_shift_S=None,
              col_a_S=None):  # fmt: skip
    R, S = dot_RS.shape
    if R == 0 or S == 0:
        return
    unused = target_R  # a pointer that a kernel without the feature never reads
    with torch.cuda.device_of(dot_RS):  # the launch goes to the current device
        _grad_kernel[(R,)](
            dot_RS, dot_RS.stride(0), out_RS, out_RS.stride(0), shift_R, a_R, b_R, target_R, scale,
            unused if bias_S is None else bias_S, unused if row_id_R is None else row_id_R,
            unused if col_id_S is None else col_id_S, col0, S, softcap, unused if soft_S is None else soft_S, margin,
            unused if limit_R is None else limit_R, unused if e_R is None else e_R, unused if h_R is None else h_R,
            unused if col_shift_S is None else col_shift_S, unused if col_a_S is None else col_a_S,
            HAS_BIAS=bias_S is not None, HAS_ID=row_id_R is not None, HAS_CAP=bool(softcap),
            HAS_SOFT=soft_S is not None, HAS_LIMIT=limit_R is not None, HAS_H=h_R is not None,
            HAS_COLUMNS=col_a_S is not None,
            BLOCK_S=min(BLOCK_S, triton.next_power_of_2(S)), num_warps=WARPS,
        )  # fmt: skip
