"""Triton: some rows of a problem first, the others after them: counted, gathered and put back by the device alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosup.kernels.product import ROWS_AT_ONCE

BLOCK_N, BLOCK_D = 2048, 1024  # rows ordered, features moved at once


@triton.jit
def _targets_kernel(target_ptr, out_ptr, skip_ptr, good_ptr, ignore, M, N, BLOCK_N: tl.constexpr):
    bad = 0
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        target = tl.load(target_ptr + n, n < N, other=ignore)
        skip = target == ignore
        bad += tl.sum(((skip == 0) & ((target < 0) | (target >= M))).to(tl.int32), 0)
        tl.store(out_ptr + n, tl.where(skip, -1, target), n < N)
        tl.store(skip_ptr + n, skip.to(tl.uint8), n < N)
    tl.store(good_ptr, tl.where(bad == 0, 1, 0))


def look_up(target_N: Tensor, ignore_index: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, -1 where they are ignored; whether each is; whether all others are in [0, columns)."""
    found = torch.empty_like(target_N)
    skip, good = (torch.empty(size, dtype=torch.bool, device=found.device) for size in (found.shape, ()))
    with torch.cuda.device_of(found):  # the launch goes to the current device
        _targets_kernel[(1,)](target_N, found, skip.view(torch.uint8), good.view(torch.uint8), ignore_index, columns,
                              len(found), BLOCK_N=BLOCK_N, num_warps=8)  # fmt: skip
    return found, skip, good


@triton.jit
def _order_kernel(skip_ptr, target_ptr, rows_ptr, moved_ptr, count_ptr, N, BLOCK_N: tl.constexpr):
    kept = 0
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        kept += tl.sum((tl.load(skip_ptr + n, n < N, other=1) == 0).to(tl.int32), 0)
    tl.store(count_ptr, kept)
    first = 0
    last = kept
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        keep = (tl.load(skip_ptr + n, n < N, other=1) == 0).to(tl.int32)
        leave = (n < N).to(tl.int32) - keep
        place = tl.where(keep != 0, first + tl.cumsum(keep, 0), last + tl.cumsum(leave, 0)) - 1
        tl.store(rows_ptr + place, n.to(tl.int64), n < N)
        tl.store(moved_ptr + place, tl.load(target_ptr + n, n < N, other=-1), n < N)
        first += tl.sum(keep, 0)
        last += tl.sum(leave, 0)


def order(skip_N: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows that are not skipped, in order, then the others: [N] int64; their targets; and how many the first are:
    int32 scalar."""
    rows, moved = torch.empty_like(target_N), torch.empty_like(target_N)
    count = torch.empty((), dtype=torch.int32, device=rows.device)
    with torch.cuda.device_of(rows):  # the launch goes to the current device
        _order_kernel[(1,)](skip_N.view(torch.uint8), target_N, rows, moved, count, len(rows), BLOCK_N=BLOCK_N,
                            num_warps=8)  # fmt: skip
    return rows, moved, count


@triton.jit
def _move_kernel(from_ptr, stride_from, step_from, to_ptr, rows_ptr, count_ptr, D, GATHER: tl.constexpr,
                 ROWS_AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    count = tl.load(count_ptr)
    counted = n < count
    row = tl.load(rows_ptr + n)
    if GATHER:
        if n >= tl.cdiv(count, ROWS_AT_ONCE) * ROWS_AT_ONCE:
            return
        from_ptr += row * stride_from
        to_ptr += n * D
    else:
        from_ptr += n * stride_from
        to_ptr += row * D
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        value = tl.load(from_ptr + d.to(tl.int64) * step_from, (d < D) & counted, other=0.0)
        tl.store(to_ptr + d, value.to(to_ptr.dtype.element_ty), d < D)


def gather(x_ND: Tensor, rows_R: Tensor, count: Tensor) -> Tensor:
    """x[rows] up to the count, zeros from there to a multiple of ROWS_AT_ONCE, and then anything; [R, D]."""
    out_RD = torch.empty(len(rows_R), x_ND.shape[1], dtype=x_ND.dtype, device=x_ND.device)
    _move(x_ND, out_RD, rows_R, count, True)
    return out_RD


def put(part_RD: Tensor, rows_R: Tensor, count: Tensor, out_ND: Tensor) -> None:
    """out[rows] = part up to the count, and 0 beyond it."""
    _move(part_RD, out_ND, rows_R, count, False)


def _move(source: Tensor, to: Tensor, rows_R: Tensor, count: Tensor, gathers: bool) -> None:
    D = source.shape[1]
    with torch.cuda.device_of(to):  # the launch goes to the current device
        _move_kernel[(len(rows_R),)](source, *source.stride(), to, rows_R, count, D, gathers, ROWS_AT_ONCE,
                                     BLOCK_D=min(BLOCK_D, triton.next_power_of_2(D)), num_warps=4)  # fmt: skip
