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
                       nll_ptr, entropy_ptr, excess_ptr, margin, columns, N, HAS_SKIP: tl.constexpr,
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
    above = tl.load(above_ptr + n, inside, other=0)
    above = tl.where(nll != nll, columns - 1, above)
    tl.store(nll_ptr + n, tl.where(skip, 0.0, nll), inside)
    tl.store(log_ptr + n, tl.where(skip, 0.0, top + log), inside)  # the log-sum-exp in its place
    tl.store(entropy_ptr + n, tl.where(skip, 0.0, log - mean), inside)
    tl.store(excess_ptr + n, tl.where(skip, 0.0, lag + mean), inside)
    tl.store(above_ptr + n, tl.where(skip, 0, above), inside)
    if HAS_SKIP:
        tl.store(max_ptr + n, tl.where(skip, 0.0, top), inside)
        tl.store(sum_ptr + n, tl.where(skip, 0.0, total), inside)
        tl.store(soft_ptr + n, tl.where(skip, 0.0, tl.load(soft_ptr + n, inside, other=0.0)), inside)


def row_values(state: RowState, columns: int, margin: float, scale: Tensor, skip: Tensor | None) -> RowValues:
    """``state`` is used up."""
    log = state.sum.log()  # torch's own: that of Triton is not exact near 1
    nll, entropy, excess = (torch.empty_like(log) for _ in range(3))
    N = len(log)
    if N:
        with torch.cuda.device_of(log):  # the launch goes to the current device
            _row_values_kernel[(triton.cdiv(N, BLOCK),)](
                *state, log, scale, state.above if skip is None else skip.view(torch.uint8), nll, entropy, excess,
                margin, columns, N, HAS_SKIP=skip is not None, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return RowValues(nll, log, entropy, state.soft, state.max, state.sum, state.above, excess)
