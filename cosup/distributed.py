"""What the walk asks of other processes when the table's rows are split among them: one part to a rank, in rank order.

Every rank holds all of x and the targets; each statistic is merged, each gradient of x summed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cosup.kernels.reference import RowState

SUM_ROWS = 1024  # rows of a 16-bit gradient that are widened at once to be summed


class Shard(NamedTuple):
    group: dist.ProcessGroup
    start: int  # first column here
    columns: int  # of all ranks
    widest: int  # most columns of a rank and
    workspace_bytes: int  # its least budget: what all plan for, so that all take the same blocks

    def holds(self, target: Tensor, m: int) -> Tensor:
        """Where the target is one of the m columns here."""
        return (target >= self.start) & (target < self.start + m)


def shard(group_name: str, m: int, device: torch.device, workspace_bytes: int = 0) -> Shard:
    """Tell the others how many columns are here, and the budget. Collective; waits for the answer.

    Raises:
        ValueError: On every rank, if one has no columns.
    """
    group = dist.distributed_c10d._resolve_process_group(group_name)  # type: ignore[arg-type]
    sizes = torch.zeros(2, group.size(), dtype=torch.int64, device=device)
    sizes[:, group.rank()] = torch.tensor([m, workspace_bytes])
    dist.all_reduce(sizes, group=group)
    counts, budgets = sizes.tolist()
    if not all(counts):
        raise ValueError(f"linear_weight must have rows on every rank of process_group, got {counts}")
    return Shard(group, sum(counts[: group.rank()]), sum(counts), max(counts), min(budgets))


def merge(state: RowState, mine: Tensor, s: Shard, rank: bool) -> None:
    """Make the statistic of columns here that of all columns, in place. ``mine``: rows whose target is here."""
    top = state.max.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=s.group)
    safe = torch.where(top == float("-inf"), 0.0, top)
    lag = torch.where(state.sum == 0, 0.0, state.max - safe)
    decay = torch.exp(state.max - safe)
    target = torch.where(mine, state.target, 0.0)
    parts = torch.stack([state.sum * decay, (state.dot + state.sum * lag) * decay, target, state.soft])
    dist.all_reduce(parts, group=s.group)
    for field, merged in zip((state.max, state.sum, state.dot, state.target, state.soft), (top, *parts), strict=True):
        field.copy_(merged)
    if rank:
        dist.all_reduce(state.above, group=s.group)


def sum_over_ranks(t: Tensor, s: Shard) -> None:
    """t += those of the other ranks, 16-bit numbers by way of float32."""
    if t.element_size() >= 4:
        dist.all_reduce(t, group=s.group)
        return
    for part in t.split(SUM_ROWS):
        wide = part.float()
        dist.all_reduce(wide, group=s.group)
        part.copy_(wide)
