"""What losses and the walk ask of other processes.

Where a table's rows are split among them, one part to a rank, in rank order (a head), every rank holds all of x and
the targets; each statistic is merged, each gradient of x summed. Where the rows of x are split (queries), every rank
gathers the table; its gradients are summed where they belong, and the columns' statistics merged.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cosup.agreement import is_due, settle
from cosup.kernels.reference import ColumnState, RowState

# its name from torch 2.13 on, and before
all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
SUM_ROWS = 1024  # rows of a 16-bit gradient that are widened at once to be summed


class Shard(NamedTuple):
    group: dist.ProcessGroup
    start: int  # first column here
    columns: int  # of all ranks
    widest: int  # most columns of a rank,
    workspace_bytes: int  # its least budget and
    any_budget: bool  # whether none was given: what all plan for, so that all take the same blocks

    def holds(self, target: Tensor, m: int) -> Tensor:
        """Where the target is one of the m columns here."""
        return (target >= self.start) & (target < self.start + m)


def parts_of(group: dist.ProcessGroup, m: int, workspace_bytes: int = 0, any_budget: bool = False) -> list[int]:
    """Tell the others how many columns are here, the budget, and whether it may be exceeded: the columns of each rank,
    the least budget, whether none was given. Collective; waits for the answer.

    Raises:
        ValueError: On every rank, if one has no columns.
    """
    counts, budgets, free = settle(group, m, workspace_bytes, any_budget)
    if not all(counts):
        raise ValueError(f"linear_weight must have rows on every rank of process_group, got {counts}")
    return [*counts, min(budgets), all(free)]


def shard(group_name: str, parts: list[int]) -> Shard:
    group = group_of(group_name)
    *counts, budget, any_budget = parts
    return Shard(group, sum(counts[: group.rank()]), sum(counts), max(counts), budget, bool(any_budget))


def group_of(name: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


def merge(state: RowState, mine: Tensor, s: Shard, rank: bool) -> None:
    """Make the statistic of columns here that of all columns, in place. ``mine``: rows whose target is here."""
    merged = _merged(state, s.group, torch.where(mine, state.target, 0.0), state.soft)
    for field, value in zip((state.max, state.sum, state.dot, state.target, state.soft), merged, strict=True):
        field.copy_(value)
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


def merge_columns(state: ColumnState, group_name: str) -> None:
    """Make the columns' statistic over the rows here that over all ranks' rows, in place."""
    for field, value in zip(state, _merged(state, group_of(group_name)), strict=True):
        field.copy_(value)


def _merged(state: RowState | ColumnState, group: dist.ProcessGroup, *others: Tensor) -> tuple[Tensor, ...]:
    """max, sum and dot over all ranks, and the sums of others."""
    top = state.max.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
    safe = torch.where(top == float("-inf"), 0.0, top)
    lag = torch.where(state.sum == 0, 0.0, state.max - safe)
    decay = torch.exp(state.max - safe)
    parts = torch.stack([state.sum * decay, (state.dot + state.sum * lag) * decay, *others])
    dist.all_reduce(parts, group=group)
    return top, *parts


def joined(one: ColumnState, other: ColumnState) -> ColumnState:
    """The statistic over the rows of both."""
    top = torch.maximum(one.max, other.max)
    safe = torch.where(top == float("-inf"), 0.0, top)
    total, dot = torch.zeros_like(top), torch.zeros_like(top)
    for state in (one, other):
        decay = torch.exp(state.max - safe)
        lag = torch.where(state.sum == 0, 0.0, state.max - safe)
        total += state.sum * decay
        dot += (state.dot + state.sum * lag) * decay
    return ColumnState(top, total, dot)


class Peers:
    """The ranks of a group, each with so many candidates."""

    def __init__(self, group_name: str, counts: list[int]):
        self.group, self.counts = group_of(group_name), counts
        self.rank, self.world = self.group.rank(), self.group.size()

    def swap(self, sent: list[Tensor], to: int, found: list[Tensor], by: int) -> Swap:
        """Send tensors to a rank and take others, in place, from a rank, while the caller goes on; none from itself."""
        if to == self.rank:
            return Swap([], [])
        to, by = (dist.get_global_rank(self.group, peer) for peer in (to, by))
        sent = [t.contiguous() for t in sent]
        sends = [dist.P2POp(dist.isend, t, to, self.group) for t in sent if t.numel()]
        takes = [dist.P2POp(dist.irecv, t, by, self.group) for t in found if t.numel()]
        return Swap(dist.batch_isend_irecv(sends + takes) if sends + takes else [], sent)


class Swap(NamedTuple):
    works: list[dist.Work]
    sent: list[Tensor]  # kept until they have left

    def wait(self) -> None:
        for work in self.works:
            work.wait()


def add_over_ranks(t: Tensor, group_name: str) -> None:
    """t += those of the other ranks."""
    dist.all_reduce(t, group=group_of(group_name))


def gather(t: Tensor, counts: list[int], group: dist.ProcessGroup, *, gradients: bool = True) -> Tensor:
    """Rows of all ranks in rank order, ``counts`` of each. A gradient goes back to where its row came from, summed in
    float32 over the ranks; without ``gradients``, from this rank's use of its own rows alone."""
    if gradients:
        return _Gather.apply(t, counts, group)
    own = sum(counts[: group.rank()])
    everything = _gather(t.detach(), counts, group)
    return torch.cat([everything[:own], t, everything[own + len(t) :]])


def _gather(t: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    widest = max(counts)
    padded = F.pad(t, (*(t.ndim - 1) * (0, 0), 0, widest - len(t))).contiguous()
    everything = padded.new_empty(group.size(), *padded.shape)
    all_gather(everything.flatten(0, 1), padded, group=group)
    if min(counts) == widest:
        return everything.flatten(0, 1)
    return torch.cat([rows[:count] for rows, count in zip(everything, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, counts, group):
        ctx.counts, ctx.group = counts, group
        return _gather(t, counts, group)

    @staticmethod
    def backward(ctx, grad):
        world, mine = ctx.group.size(), ctx.counts[ctx.group.rank()]
        parts = grad.new_empty(world * mine, *grad.shape[1:])
        dist.all_to_all_single(parts, grad.contiguous(), [mine] * world, ctx.counts, group=ctx.group)
        wide = torch.promote_types(grad.dtype, torch.float32)
        return parts.view(world, mine, *grad.shape[1:]).sum(0, dtype=wide).to(grad.dtype), None, None


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, on each of them; its gradient is summed likewise."""

    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        total = t.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return SumOverRanks.apply(grad.contiguous(), ctx.group), None


class _Valued(torch.autograd.Function):
    """The value, with the gradient of t."""

    @staticmethod
    def forward(ctx, t, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def loss_of_ranks(loss: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over all ranks of their parts of a loss, on each of them, with the gradient of the part here alone. In
    the message that is due, where the host holds the loss."""
    (total,) = _sums_over_ranks([loss.detach()], group)
    return _Valued.apply(loss, total)


def mean_of_ranks(part: Tensor, group: dist.ProcessGroup, total: Tensor, divisor: Tensor) -> Tensor:
    """The same of a mean over all ranks' rows: ``part`` is over ``divisor``, and the rows here weigh ``total``."""
    loss, weight = _sums_over_ranks([part.detach() * divisor, total.detach()], group)
    none, weight = weight == 0, weight.masked_fill(weight == 0, 1.0)
    mean = loss / weight
    slope = (-mean / weight).masked_fill(none, 0.0)  # by the weight of a row
    return _Valued.apply(part * (divisor / weight) + slope * total, mean)


def _sums_over_ranks(numbers: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    if numbers[0].device.type == "cpu" and is_due(group):
        parts = settle(group, *(number.item() for number in numbers))
        return [torch.full_like(number, sum(part)) for number, part in zip(numbers, parts, strict=True)]
    if is_due(group):
        settle(group, needed=False)
    sums = torch.stack(numbers)
    dist.all_reduce(sums, group=group)
    return list(sums)
