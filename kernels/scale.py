"""Triton: a gradient times the upstream one, in place. A factor of 1, the usual one, moves no byte of the gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, UNROLL = 1024, 4  # elements that a program takes at once, and how many times


@triton.jit
def _scale_kernel(grad_ptr, factor_ptr, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK * UNROLL
    for u in tl.static_range(UNROLL):
        i = first + u * BLOCK + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + i, i < size)
        tl.store(grad_ptr + i, (grad.to(factor.dtype) * factor).to(grad_ptr.dtype.element_ty), i < size)


def scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, a number on grad's device of at least its precision: it is not rounded to grad's, nor read by the
    host. ``grad`` is contiguous."""
    size = grad.numel()
    if size == 0:
        return
    with torch.cuda.device_of(grad):  # the launch goes to the current device
        _scale_kernel[(triton.cdiv(size, BLOCK * UNROLL),)](grad, factor, size, BLOCK, UNROLL, num_warps=4)
