"""The walk over candidates that pass by: every rank's part goes round all ranks, the next one in flight while this one
is multiplied, so that a rank holds two parts however many ranks there are.

    step k      rank r has the part of rank r - k, and sends it on to r + 1
                what it gives of that part's columns, statistics and gradients, goes straight home, to rank r - k
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosup.distributed import Peers, Swap, joined
from cosup.kernels.reference import ColumnState, RowState
from cosup.plan import Plan
from cosup.walk import Columns, Need, Problem, RowWeights, walk


class Visit(NamedTuple):
    step: int
    home: int  # the rank whose part this is
    p: Problem
    columns: Columns | None


def statistics(p: Problem, peers: Peers, plan: Callable[[Problem], Plan], backend: str, rank: bool):
    """RowState of the rows here over the columns of all ranks; Columns of those here over the rows of all."""
    state, own = RowState.empty(len(p.target), p.scale), None
    for visit in _visits(p, peers, None):
        columns = Columns(ColumnState.empty(len(visit.p.w), p.scale)) if p.symmetric else None
        if len(visit.p.w):
            before = state if visit.step else None
            state, *_ = walk(visit.p, plan(visit.p), backend, columns=columns, rank=rank, state=before)
        if columns is not None and visit.step == 0:
            own = columns
        elif columns is not None and own is not None:
            sent = torch.stack(columns.state)
            found = sent.new_empty(3, len(p.w))
            peers.swap([sent], visit.home, [found], (peers.rank + visit.step) % peers.world).wait()
            own = Columns(joined(own.state, ColumnState(*found)))
    return state, own


def gradients(p: Problem, peers: Peers, plan: Callable[[Problem], Plan], backend: str, *, weights: RowWeights,
              known: RowState, columns: Columns | None, need: Need):  # fmt: skip
    """Those of x, of w and bias here, by the rows of all ranks: as ``walk`` gives them."""
    wide = p.scale.dtype
    dx = torch.zeros_like(p.x, dtype=wide, memory_format=torch.contiguous_format) if need.x else None
    dw = torch.zeros_like(p.w, dtype=wide, memory_format=torch.contiguous_format) if need.w else None
    dbias = torch.zeros(len(p.w), dtype=wide, device=p.x.device) if need.bias else None
    totals = [total for total in (dw, dbias) if total is not None]
    coming = [torch.empty_like(total, dtype=p.w.dtype) for total in totals[: need.w]]
    coming += [torch.empty_like(total) for total in totals[need.w :]]
    found: list[Tensor] = []
    swap = Swap([], [])
    for visit in _visits(p, peers, columns):
        given = [total[:0] for total in totals]  # of a part without columns
        if len(visit.p.w):
            options = {"known": known, "columns": visit.columns, "need": need, "dx_sum": dx}
            _, _, *grads = walk(visit.p, plan(visit.p), backend, weights=weights, **options)
            given = [grad for grad in grads[:2] if grad is not None]
        _add(totals, found, swap)
        found = coming if visit.step else given
        swap = peers.swap(given, visit.home, found, (peers.rank + visit.step) % peers.world)
    _add(totals, found, swap)
    return None if dx is None else dx.to(p.x.dtype), None if dw is None else dw.to(p.w.dtype), dbias


def _add(totals: list[Tensor], parts: list[Tensor], swap: Swap) -> None:
    """Add parts, once they are here."""
    swap.wait()
    for total, part in zip(totals, parts, strict=False):
        total += part


def _visits(p: Problem, peers: Peers, columns: Columns | None) -> Iterator[Visit]:
    """The parts of all ranks, the own one first; with columns, their statistic and weights travel too. Two buffers
    take turns."""
    first = [sum(peers.counts[:rank]) for rank in range(peers.world)]
    travels: list[Any] = [p.w, p.bias, p.col_id, *(() if columns is None else (*columns.state[:2], columns.weight))]
    here = [t for t in travels if t is not None]
    buffers = [[t.new_empty(max(peers.counts), *t.shape[1:]) for t in here] for _ in range(2)]
    for step in range(peers.world):
        home, after = ((peers.rank - k) % peers.world for k in (step, step + 1))
        coming = [t[: peers.counts[after]] for t in buffers[step % 2]]
        swap = Swap([], [])
        if step + 1 < peers.world:
            swap = peers.swap(here, (peers.rank + 1) % peers.world, coming, (peers.rank - 1) % peers.world)
        given = iter(here)
        _, bias, col_id, *of_columns = [None if t is None else next(given) for t in travels]
        soft = None if p.soft is None else p.soft.new_ones(len(here[0]))
        part = p._replace(w=here[0], bias=bias, col_id=col_id, soft=soft, col0=first[home])
        state = None if columns is None else Columns(ColumnState(*of_columns[:2], of_columns[0]), of_columns[2])
        yield Visit(step, home, part, state)
        swap.wait()
        here = coming
