"""Triton: each row's inner product with its target alone, in float32, for tiles that are rounded to 16 bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D = 1024  # features that a program multiplies at once


@triton.jit
def _target_dots_kernel(x_ptr, stride_x, step_x, w_ptr, stride_w, step_w, target_ptr, out_ptr, rows_ptr, col0, M, D,
                        HAS_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    own = tl.load(target_ptr + n) - col0
    row = tl.load(rows_ptr + n) if HAS_ROWS else n
    here = (own >= 0) & (own < M)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (d < D) & here
        x = tl.load(x_ptr + row * stride_x + d * step_x, inside, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + own * stride_w + d * step_w, inside, other=0.0).to(tl.float32)
        total += x * w
    tl.store(out_ptr + n, tl.sum(total, 0))


def target_dots(x_ND: Tensor, w_MD: Tensor, target_R: Tensor, col0: int, rows_R: Tensor | None = None) -> Tensor:
    """<x[rows[r]], w[target[r] - col0]>, summed in float32; [R]. 0 where the target is no row of w."""
    R, M, D = len(target_R), *w_MD.shape
    out = torch.empty(R, dtype=torch.float32, device=x_ND.device)
    if R:
        with torch.cuda.device_of(x_ND):  # the launch goes to the current device
            _target_dots_kernel[(R,)](
                x_ND, *x_ND.stride(), w_MD, *w_MD.stride(), target_R, out, target_R if rows_R is None else rows_R, col0,
                M, D, HAS_ROWS=rows_R is not None, BLOCK_D=min(BLOCK_D, triton.next_power_of_2(max(D, 1))), num_warps=4,
            )  # fmt: skip
    return out
