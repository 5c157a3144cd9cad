"""Kernels that are not cosup's, or not yet: measured beside those that are, on the tiles of a published shape.

    row_loss_and_grad   a row's statistics and coefficients by one program, its second reading from cache
    gemm_stats          a product that leaves the statistics of its rows behind, so that no pass over the tile is needed

Both take logits scale * x w^T and targets alone, none of the losses' features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _fold(z, run_max, run_sum, c):
    """Products of each lane, along axis 1, into its running statistic."""
    new = tl.maximum(run_max, tl.max(z, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)
    e = tl.exp2((z - safe[:, None]) * c)
    return new, run_sum * tl.exp2((run_max - safe) * c) + tl.sum(e, 1)


@triton.jit
def _row_loss_and_grad_kernel(z_ptr, stride_R, lse_ptr, target_ptr, weight_ptr, scale_ptr, R, S, LANES: tl.constexpr,
                              VEC: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """Few programs, each taking one row after the other, so that the rows in work fit the cache."""
    scale = tl.load(scale_ptr)
    c = scale * LOG2E
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    flat = tl.arange(0, LANES * VEC)
    BLOCK: tl.constexpr = LANES * VEC
    whole = S // (BLOCK * UNROLL) * (BLOCK * UNROLL)
    for row in range(tl.program_id(0), R, tl.num_programs(0)):
        z_row = z_ptr + (tl.full((), 0, tl.int64) + row) * stride_R
        w = tl.load(weight_ptr + row) * scale
        target = tl.load(target_ptr + row).to(tl.int32)
        own = tl.load(z_row + target).to(tl.float32)
        run_max = tl.full((LANES,), float("-inf"), tl.float32)
        run_sum = tl.zeros((LANES,), tl.float32)
        for s0 in range(0, whole, BLOCK * UNROLL):
            for u in tl.static_range(UNROLL):
                z = tl.load(z_row + s0 + u * BLOCK + lane, eviction_policy="evict_last").to(tl.float32)
                run_max, run_sum = _fold(z, run_max, run_sum, c)
        for s0 in range(whole, S, BLOCK):
            s = s0 + lane
            z = tl.load(z_row + s, s < S, other=float("-inf")).to(tl.float32)
            run_max, run_sum = _fold(z, run_max, run_sum, c)
        top = tl.max(run_max, 0)
        total = tl.sum(tl.where(run_sum == 0, 0.0, run_sum * tl.exp2((run_max - top) * c)), 0)
        tl.store(lse_ptr + row, top * scale + tl.log(total))
        a = w / total
        tl.debug_barrier()  # all have read the row
        for s0 in range(0, whole, BLOCK * UNROLL):
            for u in tl.static_range(UNROLL):
                s = s0 + u * BLOCK + flat
                z = tl.load(z_row + s, eviction_policy="evict_first").to(tl.float32)
                p = (a * tl.exp2((z - top) * c)).to(z_ptr.dtype.element_ty)
                tl.store(z_row + s, p, eviction_policy="evict_first")
        for s0 in range(whole, S, BLOCK):
            s = s0 + flat
            z = tl.load(z_row + s, s < S, other=0.0).to(tl.float32)
            tl.store(z_row + s, (a * tl.exp2((z - top) * c)).to(z_ptr.dtype.element_ty), s < S)
        tl.debug_barrier()  # the target's own comes after what any thread wrote there
        tl.store(z_row + target, (a * tl.exp2((own - top) * c) - w).to(z_ptr.dtype.element_ty))


def row_loss_and_grad(z_RS: Tensor, lse_R: Tensor, target_R: Tensor, weight_R: Tensor, scale: Tensor, *, programs: int,
                      lanes: int, unroll: int) -> None:  # fmt: skip
    """z becomes weight * scale * (softmax(scale z) - [target]), in place; lse of each row."""
    R, S = z_RS.shape
    _row_loss_and_grad_kernel[(programs,)](
        z_RS, z_RS.stride(0), lse_R, target_R, weight_R, scale, R, S, LANES=lanes, VEC=16 // z_RS.element_size(),
        UNROLL=unroll, num_warps=lanes // 32,
    )  # fmt: skip


@triton.jit
def _leave(z, i, j, max_ptr, sum_ptr, c, R, S, T, BLOCK_R: tl.constexpr, COLS: tl.constexpr):
    """The statistic of part of a tile: of its logits as they are stored."""
    r = i + tl.arange(0, BLOCK_R)
    s = j * COLS + tl.arange(0, COLS)
    z = tl.where((s < S)[None, :], z.to(tl.float32) * c, float("-inf"))
    top = tl.max(z, 1)
    safe = tl.where(top == float("-inf"), 0.0, top)
    tl.store(max_ptr + r.to(tl.int64) * T + j, top, r < R)
    tl.store(sum_ptr + r.to(tl.int64) * T + j, tl.sum(tl.exp2(z - safe[:, None]), 1), r < R)


@triton.jit
def _gemm_stats_kernel(x, w, z, max_ptr, sum_ptr, scale_ptr, R, S, D, T, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
                       BLOCK_D: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    c = tl.load(scale_ptr) * LOG2E
    row_tiles = tl.cdiv(R, BLOCK_R)
    col_tiles = tl.cdiv(S, BLOCK_S)
    in_group = GROUP * col_tiles
    HALF: tl.constexpr = BLOCK_S // 2
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=True):
        top = tile // in_group * GROUP
        height = tl.minimum(row_tiles - top, GROUP)
        i = (top + tile % in_group % height) * BLOCK_R
        j = tile % in_group // height
        dot = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
        for d in range(0, D, BLOCK_D):
            dot = tl.dot(x.load([i, d]), w.load([j * BLOCK_S, d]).T, dot)
        left, right = dot.reshape(BLOCK_R, 2, HALF).permute(0, 2, 1).split()
        left, right = left.to(z.dtype), right.to(z.dtype)
        z.store([i, j * BLOCK_S], left)
        z.store([i, j * BLOCK_S + HALF], right)
        _leave(left, i, 2 * j, max_ptr, sum_ptr, c, R, S, T, BLOCK_R, HALF)
        _leave(right, i, 2 * j + 1, max_ptr, sum_ptr, c, R, S, T, BLOCK_R, HALF)


def gemm_stats(x_RD: Tensor, w_SD: Tensor, z_RS: Tensor, scale: Tensor, *, block_rows: int, block_cols: int, group: int,
               programs: int) -> Tensor:  # fmt: skip
    """z = x w^T in the operands' 16 bits; log-sum-exp of each row of scale * z."""
    (R, D), S = x_RD.shape, len(w_SD)
    parts = 2 * triton.cdiv(S, block_cols)
    top, total = (torch.empty(R, parts, device=x_RD.device) for _ in range(2))
    blocks = ((x_RD, [block_rows, 64]), (w_SD, [block_cols, 64]), (z_RS, [block_rows, block_cols // 2]))
    _gemm_stats_kernel[(programs,)](
        *(TensorDescriptor.from_tensor(*block) for block in blocks), top, total, scale, R, S, D, parts,
        BLOCK_R=block_rows, BLOCK_S=block_cols, BLOCK_D=64, GROUP=group, num_warps=8, num_stages=3,
    )  # fmt: skip
    return (top + total.log2()).mul_(0.6931471805599453).logsumexp(1)
