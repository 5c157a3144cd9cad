"""Which walk is run: shapes and a workspace budget in bytes decide the strategy and the block sizes. Pure arithmetic.

With U = 2 N M D FLOP, one GEMM over the logits:

    gradients in forward   3U   a block of whole rows (with statistics of columns: of all rows) fits the budget, and the
                                weight of every row is known at call time; any slab will do where gradients need no
                                statistic of whole rows
    recompute              4U   statistics first, gradients in a second sweep; columns in slabs, so any N and M fit
    statistics             1U   no gradient is asked

Every row block reads and writes the whole M x D gradient of the table once, every slab that of the rows. Where both
fit, the plan takes whichever is quicker by ``cosup.steps``; without ``Cost.moves`` whole rows, if ``least_rows`` fit,
or no slab does: in 16 bits several slabs need the float32 sum of all of x's gradient.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from cosup.steps import Moves, seconds, steps

SLAB_HEIGHT = 16  # rows of a block once columns go in slabs, in least_rows; fewer if such a tile were taller than wide
STRIP_SHARE = 32  # a strip has at most so many elements to a byte of the workspace: float32 ones, an eighth of it
ALIGN = 16  # tile rows start on 64 bytes


class Strategy(Enum):
    GRADS_IN_FORWARD = "gradients in forward"
    RECOMPUTE = "statistics, then recompute"
    STATISTICS = "statistics only"


class Plan(NamedTuple):
    strategy: Strategy
    block_rows: int
    block_cols: int
    strip_cols: int  # columns multiplied at once
    merged_cols: int  # columns whose statistic alone is kept; 1: each logit is
    workspace_bytes: int  # predicted peak above inputs, outputs and gradients


class Cost(NamedTuple):
    """Bytes that a walk holds, by what they grow with. ``walk.cost`` fills it in for a device, dtype and backend."""

    strip: int  # not bytes: elements multiplied at once; 0: a whole tile
    features: int  # not bytes: the length D of the vectors,
    of_x: int  # and how many of x's ask a gradient,
    of_w: int  # and of w's
    least_rows: int  # not bytes: with fewer to a block, adding to the table's gradient costs more than a second sweep
    row_step: int  # not bytes: rows of a block come in multiples of it, where it holds so many and is not the only one
    merged_cols: int  # not bytes: columns to an element of the tile
    tile: int  # per element of the tile
    dots: int  # per element of a strip before it is copied into the tile
    coef: int  # per element of a strip while its gradients are added: coefficients beside the tile
    chain: int  # not bytes: summands that a product packs and adds up at once,
    packed: int  # per packed number; 0: none is
    product: int  # per element of their product, before it is added
    row: int  # per row of the whole problem: statistics, coefficients, row numbers
    column: int  # per column of it: their statistics; 0 where those of rows are enough
    block_row: int  # per row of a block: gathered or masked operands
    put_row: int  # the same, of blocks of whole rows: their part of x's gradient, before it is put back
    table_row: int  # per table row of a slab: float32 sum of its gradient, where that is kept apart
    query_row: int  # the same per row: of the whole problem with several slabs, else of a block with several strips
    few: int = 0  # not bytes: numbers of a gradient up to which its product alone is summed apart, in float32
    second: int = 0  # per row of a block, and per table row of a slab: float32 sums of a second product, always few
    strips_alone: bool = False  # not bytes: gradients need no statistic of whole rows, so the tile is one strip's
    moves: Moves | None = None  # not bytes: what the choice is made by; None: by least_rows


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
    given = cost
    cost = cost._replace(strip=min(cost.strip, max(1, workspace_bytes // STRIP_SHARE)))

    def fits(rows: int, cols: int) -> bool:
        return used(n, m, rows, cols, cost, grads) <= workspace_bytes

    found: list[tuple[Strategy, int, int]] = []  # rows and columns of a tile
    most = 0 if cost.strips_alone else _most(n, lambda rows: fits(rows, m))
    timed = grads and cost.moves is not None and 0 < most < n
    whole = most >= min(n, cost.least_rows) and not cost.strips_alone
    rows, cols = _slab(n, m, cost, fits) if timed or not whole else (n, m)
    if cols >= min(m, ALIGN) and (cols < m or cost.strips_alone):
        found.append((_strategy(grads, weights_known and cost.strips_alone), rows, cols))
    if whole or timed or (cols == m and not cost.strips_alone):
        rows = _even(n, most, cost, lambda rows: fits(rows, m))
        known = weights_known and (rows == n or not cost.column)
        found.append((_strategy(grads, known), rows, m))
    if not found:
        least = _least(n, m, given, grads)
        raise ValueError(
            f"workspace_bytes must be at least {least} for {n} rows and {m} columns, got {workspace_bytes}"
        )

    def time(choice: tuple[Strategy, int, int]) -> float:
        strategy, rows, cols = choice
        assert cost.moves is not None
        sweeps = 1 if strategy is Strategy.GRADS_IN_FORWARD else 2
        return seconds(steps(n, m, rows, cols, cost.moves, sweeps=sweeps), cost.moves.rates)

    strategy, rows, cols = min(found, key=time) if timed else found[0]
    workspace = used(n, m, rows, cols, cost, grads)
    return Plan(strategy, rows, cols, strip_cols(rows, cols, cost), cost.merged_cols, workspace)


def _strategy(grads: bool, known: bool) -> Strategy:
    if not grads:
        return Strategy.STATISTICS
    return Strategy.GRADS_IN_FORWARD if known else Strategy.RECOMPUTE


def _even(n: int, most: int, cost: Cost, fits: Callable[[int], bool]) -> int:
    """Rows of a block of whole rows, of which so many fit: as even as whole tiles of the products allow."""
    even = -(-n // max(-(-n // max(most, 1)), 1))
    even = min(n, -(-even // cost.row_step) * cost.row_step)
    return even if fits(even) else most // cost.row_step * cost.row_step or most


def _slab(n: int, m: int, cost: Cost, fits: Callable[[int, int], bool]) -> tuple[int, int]:
    """Rows and columns of a tile that has not all columns; too few of these where nothing fits."""
    rows = min(n, SLAB_HEIGHT * cost.least_rows)
    while cost.strips_alone and rows > cost.least_rows and rows * rows > cost.strip > 0:  # no taller than wide
        rows = -(-rows // 2)
    while rows > 1 and not fits(rows, m) and not fits(rows, min(m, max(rows, ALIGN))):
        rows = -(-rows // 2)
    return rows, m if fits(rows, m) else ALIGN * _most(m // ALIGN, lambda parts: fits(rows, ALIGN * parts))


def enough(n: int, m: int, cost: Cost, grads: bool, workspace_bytes: int) -> int:
    """For a budget that nobody gave: it, or twice what the smallest blocks need. Where that were over four times the
    budget, a share of what is free, that; or what they need and the budget beside it."""
    least = _least(n, m, cost, grads)
    return max(workspace_bytes, min(2 * least, max(4 * workspace_bytes, least + workspace_bytes)))


def _least(n: int, m: int, cost: Cost, grads: bool) -> int:
    """Bytes that are enough for one row, and few columns or all: these need no sum of x's gradient beside the row's."""
    few, every = (used(n, m, 1, cols, cost, grads) for cols in (min(m, ALIGN), m))
    return min(few, every + cost.query_row * grads)  # the row's, if strips are shorter than they might be


def used(n: int, m: int, rows: int, cols: int, cost: Cost, grads: bool) -> int:
    """Bytes that a walk in blocks of rows x cols holds at its peak."""
    if rows == 0:
        return 0
    strip = strip_cols(rows, cols, cost)
    width = strip if cost.strips_alone else cols
    high = rows + (-rows % round_step(rows) if cost.packed else 0)  # of the tile and of products
    total = high * (padded(-(-width // cost.merged_cols)) * cost.tile + cost.block_row) + n * cost.row + m * cost.column
    if high > rows and not cost.block_row:
        total += high * cost.features * cost.packed  # the block's rows of x, copied
    dots = high * strip * cost.dots + (high + strip) * cost.chain * cost.packed * (cost.features > cost.chain)
    of_x, of_w = (of * cost.product + min(summands, cost.chain) * cost.packed if of else 0
                  for of, summands in ((cost.of_x, strip), (cost.of_w, high)))  # fmt: skip
    total += max(dots, high * strip * cost.coef + max(high * of_x, strip * of_w) if grads else 0)
    if grads:
        total += (rows + cols) * cost.second
        total += cols * cost.table_row if rows < n else _apart(cols * cost.of_w, cost)
    if grads and cols < m:
        total += n * cost.query_row
    elif grads:
        total += rows * cost.query_row if strip < cols else max(rows * cost.put_row, _apart(rows * cost.of_x, cost))
    return total


def _apart(numbers: int, cost: Cost) -> int:
    """Bytes of float32 sums of one product."""
    return 4 * numbers * (numbers <= cost.few)


def strip_cols(rows: int, cols: int, cost: Cost) -> int:
    """Columns multiplied at once, a power of two or all: neither they nor what they give of the table's gradient
    outgrow the strip."""
    if not cost.strip:
        return cols
    most = max(ALIGN, cost.strip // max(rows, cost.features, 1))
    return min(cols, 1 << (most.bit_length() - 1))


def round_step(count: int) -> int:
    """Between a power of two and the next, its multiples are the sixteen round numbers."""
    return 1 << max(0, count.bit_length() - 5)


def padded(cols: int) -> int:
    """Columns with those that make rows start on 64 bytes, though never a multiple of the cache's stride apart: then
    128 bytes more, a line of a GPU's cache, even in 16 bits."""
    parts = -(-cols // ALIGN)
    return ALIGN * (parts + 4 * (parts % 64 == 0))


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest count up to ``limit`` that fits, 0 if none does. Where more fits better, by the rounding of strips or
    sums that are no longer few, what is found fits, if it is not the largest."""
    if fits(limit):
        return limit
    return max(0, bisect_left(range(limit), True, key=lambda count: not fits(count)) - 1)
