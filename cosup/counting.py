"""Rows to ignore whose number the host does not know: the device orders and counts the others, and products stop there.

Elsewhere, and where that does not pay, such rows are multiplied with the rest and left without effect.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cosup.plan import Plan
from cosup.walk import INTERPRETED, TRITON, Problem

ROWS = 2048  # of a block at least: with fewer the vendor divides long sums among processors that would wait here
MULTIPLICATIONS = 1 << 37  # of a block's product at least: else the device waits for the host to start it


def countable(x: Tensor, w: Tensor, backend: str) -> bool:
    """Whether rows may be counted: 16-bit ones on Hopper, where those products are about as quick as the vendor's."""
    if backend not in TRITON or x.element_size() != 2 or x.shape[1] % 8:
        return False
    return describable(w) and (INTERPRETED or is_hopper(x.device))


def describable(t: Tensor) -> bool:
    """Whether a matrix can be read by descriptor: dense rows, or columns, that start on 16 bytes."""
    item = t.element_size()
    dense = 1 in t.stride() and all(s == 1 or (s > 0 and s * item % 16 == 0) for s in t.stride())
    return dense and t.data_ptr() % 16 == 0 and t.numel() > 0


def worth_counting(plan: Plan, features: int) -> bool:
    return plan.block_rows >= ROWS and plan.block_rows * plan.block_cols * features >= MULTIPLICATIONS


def counted(p: Problem) -> Problem:
    """With the rows to skip behind the others."""
    from cosup.kernels.rows import order  # Triton: absent on some platforms

    assert p.skip is not None
    rows, target, kept = order(p.skip, p.target)
    row_id = None if p.row_id is None else p.row_id[rows]
    return p._replace(rows=rows, kept=kept, target=target, skip=None, row_id=row_id)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Also where there is no such device, for which blocks may be planned all the same."""
    if not torch.cuda.is_available():
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
