"""Which walk is run: shapes and a workspace budget in bytes decide the strategy and the block sizes. Pure arithmetic.

With U = 2 N M D FLOP, one GEMM over the logits:

    gradients in forward   3U   a block of whole rows fits the budget and the weight of every row is known at call time
    recompute              4U   statistics first, gradients in a second sweep; columns in slabs, so any N and M fit
    statistics             1U   no gradient is asked

Source of the rule that large blocks win: every row block reads and writes the whole M x D gradient of the table once.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

MIN_ROWS = 64  # a block of fewer whole rows spends its time on the table's gradient: take slabs instead
SLAB_ROWS = 1024  # rows of a block once columns go in slabs
ALIGN = 16  # tile rows start on 64 bytes


class Strategy(Enum):
    GRADS_IN_FORWARD = "gradients in forward"
    RECOMPUTE = "statistics, then recompute"
    STATISTICS = "statistics only"


class Plan(NamedTuple):
    strategy: Strategy
    block_rows: int
    block_cols: int
    workspace_bytes: int  # predicted peak above inputs, outputs and gradients


class Cost(NamedTuple):
    """Bytes that a walk holds, by what they grow with. ``walk.cost`` fills it in for a device, dtype and backend."""

    tile: int  # per element of the tile
    row: int  # per row of the whole problem: statistics, coefficients, row numbers
    block_row: int  # per row of a block: gathered or masked operands
    table_row: int  # per table row of a slab: float32 accumulator of its gradient, where that is kept apart
    query_row: int  # per row of the whole problem with more than one slab: the same for the rows' gradient


def plan(n: int, m: int, cost: Cost, *, grads: bool, weights_known: bool, workspace_bytes: int) -> Plan:
    """Choose the walk for n rows and m columns.

    Args:
        cost: Bytes per unit, see :class:`Cost`.
        grads: Whether any gradient is asked.
        weights_known: Whether each row's weight in the loss is known before the backward pass.
        workspace_bytes: Budget for everything beside inputs, outputs and gradients.

    Raises:
        ValueError: The budget is below what the smallest blocks need.
    """
    rows = _whole_rows(n, m, cost, grads, workspace_bytes)
    if rows >= min(n, MIN_ROWS):
        blocks = -(-n // max(rows, 1)) if n else 1
        rows = -(-n // blocks)
        strategy = Strategy.STATISTICS if not grads else Strategy.RECOMPUTE
        if grads and weights_known:
            strategy = Strategy.GRADS_IN_FORWARD
        return Plan(strategy, rows, m, used(n, m, rows, m, cost, grads))
    strategy = Strategy.RECOMPUTE if grads else Strategy.STATISTICS
    rows = min(n, SLAB_ROWS)
    while rows > 1 and _slab(n, rows, m, cost, grads, workspace_bytes) < min(m, SLAB_ROWS):
        rows = -(-rows // 2)
    cols = _slab(n, rows, m, cost, grads, workspace_bytes)
    if cols < min(m, ALIGN):
        least = used(n, m, 1, min(m, ALIGN), cost, grads)
        raise ValueError(
            f"workspace_bytes must be at least {least} for {n} rows and {m} columns, got {workspace_bytes}"
        )
    return Plan(strategy, rows, cols, used(n, m, rows, cols, cost, grads))


def used(n: int, m: int, rows: int, cols: int, cost: Cost, grads: bool) -> int:
    """Bytes that a walk in blocks of rows x cols holds at its peak."""
    total = rows * (padded(cols) * cost.tile + cost.block_row) + n * cost.row
    if grads and rows < n:
        total += cols * cost.table_row
    if grads and cols < m:
        total += n * cost.query_row
    return total


def padded(cols: int) -> int:
    return -(-cols // ALIGN) * ALIGN


def _whole_rows(n: int, m: int, cost: Cost, grads: bool, budget: int) -> int:
    """Most whole rows of a block within the budget, at most n; 0 if not one fits."""
    per_row = padded(m) * cost.tile + cost.block_row
    if used(n, m, n, m, cost, grads) <= budget:
        return n
    spare = budget - n * cost.row - (m * cost.table_row if grads else 0)
    return max(0, min(n, spare // max(per_row, 1)))


def _slab(n: int, rows: int, m: int, cost: Cost, grads: bool, budget: int) -> int:
    """Most columns of a slab for blocks of so many rows, a multiple of ALIGN unless it is all of them."""
    if used(n, m, rows, m, cost, grads) <= budget:
        return m
    spare = budget - used(n, m, rows, 0, cost, grads)
    per_column = rows * cost.tile + (cost.table_row if grads and rows < n else 0)
    return min(m, max(0, spare // max(per_column, 1) // ALIGN * ALIGN))
