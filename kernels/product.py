"""Triton: a product of a tensor's first rows, or a sum over the first ones, as many as the device has counted: the host
does not know the number, and what is beyond it costs no time.

Programs stay and take one tile after the other; operands and result go by descriptor (Nvidia's TMA). Tiles go in groups
of rows, which stay in cache. Sums are float32.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

ROWS_AT_ONCE = 128  # of a tile: rows beyond the counted ones, up to a multiple of it, are multiplied too


class Tile(NamedTuple):
    """Rows, columns and summands of a tile, rows of tiles in a group; warps to a program, stages of its pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 64
    GROUP: int = 8
    num_warps: int = 8
    num_stages: int = 3


WIDE, NARROW = Tile(ROWS_AT_ONCE, 256), Tile(ROWS_AT_ONCE, 128, num_stages=4)
NARROW_SHARE = 0.58  # of a wide tile's time


def tile_for(m: int, n: int, processors: int) -> Tile:
    """Wide ones, unless so many processors would wait for the last of them that narrow ones are done earlier."""

    def rounds(tile: Tile) -> int:
        return -(-triton.cdiv(m, tile.BLOCK_M) * triton.cdiv(n, tile.BLOCK_N) // processors)

    return NARROW if NARROW_SHARE * rounds(NARROW) < rounds(WIDE) else WIDE


@triton.jit
def _product_kernel(a, b, out, count_ptr, M, N, K, OF_ROWS: tl.constexpr, A_IN_COLUMNS: tl.constexpr,
                    B_IN_COLUMNS: tl.constexpr, ADD: tl.constexpr, REDUCE: tl.constexpr, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """out [M, N] = a [M, K] b [K, N], or added to it; IN_COLUMNS: the operand lies transposed in memory."""
    if OF_ROWS:
        M = tl.load(count_ptr)
    else:
        K = tl.load(count_ptr)
    row_tiles = tl.cdiv(M, BLOCK_M)
    col_tiles = tl.cdiv(N, BLOCK_N)
    in_group = GROUP * col_tiles
    HALF: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=True):
        top = tile // in_group * GROUP
        height = tl.minimum(row_tiles - top, GROUP)
        i = (top + tile % in_group % height) * BLOCK_M
        j = tile % in_group // height * BLOCK_N
        dot = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            a_MK = a.load([k, i]).T if A_IN_COLUMNS else a.load([i, k])
            b_KN = b.load([j, k]).T if B_IN_COLUMNS else b.load([k, j])
            dot = tl.dot(a_MK, b_KN, dot)
        left, right = dot.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()  # by halves, which need less room
        if ADD and REDUCE:
            out.atomic_add([i, j], left)
            out.atomic_add([i, j + HALF], right)
        elif ADD:
            out.store([i, j], out.load([i, j]) + left)
            out.store([i, j + HALF], out.load([i, j + HALF]) + right)
        else:
            out.store([i, j], left.to(out.dtype))
            out.store([i, j + HALF], right.to(out.dtype))


def product(a_MK: Tensor, b_KN: Tensor, out_MN: Tensor, count: Tensor, *, of_rows: bool, add: bool = False) -> None:
    """out = a @ b for the first ``count`` rows of a, or over the first ``count`` summands; to a float32 ``out`` it may
    be added. 16-bit operands, dense in rows or columns that start on 16 bytes.

    Rows of ``out`` up to a multiple of ROWS_AT_ONCE are written, and so many summands are read: those beyond the count
    must be 0 in both operands.

    Args:
        count: int32 scalar on the device, at most M or K.
        of_rows: Whether it counts rows, else summands.
    """
    assert not add or out_MN.dtype == torch.float32
    (M, K), N = a_MK.shape, b_KN.shape[1]
    tile = tile_for(M, N, _processors(a_MK))
    a_in_columns, b_in_columns = (t.stride(1) != 1 for t in (a_MK, b_KN))
    programs = min(triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N), _processors(a_MK))
    with torch.cuda.device_of(a_MK):  # the launch goes to the current device
        _product_kernel[(programs,)](
            _described(a_MK, tile.BLOCK_M, tile.BLOCK_K), _described(b_KN, tile.BLOCK_K, tile.BLOCK_N),
            TensorDescriptor.from_tensor(out_MN, [tile.BLOCK_M, tile.BLOCK_N // 2]), count, M, N, K, OF_ROWS=of_rows,
            A_IN_COLUMNS=a_in_columns, B_IN_COLUMNS=b_in_columns, ADD=add,
            REDUCE=not triton.knobs.runtime.interpret,  # which has no reductions by descriptor
            **tile._asdict(),
        )  # fmt: skip


def _described(t: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, [rows, cols]) if t.stride(1) == 1 else _described(t.mT, cols, rows)


def _processors(t: Tensor) -> int:
    return _processors_of(t.device) if t.is_cuda else 4


@functools.cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
