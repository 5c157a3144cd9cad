"""Triton: turn a tile of inner products into gradient coefficients, in place. One program owns one row.

Formula, names and the meaning of every argument: ``cosup.kernels.reference``. ``out_RS`` may be a narrower view of the
tile's own memory (16-bit coefficients at the front of each float32 row): a program writes a block only after all of its
threads have read it, and never ahead of what is still to be read. Else a thread writes what it alone has read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosup.kernels.product import ROWS_AT_ONCE
from cosup.kernels.tile_stats import exp, target_logit, tile_logits

BLOCK_BYTES, WARPS, UNROLL = 16, 8, 2  # that a thread reads at once; blocks in flight


@triton.jit
def _coefficients(dot_ptr, out_ptr, shift, a, b, z_own, chain_own, row, s, S, hit, scale, bias_ptr, row_id_ptr,
                  col_id_ptr, limit_ptr, softcap, soft_ptr, e, h, col_shift_ptr, col_a_ptr, HAS_BIAS: tl.constexpr,
                  HAS_ID: tl.constexpr, HAS_CAP: tl.constexpr, HAS_SOFT: tl.constexpr, HAS_LIMIT: tl.constexpr,
                  HAS_H: tl.constexpr, HAS_COLUMNS: tl.constexpr, NARROW: tl.constexpr,
                  WHOLE: tl.constexpr):  # fmt: skip
    """Those of columns s of one row, its target where ``hit``, into their place."""
    z, chain = tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, row, s, S, hit, softcap,
                           HAS_BIAS, HAS_ID, HAS_CAP, HAS_LIMIT, WHOLE)  # fmt: skip
    z = tl.where(hit, z_own, z)
    p = exp(z - shift)
    if HAS_H:
        p = tl.where(p == 0, 0.0, (a + h * (z - shift)) * p)
    else:
        p = a * p
    c = p - tl.where(hit, b, 0.0)
    if HAS_SOFT:
        soft = tl.load(soft_ptr + s) if WHOLE else tl.load(soft_ptr + s, s < S, other=0.0)
        c -= tl.where(z == float("-inf"), 0.0, e * soft) if HAS_ID or HAS_LIMIT else e * soft
    if HAS_COLUMNS:
        col_a = tl.load(col_a_ptr + s) if WHOLE else tl.load(col_a_ptr + s, s < S, other=0.0)
        col_shift = tl.load(col_shift_ptr + s) if WHOLE else tl.load(col_shift_ptr + s, s < S, other=0.0)
        c += col_a * exp(z - col_shift)
    if HAS_CAP:
        c *= tl.where(hit, chain_own, chain)
    if NARROW:
        tl.debug_barrier()  # every thread has read its part of the block before any writes
    c = c.to(out_ptr.dtype.element_ty)
    if WHOLE:
        tl.store(out_ptr + s, c)
    else:
        tl.store(out_ptr + s, c, s < S)


@triton.jit
def _grad_kernel(dot_ptr, stride_R, out_ptr, out_stride_R, shift_ptr, a_ptr, b_ptr, target_ptr, scale_ptr,
                 bias_ptr, row_id_ptr, col_id_ptr, col0, S, softcap, soft_ptr, margin, limit_ptr, own_ptr, e_ptr, h_ptr,
                 col_shift_ptr, col_a_ptr, count_ptr, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr,
                 HAS_CAP: tl.constexpr, HAS_SOFT: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_OWN: tl.constexpr,
                 HAS_H: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_COUNT: tl.constexpr, ROWS_AT_ONCE: tl.constexpr,
                 BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    beyond = False
    if HAS_COUNT:
        count = tl.load(count_ptr)
        if row >= tl.cdiv(count, ROWS_AT_ONCE) * ROWS_AT_ONCE:
            return
        beyond = row >= count
    dot_ptr += row * stride_R
    out_ptr += row * out_stride_R
    scale = tl.load(scale_ptr)
    shift = tl.load(shift_ptr + row)
    a = tl.load(a_ptr + row)
    b = tl.load(b_ptr + row)
    idle = ((a == 0) & (b == 0)) | beyond
    e = 0.0
    h = 0.0
    if HAS_SOFT:
        e = tl.load(e_ptr + row)
        idle = (idle & (e == 0)) | beyond
    if HAS_H:
        h = tl.load(h_ptr + row)
    target = tl.load(target_ptr + row)
    own, z_own, chain_own, rounded = target_logit(dot_ptr, own_ptr, bias_ptr, scale, row, target, col0, S, softcap,
                                                  HAS_BIAS, HAS_CAP, HAS_OWN)  # fmt: skip
    z_own -= margin * scale
    NARROW: tl.constexpr = dot_ptr.dtype.element_ty != out_ptr.dtype.element_ty
    tl.debug_barrier()  # every thread has read the target's before any writes
    block = tl.arange(0, BLOCK)
    if idle & (not HAS_COLUMNS):  # whatever its logits are
        for s0 in range(0, S, BLOCK):
            tl.store(out_ptr + s0 + block, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), s0 + block < S)
    else:
        whole = S // (BLOCK * UNROLL) * (BLOCK * UNROLL)
        for s0 in range(0, whole, BLOCK * UNROLL):
            for u in tl.static_range(UNROLL):
                first = s0 + u * BLOCK
                _coefficients(dot_ptr, out_ptr, shift, a, b, z_own, chain_own, row, first + block, S,
                              block == own - first, scale, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, softcap,
                              soft_ptr, e, h, col_shift_ptr, col_a_ptr, HAS_BIAS, HAS_ID, HAS_CAP, HAS_SOFT, HAS_LIMIT,
                              HAS_H, HAS_COLUMNS, NARROW, True)  # fmt: skip
        for s0 in range(whole, S, BLOCK):
            _coefficients(dot_ptr, out_ptr, shift, a, b, z_own, chain_own, row, s0 + block, S, block == own - s0, scale,
                          bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, softcap, soft_ptr, e, h, col_shift_ptr,
                          col_a_ptr, HAS_BIAS, HAS_ID, HAS_CAP, HAS_SOFT, HAS_LIMIT, HAS_H, HAS_COLUMNS, NARROW,
                          False)  # fmt: skip


def tile_grad(dot_RS: Tensor, out_RS: Tensor, shift_R, a_R, b_R, col0, target_R, scale, bias_S=None, row_id_R=None,
              col_id_S=None, softcap=0.0, soft_S=None, margin=0.0, limit_R=None, own_R=None, e_R=None, h_R=None,
              col_shift_S=None, col_a_S=None, count=None):  # fmt: skip
    """``count``: int32 scalar on the device, rows from there on are 0, up to a multiple of ROWS_AT_ONCE; from there on
    they are left alone."""
    R, S = dot_RS.shape
    if R == 0 or S == 0:
        return
    unused = target_R  # a pointer that a kernel without the feature never reads
    with torch.cuda.device_of(dot_RS):  # the launch goes to the current device
        _grad_kernel[(R,)](
            dot_RS, dot_RS.stride(0), out_RS, out_RS.stride(0), shift_R, a_R, b_R, target_R, scale,
            unused if bias_S is None else bias_S, unused if row_id_R is None else row_id_R,
            unused if col_id_S is None else col_id_S, col0, S, softcap, unused if soft_S is None else soft_S, margin,
            unused if limit_R is None else limit_R, unused if own_R is None else own_R,
            unused if e_R is None else e_R, unused if h_R is None else h_R,
            unused if col_shift_S is None else col_shift_S, unused if col_a_S is None else col_a_S,
            unused if count is None else count,
            HAS_BIAS=bias_S is not None, HAS_ID=row_id_R is not None, HAS_CAP=bool(softcap),
            HAS_SOFT=soft_S is not None, HAS_LIMIT=limit_R is not None, HAS_OWN=own_R is not None,
            HAS_H=h_R is not None, HAS_COLUMNS=col_a_S is not None, HAS_COUNT=count is not None,
            ROWS_AT_ONCE=ROWS_AT_ONCE,
            BLOCK=32 * WARPS * BLOCK_BYTES // dot_RS.element_size(), UNROLL=UNROLL, num_warps=WARPS,
        )  # fmt: skip
