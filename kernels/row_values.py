"""Triton: what a row's statistic says, all fields at once: a launch for each of their operations would take longer.

Formulas: ``cosup.kernels.reference.row_values``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosup.kernels.reference import RowState, RowValues

BLOCK = 256  # rows of a program


@triton.jit
def _row_values_kernel(max_ptr, sum_ptr, dot_ptr, target_ptr, soft_ptr, above_ptr, log_ptr, scale_ptr, skip_ptr,
                       rows_ptr, count_ptr, nll_out, lse_out, entropy_out, soft_out, max_out, sum_out, above_out,
                       excess_out, margin, columns, N, HAS_SKIP: tl.constexpr, HAS_ROWS: tl.constexpr,
                       BLOCK: tl.constexpr):  # fmt: skip
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    top = tl.load(max_ptr + n, inside, other=0.0)
    total = tl.load(sum_ptr + n, inside, other=1.0)
    log = tl.load(log_ptr + n, inside, other=0.0)
    mean = tl.load(dot_ptr + n, inside, other=0.0) / total
    lag = (top - tl.load(target_ptr + n, inside, other=0.0)) + margin * tl.load(scale_ptr)
    nll = log + lag
    skip = tl.load(skip_ptr + n, inside, other=0) != 0 if HAS_SKIP else n < 0
    if HAS_ROWS:
        skip = n >= tl.load(count_ptr)
    above = tl.load(above_ptr + n, inside, other=0)
    above = tl.where(nll != nll, columns - 1, above)
    place = tl.load(rows_ptr + n, inside, other=0) if HAS_ROWS else n
    tl.store(nll_out + place, tl.where(skip, 0.0, nll), inside)
    tl.store(lse_out + place, tl.where(skip, 0.0, top + log), inside)
    tl.store(entropy_out + place, tl.where(skip, 0.0, log - mean), inside)
    tl.store(soft_out + place, tl.where(skip, 0.0, tl.load(soft_ptr + n, inside, other=0.0)), inside)
    tl.store(max_out + place, tl.where(skip, 0.0, top), inside)
    tl.store(sum_out + place, tl.where(skip, 0.0, total), inside)
    tl.store(above_out + place, tl.where(skip, 0, above), inside)
    tl.store(excess_out + place, tl.where(skip, 0.0, lag + mean), inside)


def row_values(state: RowState, columns: int, margin: float, scale: Tensor, skip: Tensor | None,
               rows: Tensor | None = None, count: Tensor | None = None) -> RowValues:  # fmt: skip
    """``rows``: where each row's values go, all of them; ``count``: of those before the rows to skip."""
    log = state.sum.log()  # torch's own: that of Triton is not exact near 1
    values = RowValues(*(torch.empty_like(state.above if name == "above" else log) for name in RowValues._fields))
    N = len(log)
    unused = state.above  # a pointer that a kernel without the feature never reads
    if N:
        with torch.cuda.device_of(log):  # the launch goes to the current device
            _row_values_kernel[(triton.cdiv(N, BLOCK),)](
                *state, log, scale, unused if skip is None else skip.view(torch.uint8),
                unused if rows is None else rows, unused if count is None else count, *values, margin, columns, N,
                HAS_SKIP=skip is not None, HAS_ROWS=rows is not None, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return values
