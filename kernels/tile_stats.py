"""Triton: merge a tile of inner products into the running statistic of its rows, or of its columns.

One program owns one row, or a few columns of some rows. Each of its lanes keeps a statistic of its own, of the few
elements it reads at a time; they are joined once, at the end, so that no thread waits for another in the loop. Whole
blocks are read without a mask, 16 bytes at a time whatever the number of columns.

Formula, names and the meaning of every argument: ``cosup.kernels.reference``. The tile is read once, never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosup.kernels.reference import ColumnState, RowState

LANES, UNROLL = 128, 2  # threads of a row's program; reads of 16 bytes by each that are in flight at once
BLOCK_S = 2048  # columns per step of the sigmoid kernels: eight float32 per thread at 8 warps
WARPS = 8
GROUPS = 4  # warps of a program of the columns' statistic
COLUMN_BYTES = 512  # of a row that each of them takes: 16 to a lane
# programs that it wants, parts of the rows to get there at most, rows of a part at least
COLUMN_PROGRAMS, MOST_PARTS, LEAST_PART = 1056, 8, 256


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
def tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, row, s, S, hit, softcap,
                HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr, HAS_CAP: tl.constexpr, HAS_LIMIT: tl.constexpr,
                WHOLE: tl.constexpr):  # fmt: skip
    """Logits of columns s of one row, without the target's margin; -inf outside the tile, where not all of s is in it
    (``WHOLE``), and at masked columns but the target, where ``hit``. Also d(logit)/du of the softcap."""
    inside = s < S
    dot = (tl.load(dot_ptr + s) if WHOLE else tl.load(dot_ptr + s, inside, other=0.0)).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = (tl.load(bias_ptr + s) if WHOLE else tl.load(bias_ptr + s, inside, other=0.0)).to(tl.float32)
    u, chain = to_logits(dot, scale, bias, softcap, HAS_CAP)
    if HAS_LIMIT:
        u = tl.where((dot * scale > tl.load(limit_ptr + row)) & (hit == 0), float("-inf"), u)
    if HAS_ID:
        col_id = tl.load(col_id_ptr + s) if WHOLE else tl.load(col_id_ptr + s, inside, other=0)
        u = tl.where((col_id == tl.load(row_id_ptr + row)) & (hit == 0), float("-inf"), u)
    return u if WHOLE else tl.where(inside, u, float("-inf")), chain


@triton.jit
def target_logit(dot_ptr, own_ptr, bias_ptr, scale, row, target, col0, S, softcap, HAS_BIAS: tl.constexpr,
                 HAS_CAP: tl.constexpr, HAS_OWN: tl.constexpr):  # fmt: skip
    """The target's place in the tile, -1 if it is elsewhere; its logit without margin, NaN there, and d(logit)/du; the
    same logit by the tile's own element, which ``HAS_OWN`` says is not exact."""
    one = tl.arange(0, 1)
    own = (target - col0).to(tl.int64) + one
    here = (own >= 0) & (own < S)
    in_tile = tl.load(dot_ptr + own, here, other=float("nan")).to(tl.float32)
    bias = tl.load(bias_ptr + own, here, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    rounded, chain = to_logits(in_tile, scale, bias, softcap, HAS_CAP)
    z = rounded
    if HAS_OWN:
        exact = tl.load(own_ptr + row + one, here, other=float("nan"))
        z, chain = to_logits(exact, scale, bias, softcap, HAS_CAP)
    return tl.sum(tl.where(here, own, -1).to(tl.int32), 0), tl.sum(z, 0), tl.sum(chain, 0), tl.sum(rounded, 0)


@triton.jit
def exp(x):
    """e^x in three instructions: tl.exp keeps numbers below 1e-38, which no sum here can tell from 0, by eight."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _fold(z, run_max, run_sum, run_dot):
    """Logits of each lane, along axis 1, into its running statistic."""
    new = tl.maximum(run_max, tl.max(z, 1))
    safe = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
    z -= safe[:, None]
    e = exp(z)
    lag = tl.where(run_sum == 0, 0.0, run_max - safe)
    decay = exp(run_max - safe)
    run_dot = (run_dot + run_sum * lag) * decay + tl.sum(e * tl.maximum(z, -200.0), 1)  # no 0 * inf
    return new, run_sum * decay + tl.sum(e, 1), run_dot


@triton.jit
def _decayed(top, total, dot, safe):
    """A statistic's sums, relative to another maximum."""
    lag = tl.where(total == 0, 0.0, top - safe)
    decay = tl.where(total == 0, 0.0, exp(lag))
    return total * decay, tl.where(decay == 0, 0.0, (dot + total * lag) * decay)


@triton.jit
def _joined(top, total, dot):
    """The lanes' statistics, along axis 0, as one."""
    new = tl.max(top, 0)
    safe = tl.where(new == float("-inf"), 0.0, new)
    total, dot = _decayed(top, total, dot, safe)
    return new, tl.sum(total, 0), tl.sum(dot, 0)


@triton.jit
def _merged(top, total, dot, more_top, more_total, more_dot):
    """Two statistics as one."""
    new = tl.maximum(top, more_top)
    safe = tl.where(new == float("-inf"), 0.0, new)
    total, dot = _decayed(top, total, dot, safe)
    more_total, more_dot = _decayed(more_top, more_total, more_dot, safe)
    return new, total + more_total, dot + more_dot


@triton.jit
def _stats_kernel(dot_ptr, stride_R, max_ptr, sum_ptr, edot_ptr, target_logit_ptr, softdot_ptr, above_ptr, target_ptr,
                  scale_ptr, bias_ptr, row_id_ptr, col_id_ptr, col0, S, softcap, soft_ptr, margin, limit_ptr, own_ptr,
                  count_ptr, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr, HAS_CAP: tl.constexpr,
                  HAS_SOFT: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_OWN: tl.constexpr, HAS_COUNT: tl.constexpr,
                  LANES: tl.constexpr, VEC: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if HAS_COUNT:
        if row >= tl.load(count_ptr):
            return
    dot_ptr += row * stride_R
    scale = tl.load(scale_ptr)
    target = tl.load(target_ptr + row)
    own, z_own, chain_own, threshold = target_logit(dot_ptr, own_ptr, bias_ptr, scale, row, target, col0, S, softcap,
                                                    HAS_BIAS, HAS_CAP, HAS_OWN)  # fmt: skip
    here = own >= 0
    threshold = tl.where(here, threshold, tl.load(target_logit_ptr + row))
    lane = tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    run_max = tl.full((LANES,), float("-inf"), tl.float32)
    run_sum = tl.zeros((LANES,), tl.float32)
    run_dot = tl.zeros((LANES,), tl.float32)
    run_soft = tl.zeros((LANES,), tl.float32)
    above = tl.zeros((LANES,), tl.int32)
    BLOCK: tl.constexpr = LANES * VEC
    whole = S // (BLOCK * UNROLL) * (BLOCK * UNROLL)
    for s0 in range(0, whole, BLOCK * UNROLL):
        for u in tl.static_range(UNROLL):
            s = s0 + u * BLOCK + lane
            hit = lane == own - (s0 + u * BLOCK)
            z, chain = tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, row, s, S, hit, softcap,
                                   HAS_BIAS, HAS_ID, HAS_CAP, HAS_LIMIT, True)  # fmt: skip
            if HAS_SOFT:
                soft = tl.load(soft_ptr + s)
                left_out = hit | (soft == 0)
                if HAS_ID or HAS_LIMIT:
                    left_out = left_out | (z == float("-inf"))
                run_soft += tl.sum(tl.where(left_out, 0.0, soft * z), 1)
            z = tl.where(hit, float("-inf"), z)  # it is merged at the end
            above += tl.sum((z > threshold).to(tl.int32), 1)
            run_max, run_sum, run_dot = _fold(z, run_max, run_sum, run_dot)
    for s0 in range(whole, S, BLOCK):
        s = s0 + lane
        hit = s == own
        z, chain = tile_logits(dot_ptr, bias_ptr, row_id_ptr, col_id_ptr, limit_ptr, scale, row, s, S, hit, softcap,
                               HAS_BIAS, HAS_ID, HAS_CAP, HAS_LIMIT, False)  # fmt: skip
        if HAS_SOFT:
            soft = tl.load(soft_ptr + s, s < S, other=0.0)
            left_out = hit | (soft == 0)
            if HAS_ID or HAS_LIMIT:
                left_out = left_out | (z == float("-inf"))
            run_soft += tl.sum(tl.where(left_out, 0.0, soft * z), 1)
        z = tl.where(hit, float("-inf"), z)
        above += tl.sum((z > threshold).to(tl.int32), 1)
        run_max, run_sum, run_dot = _fold(z, run_max, run_sum, run_dot)
    top, total, dot = _joined(run_max, run_sum, run_dot)
    total_soft = tl.sum(run_soft, 0)
    if here:
        tl.store(target_logit_ptr + row, z_own)
        z_own -= margin * scale
        seen = tl.where(z_own == float("-inf"), 0.0, 1.0)
        top, total, dot = _merged(top, total, dot, z_own, seen, 0.0)
        if HAS_SOFT:
            own_soft = tl.load(soft_ptr + own)
            total_soft += tl.where(own_soft == 0, 0.0, own_soft * z_own)
    top, total, dot = _merged(tl.load(max_ptr + row), tl.load(sum_ptr + row), tl.load(edot_ptr + row), top, total, dot)
    tl.store(max_ptr + row, top)
    tl.store(sum_ptr + row, total)
    tl.store(edot_ptr + row, dot)
    tl.store(softdot_ptr + row, tl.load(softdot_ptr + row) + total_soft)
    tl.store(above_ptr + row, tl.load(above_ptr + row) + tl.sum(above, 0))


def tile_stats(dot_RS: Tensor, state: RowState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
               softcap=0.0, soft_S=None, margin=0.0, limit_R=None, own_R=None, count=None):  # fmt: skip
    """``count``: int32 scalar on the device, rows from there on are left alone."""
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
            unused if limit_R is None else limit_R, unused if own_R is None else own_R,
            unused if count is None else count, HAS_BIAS=bias_S is not None, HAS_ID=row_id_R is not None,
            HAS_CAP=bool(softcap), HAS_SOFT=soft_S is not None, HAS_LIMIT=limit_R is not None,
            HAS_OWN=own_R is not None, HAS_COUNT=count is not None, LANES=LANES, VEC=16 // dot_RS.element_size(),
            UNROLL=UNROLL, num_warps=LANES // 32,
        )  # fmt: skip


@triton.jit
def _column_logits(dot_ptr, stride_R, target_ptr, scale, bias, row_id_ptr, col_id, r, R, s, S, col0, softcap, margin,
                   limit_ptr, own_ptr, HAS_ID: tl.constexpr, HAS_CAP: tl.constexpr, HAS_LIMIT: tl.constexpr,
                   HAS_OWN: tl.constexpr):  # fmt: skip
    """Logits of rows r and columns s; -inf outside the tile and at masked columns."""
    inside = (r < R)[:, None] & (s < S)[None, :]
    dot = tl.load(dot_ptr + r.to(tl.int64)[:, None] * stride_R + s[None, :], inside, other=0.0).to(tl.float32)
    hit = (col0 + s)[None, :] == tl.load(target_ptr + r, r < R, other=-1)[:, None]
    if HAS_OWN:
        dot = tl.where(hit, tl.load(own_ptr + r, r < R, other=0.0)[:, None], dot)
    z, chain = to_logits(dot, scale, bias, softcap, HAS_CAP)
    if HAS_LIMIT:
        limit = tl.load(limit_ptr + r, r < R, other=0.0)
        z = tl.where((dot * scale > limit[:, None]) & (hit == 0), float("-inf"), z)
    if HAS_ID:
        row_id = tl.load(row_id_ptr + r, r < R, other=0)
        z = tl.where((row_id[:, None] == col_id) & (hit == 0), float("-inf"), z)
    return tl.where(inside, tl.where(hit, z - margin * scale, z), float("-inf"))


@triton.jit
def _column_kernel(dot_ptr, stride_R, part_ptr, target_ptr, scale_ptr, bias_ptr, row_id_ptr, col_id_ptr, col0, R, S,
                   softcap, margin, limit_ptr, own_ptr, HAS_BIAS: tl.constexpr, HAS_ID: tl.constexpr,
                   HAS_CAP: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_OWN: tl.constexpr, GROUPS: tl.constexpr,
                   COLUMNS: tl.constexpr):  # fmt: skip
    """The statistic of a few columns over some of the rows, into part [parts, 3, S]."""
    s = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    scale = tl.load(scale_ptr)
    bias = tl.load(bias_ptr + s, s < S, other=0.0).to(tl.float32)[None, :] if HAS_BIAS else 0.0
    col_id = tl.load(col_id_ptr + s, s < S, other=0)[None, :] if HAS_ID else 0
    run_max = tl.full((GROUPS, COLUMNS), float("-inf"), tl.float32)
    run_sum = tl.zeros((GROUPS, COLUMNS), tl.float32)
    run_dot = tl.zeros((GROUPS, COLUMNS), tl.float32)
    group = tl.arange(0, GROUPS)  # a row of each to a warp at a time: all that is done is done element by element
    for r0 in range(tl.program_id(1) * 4 * GROUPS, R, tl.num_programs(1) * 4 * GROUPS):
        r = r0 + group
        z0 = _column_logits(dot_ptr, stride_R, target_ptr, scale, bias, row_id_ptr, col_id, r, R, s, S, col0, softcap,
                            margin, limit_ptr, own_ptr, HAS_ID, HAS_CAP, HAS_LIMIT, HAS_OWN)  # fmt: skip
        z1 = _column_logits(dot_ptr, stride_R, target_ptr, scale, bias, row_id_ptr, col_id, r + GROUPS, R, s, S, col0,
                            softcap, margin, limit_ptr, own_ptr, HAS_ID, HAS_CAP, HAS_LIMIT, HAS_OWN)  # fmt: skip
        z2 = _column_logits(dot_ptr, stride_R, target_ptr, scale, bias, row_id_ptr, col_id, r + 2 * GROUPS, R, s, S,
                            col0, softcap, margin, limit_ptr, own_ptr, HAS_ID, HAS_CAP, HAS_LIMIT,
                            HAS_OWN)  # fmt: skip
        z3 = _column_logits(dot_ptr, stride_R, target_ptr, scale, bias, row_id_ptr, col_id, r + 3 * GROUPS, R, s, S,
                            col0, softcap, margin, limit_ptr, own_ptr, HAS_ID, HAS_CAP, HAS_LIMIT,
                            HAS_OWN)  # fmt: skip
        new = tl.maximum(run_max, tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3)))
        safe = tl.where(new == float("-inf"), 0.0, new)  # nothing but -inf so far
        z0, z1, z2, z3 = z0 - safe, z1 - safe, z2 - safe, z3 - safe
        e0, e1, e2, e3 = exp(z0), exp(z1), exp(z2), exp(z3)
        run_sum, run_dot = _decayed(run_max, run_sum, run_dot, safe)
        run_sum += (e0 + e1) + (e2 + e3)
        run_dot += e0 * tl.maximum(z0, -200.0) + e1 * tl.maximum(z1, -200.0)
        run_dot += e2 * tl.maximum(z2, -200.0) + e3 * tl.maximum(z3, -200.0)
        run_max = new
    top, total, dot = _joined(run_max, run_sum, run_dot)
    part_ptr += tl.program_id(1) * 3 * S + s
    tl.store(part_ptr, top, s < S)
    tl.store(part_ptr + S, total, s < S)
    tl.store(part_ptr + 2 * S, dot, s < S)


@triton.jit
def _column_merge_kernel(part_ptr, max_ptr, sum_ptr, edot_ptr, S, parts, COLUMNS: tl.constexpr):
    s = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    top = tl.load(max_ptr + s, s < S, other=float("-inf"))
    total = tl.load(sum_ptr + s, s < S, other=0.0)
    dot = tl.load(edot_ptr + s, s < S, other=0.0)
    for p in range(parts):
        part = part_ptr + p * 3 * S + s
        more = tl.load(part, s < S, other=float("-inf"))
        more_total = tl.load(part + S, s < S, other=0.0)
        top, total, dot = _merged(top, total, dot, more, more_total, tl.load(part + 2 * S, s < S, other=0.0))
    tl.store(max_ptr + s, top, s < S)
    tl.store(sum_ptr + s, total, s < S)
    tl.store(edot_ptr + s, dot, s < S)


def column_stats(dot_RS: Tensor, state: ColumnState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
                 softcap=0.0, soft_S=None, margin=0.0, limit_R=None, own_R=None):  # fmt: skip
    R, S = dot_RS.shape
    if R == 0 or S == 0:
        return
    unused, columns = target_R, COLUMN_BYTES // dot_RS.element_size()
    parts = min(MOST_PARTS, triton.cdiv(COLUMN_PROGRAMS, triton.cdiv(S, columns)), triton.cdiv(R, LEAST_PART))
    part_P3S = torch.empty(parts, 3, S, dtype=torch.float32, device=dot_RS.device)
    with torch.cuda.device_of(dot_RS):
        _column_kernel[(triton.cdiv(S, columns), parts)](
            dot_RS, dot_RS.stride(0), part_P3S, target_R, scale, unused if bias_S is None else bias_S,
            unused if row_id_R is None else row_id_R, unused if col_id_S is None else col_id_S, col0, R, S, softcap,
            margin, unused if limit_R is None else limit_R, unused if own_R is None else own_R,
            HAS_BIAS=bias_S is not None, HAS_ID=row_id_R is not None, HAS_CAP=bool(softcap),
            HAS_LIMIT=limit_R is not None, HAS_OWN=own_R is not None, GROUPS=GROUPS, COLUMNS=columns, num_warps=GROUPS,
        )  # fmt: skip
        _column_merge_kernel[(triton.cdiv(S, 256),)](part_P3S, *state, S, parts, COLUMNS=256, num_warps=4)
