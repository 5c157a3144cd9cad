"""Triton: a gradient times the upstream one, in place. A factor of 1, the usual one, moves no byte of the gradient; a
product with 0 is 0, whatever the other is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, UNROLL, PROGRAMS = 1024, 4, 2048  # elements that a program takes at once; reads in flight; programs at most


@triton.jit
def _scale_kernel(grad_ptr, factor_ptr, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    for first in range(tl.program_id(0).to(tl.int64) * BLOCK * UNROLL, size, tl.num_programs(0) * BLOCK * UNROLL):
        for u in tl.static_range(UNROLL):
            i = first + u * BLOCK + tl.arange(0, BLOCK)
            grad = tl.load(grad_ptr + i, i < size)
            scaled = tl.where(grad == 0, 0.0, grad.to(factor.dtype) * factor)
            tl.store(grad_ptr + i, tl.where(factor == 0, 0.0, scaled).to(grad_ptr.dtype.element_ty), i < size)


def scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, a number on grad's device: it is not rounded to grad's dtype, nor read by the host. ``grad`` is
    contiguous."""
    size = grad.numel()
    if size == 0:
        return
    programs = min(PROGRAMS, triton.cdiv(size, BLOCK * UNROLL))  # few: to start them is all that a factor of 1 costs
    with torch.cuda.device_of(grad):  # the launch goes to the current device
        _scale_kernel[(programs,)](grad, factor, size, BLOCK, UNROLL, num_warps=4)
