"""Triton: inner products of rows and columns merged into the rows' statistic as they are made: no tile reaches memory.

Formula and names: ``cosup.kernels.reference``. Programs stay and take one tile after the other; each leaves the
statistic of every row in it, and a second kernel merges those. Tiles go in groups of rows, which stay in cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.tools.tensor_descriptor import TensorDescriptor

from cosup.kernels.reference import RowState
from cosup.kernels.tile_stats import to_logits

COLUMNS = 128  # that share one statistic, half a tile or all of it
FIELDS = 5  # of a statistic: max, sum, dot, soft, above
MERGED_ROWS, MERGED_TILES = 32, 32  # that a program of the second kernel takes at once
SPILLS_WIDE = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)  # tiles of 256 columns on Blackwell


class Tile(NamedTuple):
    """Rows, columns and features of a tile, rows of tiles in a group; warps to a program, stages of its pipeline."""

    BLOCK_R: int
    BLOCK_S: int
    BLOCK_D: int
    GROUP: int
    num_warps: int
    num_stages: int


def tile_for(target: GPUTarget, features: bool) -> Tile:
    """What fits the registers and the shared memory; ``features``: any beyond the scale. Compiled, not yet measured."""
    if target.backend == "hip":
        return Tile(128, 128, 64, 8, num_warps=8, num_stages=2)
    if not has_descriptors(target) or target.arch >= 120:
        return Tile(128, 128, 64, 8, num_warps=8, num_stages=3)
    wide = not SPILLS_WIDE if target.arch >= 100 else not features
    return Tile(128, 256 if wide else 128, 64, 16, num_warps=8, num_stages=4)


def has_descriptors(target: GPUTarget) -> bool:
    """Whether the chip copies tiles by descriptor (Nvidia's TMA)."""
    return target.backend == "cuda" and target.arch >= 90


@triton.jit
def _load(rows, stride, step, first, d, limit, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """A block of rows' features, zeros outside, where there are no descriptors."""
    r = first + tl.arange(0, BLOCK)
    f = d + tl.arange(0, BLOCK_D)
    place = r.to(tl.int64)[:, None] * stride + f.to(tl.int64) * step
    return tl.load(rows + place, (r < limit)[:, None] & (f < D), other=0.0)


@triton.jit
def _leave(dot, i, j, part_ptr, stride_field, stride_tile, target_logit_ptr, threshold_ptr, target_ptr, scale, bias_ptr,
           row_id_ptr, col_id_ptr, soft_ptr, col0, R, S, softcap, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr,
           HAS_CAP: tl.constexpr, HAS_SOFT: tl.constexpr, HAS_RANK: tl.constexpr, BLOCK_R: tl.constexpr,
           COLS: tl.constexpr):  # fmt: skip
    """Leave the statistic of a tile's products, and the logits of targets that stand in it."""
    stride_field = tl.cast(stride_field, tl.int64)  # several of them go beyond 2^31
    r = i * BLOCK_R + tl.arange(0, BLOCK_R)
    s = j * COLS + tl.arange(0, COLS)
    own = tl.load(target_ptr + r, r < R, other=-1) - col0 - j * COLS  # the target's place in this tile
    here = (own >= 0) & (own < tl.minimum(S - j * COLS, COLS))
    own = tl.where(here, own, -1).to(tl.int32)
    bias = tl.load(bias_ptr + s, s < S, other=0.0).to(tl.float32)[None, :] if HAS_BIAS else 0.0
    z, _ = to_logits(dot, scale, bias, softcap, HAS_CAP)
    z = tl.where(s[None, :] < S, z, float("-inf"))
    hit = tl.arange(0, COLS)[None, :] == own[:, None]
    if HAS_ID:
        row_id = tl.load(row_id_ptr + r, r < R, other=0)
        col_id = tl.load(col_id_ptr + s, s < S, other=0)
        z = tl.where((row_id[:, None] == col_id[None, :]) & (hit == 0), float("-inf"), z)
    own_r = tl.sum(tl.where(hit, z, 0.0), 1)
    tl.store(target_logit_ptr + r, own_r, here)
    part = part_ptr + j.to(tl.int64) * stride_tile + r
    if HAS_RANK:
        threshold = tl.load(threshold_ptr + r, r < R, other=0.0)
        above = tl.sum((z > threshold[:, None]).to(tl.float32), 1) - (here & (own_r > threshold)).to(tl.float32)
        tl.store(part + 4 * stride_field, above, r < R)
    if HAS_SOFT:
        soft = tl.load(soft_ptr + s, s < S, other=0.0)[None, :]
        left_out = (soft == 0) | (z == float("-inf")) if HAS_ID else soft == 0
        tl.store(part + 3 * stride_field, tl.sum(tl.where(left_out, 0.0, soft * z), 1), r < R)
    top_r = tl.max(z, 1)
    z -= tl.where(top_r == float("-inf"), 0.0, top_r)[:, None]
    e = tl.exp(z)
    tl.store(part, top_r, r < R)
    tl.store(part + stride_field, tl.sum(e, 1), r < R)
    tl.store(part + 2 * stride_field, tl.sum(tl.where(e == 0, 0.0, e * z), 1), r < R)


@triton.jit
def _product_stats_kernel(x, w, stride_x, step_x, stride_w, step_w, part_ptr, stride_field, stride_tile,
                          target_logit_ptr, threshold_ptr, target_ptr, scale_ptr, bias_ptr, row_id_ptr, col_id_ptr,
                          soft_ptr, col0, R, S, D, softcap, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr,
                          HAS_CAP: tl.constexpr, HAS_SOFT: tl.constexpr, HAS_RANK: tl.constexpr, TMA: tl.constexpr,
                          COLS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
                          GROUP: tl.constexpr):  # fmt: skip
    scale = tl.load(scale_ptr)
    row_tiles = tl.cdiv(R, BLOCK_R)
    col_tiles = tl.cdiv(S, BLOCK_S)
    in_group = GROUP * col_tiles
    for tile in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=TMA):
        top = tile // in_group * GROUP
        height = tl.minimum(row_tiles - top, GROUP)
        i = top + tile % in_group % height
        j = tile % in_group // height
        dot = tl.zeros((BLOCK_R, BLOCK_S), tl.float32)
        for d in range(0, D, BLOCK_D):
            if TMA:
                x_RD = x.load([i * BLOCK_R, d])
                w_SD = w.load([j * BLOCK_S, d])
            else:
                x_RD = _load(x, stride_x, step_x, i * BLOCK_R, d, R, D, BLOCK_R, BLOCK_D)
                w_SD = _load(w, stride_w, step_w, j * BLOCK_S, d, S, D, BLOCK_S, BLOCK_D)
            dot = tl.dot(x_RD, w_SD.T, dot)
        common = (part_ptr, stride_field, stride_tile, target_logit_ptr, threshold_ptr, target_ptr, scale, bias_ptr,
                  row_id_ptr, col_id_ptr, soft_ptr, col0, R, S, softcap)  # fmt: skip
        if BLOCK_S > COLS:  # by halves, which need fewer registers
            left, right = dot.reshape(BLOCK_R, 2, COLS).permute(0, 2, 1).split()
            _leave(left, i, 2 * j, *common, HAS_BIAS, HAS_ID, HAS_CAP, HAS_SOFT, HAS_RANK, BLOCK_R, COLS)
            _leave(right, i, 2 * j + 1, *common, HAS_BIAS, HAS_ID, HAS_CAP, HAS_SOFT, HAS_RANK, BLOCK_R, COLS)
        else:
            _leave(dot, i, j, *common, HAS_BIAS, HAS_ID, HAS_CAP, HAS_SOFT, HAS_RANK, BLOCK_R, COLS)


@triton.jit
def _merge_kernel(part_ptr, stride_field, stride_tile, max_ptr, sum_ptr, dot_ptr, soft_ptr, above_ptr, R, tiles,
                  HAS_RANK: tl.constexpr, HAS_SOFT: tl.constexpr, BLOCK_R: tl.constexpr,
                  BLOCK_T: tl.constexpr):  # fmt: skip
    stride_field = tl.cast(stride_field, tl.int64)
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    run_max = tl.load(max_ptr + r, r < R, other=float("-inf"))
    run_sum = tl.load(sum_ptr + r, r < R, other=0.0)
    run_dot = tl.load(dot_ptr + r, r < R, other=0.0)
    run_soft = tl.load(soft_ptr + r, r < R, other=0.0)
    above = tl.load(above_ptr + r, r < R, other=0)
    for t0 in range(0, tiles, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T).to(tl.int64)
        part = part_ptr + t[:, None] * stride_tile + r[None, :]
        mask = (t < tiles)[:, None] & (r < R)[None, :]
        top = tl.load(part, mask, other=float("-inf"))
        total = tl.load(part + stride_field, mask, other=0.0)
        dot = tl.load(part + 2 * stride_field, mask, other=0.0)
        new = tl.maximum(run_max, tl.max(top, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
        lag = tl.where(total == 0, 0.0, top - safe[None, :])
        decay = tl.exp(top - safe[None, :])
        run_lag = tl.where(run_sum == 0, 0.0, run_max - safe)
        run_decay = tl.exp(run_max - safe)
        run_dot = (run_dot + run_sum * run_lag) * run_decay + tl.sum((dot + total * lag) * decay, 0)
        run_sum = run_sum * run_decay + tl.sum(total * decay, 0)
        run_max = new
        if HAS_SOFT:
            run_soft += tl.sum(tl.load(part + 3 * stride_field, mask, other=0.0), 0)
        if HAS_RANK:
            above += tl.sum(tl.load(part + 4 * stride_field, mask, other=0.0), 0).to(tl.int32)
    tl.store(max_ptr + r, run_max, r < R)
    tl.store(sum_ptr + r, run_sum, r < R)
    tl.store(dot_ptr + r, run_dot, r < R)
    tl.store(soft_ptr + r, run_soft, r < R)
    tl.store(above_ptr + r, above, r < R)


def product_stats(x_RD: Tensor, w_SD: Tensor, state: RowState, parts: Tensor, rank: bool, col0, target_R, scale,
                  bias_S=None, row_id_R=None, col_id_S=None, softcap=0.0, soft_S=None, margin=0.0,
                  limit_R=None, own_R=None):  # fmt: skip
    """Merge the columns w into the running statistic of the rows x, as ``tile_stats`` would their products.

    Args:
        parts: Dense float32 room: FIELDS numbers to each row and COLUMNS columns, those in an even count.
        rank: Whether ``state.above`` is asked; it counts against ``state.target`` as that is before.
    """
    assert not margin and limit_R is None and own_R is None
    (R, D), S = x_RD.shape, len(w_SD)
    if R == 0 or S == 0:
        return
    flags = {"HAS_BIAS": bias_S is not None, "HAS_ID": row_id_R is not None, "HAS_CAP": bool(softcap),
             "HAS_SOFT": soft_S is not None, "HAS_RANK": rank}  # fmt: skip
    target = _target()
    tile = tile_for(target, any(flags.values()))
    tiles = triton.cdiv(S, tile.BLOCK_S)
    statistics = tiles * (tile.BLOCK_S // COLUMNS)
    part_FTR = parts.view(-1)[: FIELDS * statistics * R].view(FIELDS, statistics, R)
    x, w, unused = x_RD, w_SD, target_R
    by_descriptor = has_descriptors(target) and _describable(x_RD) and _describable(w_SD)
    if by_descriptor:
        x = TensorDescriptor.from_tensor(x_RD, [tile.BLOCK_R, tile.BLOCK_D])
        w = TensorDescriptor.from_tensor(w_SD, [tile.BLOCK_S, tile.BLOCK_D])
    programs = min(triton.cdiv(R, tile.BLOCK_R) * tiles, _processors(x_RD))
    with torch.cuda.device_of(x_RD):  # the launch goes to the current device
        _product_stats_kernel[(programs,)](
            x, w, *x_RD.stride(), *w_SD.stride(), part_FTR, part_FTR.stride(0), part_FTR.stride(1), state.target,
            state.target.clone() if rank else unused, target_R, scale, unused if bias_S is None else bias_S,
            unused if row_id_R is None else row_id_R, unused if col_id_S is None else col_id_S,
            unused if soft_S is None else soft_S, col0, R, S, D, softcap, **flags, TMA=by_descriptor, COLS=COLUMNS,
            **tile._asdict(),
        )  # fmt: skip
        _merge_kernel[(triton.cdiv(R, MERGED_ROWS),)](
            part_FTR, part_FTR.stride(0), part_FTR.stride(1), state.max, state.sum, state.dot, state.soft, state.above,
            R, statistics, HAS_RANK=rank, HAS_SOFT=soft_S is not None, BLOCK_R=MERGED_ROWS, BLOCK_T=MERGED_TILES,
        )  # fmt: skip


def _describable(t: Tensor) -> bool:
    item = t.element_size()
    aligned = t.data_ptr() % 16 == 0 and t.stride(0) * item % 16 == 0
    return aligned and t.stride(1) == 1 and t.shape[1] > 0


def _target() -> GPUTarget:
    interpreted = triton.knobs.runtime.interpret
    return GPUTarget("cuda", 90, 32) if interpreted else triton.runtime.driver.active.get_current_target()


def _processors(t: Tensor) -> int:
    return torch.cuda.get_device_properties(t.device).multi_processor_count if t.is_cuda else 4
