"""The engine as ``torch.library`` operators: schema, fake kernels and derivatives. ``losses`` calls these.

    nll_stats      statistics now; gradients, if asked, by a second sweep once the upstream gradient is known
    loss_and_grads a weighted sum of those statistics, and its gradients: in the same sweep where whole rows fit
    sigmoid_loss   the loss of each row's pairs, or their weighted sum and its gradients in the same sweep

All refuse targets out of range: an ``IndexError`` on a CPU, a device-side assertion (no synchronisation) on CUDA.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup import ring as ring_walk
from cosup.agreement import agreed, settle
from cosup.counting import countable, counted, worth_counting
from cosup.direct import call, differentiable, operator
from cosup.distributed import (
    Peers,
    add_over_ranks,
    group_of,
    joined,
    merge_columns,
    parts_of,
    shard,
    sum_over_ranks,
)
from cosup.kernels.reference import ColumnState, RowState, RowValues, scaled, times
from cosup.plan import Plan, Strategy, enough, plan, strip_cols, used
from cosup.positives import Positives
from cosup.walk import (
    EVERY,
    NARROW,
    TRITON,
    Columns,
    Need,
    Problem,
    RowWeights,
    best_positives,
    cost,
    default_workspace,
    limited,
    tile_kernels,
    walk,
)

STATS = 13  # what the operators give of rows and columns: see nll_stats
INVARIANT_ROWS = {"cpu": 64, "cuda": 256}  # every product has so many rows where no row may depend on another
GRADS = len(Need._fields)  # ``need`` of an operator says which of these are asked, and then whether the scale's is


def _problem(x, w, target, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, softcap, ignore_index,
             margin, pool, symmetric, workspace_bytes, backend, group, parts, invariant, pair_logit=None,
             peers: Peers | None = None) -> Problem:  # fmt: skip
    """Check the targets and leave out ignored rows: by picking on a CPU, by idle coefficients on CUDA (no sync) and
    where a row must stay in its place; ``cosup.counting`` does better on some devices."""
    any_budget, part = workspace_bytes is None, None
    budget = default_workspace(x.device) if workspace_bytes is None else workspace_bytes
    if group is not None:
        part = shard(group, parts or parts_of(group_of(group), len(w), budget, any_budget))
        budget, any_budget = part.workspace_bytes, part.any_budget
    # else each GEMM would copy its part
    x, w, x2, w2 = (t if t is None or 1 in t.stride() else t.contiguous() for t in (x, w, x2, w2))
    vectors = (target, bias, row_id, col_id, soft)
    target, bias, row_id, col_id, soft = (t if t is None else t.contiguous() for t in vectors)
    positives = None
    if pair_start is not None:
        pair_logit = scale.new_zeros(len(pair_col)) if pair_logit is None else pair_logit
        positives = Positives.of(pair_start, pair_col, pair_logit, pool)
    col0, m = (0, len(w)) if part is None else (part.start, part.columns)
    if peers is not None:
        col0, m = sum(peers.counts[: peers.rank]), sum(peers.counts)
    p = Problem(x, w, target, scale, bias, row_id, col_id, softcap, soft, x2, w2, margin, symmetric=symmetric,
                positives=positives, col0=col0, columns=m, shard=part, workspace_bytes=budget,
                any_budget=any_budget)  # fmt: skip
    on_cpu = x.device.type == "cpu"
    if not on_cpu and ignore_index is not None and backend in TRITON:
        from cosup.kernels.rows import look_up  # Triton: absent on some platforms

        target, skip, good = look_up(target, ignore_index, m)
        torch._assert_async(good, f"target must be in [0, {m})")
        return p._replace(target=target, skip=skip)
    skip = None if ignore_index is None else target == ignore_index
    good = (target >= 0) & (target < m)
    good = good if skip is None else good | skip
    if on_cpu:
        if not good.all():
            row = int(good.logical_not().nonzero()[0])
            raise IndexError(f"target must be in [0, {m}), got {int(target[row])} in row {row}")
        if skip is None or not skip.any():
            return p
        if invariant:
            return p._replace(skip=skip)
        rows = skip.logical_not().nonzero().squeeze(1)
        return p._replace(target=target[rows], rows=rows, row_id=None if row_id is None else row_id[rows])
    torch._assert_async(good.all(), f"target must be in [0, {m})")
    return p if skip is None else p._replace(target=target.masked_fill(skip, -1), skip=skip)


def _plan(p: Problem, backend: str, invariant: bool, need: Need, weights_known: bool, counts: bool = False,
          rank: bool = False) -> Plan:  # fmt: skip
    picked = p.rows is not None or p.skip is not None
    grads = any(need)
    need = EVERY if p.shard is not None else need  # alike on all ranks, of which one's part may be frozen
    c = cost(p.x, backend, gathered=picked, counted=counts, symmetric=p.symmetric, sigmoid=p.sigmoid, need=need,
             more_features=0 if p.x2 is None else p.x2.shape[1])  # fmt: skip
    if invariant or (rank and backend == NARROW):
        c = c._replace(moves=None)  # a half of the rows, a quarter, ...; whole rows, or a rank needs float32 tiles
    m = len(p.w) if p.shard is None else p.shard.widest  # alike on all ranks, and so are the blocks of rows
    n = INVARIANT_ROWS[p.x.device.type] if invariant else len(p.target)
    budget = enough(n, m, c, grads, p.workspace_bytes) if p.any_budget else p.workspace_bytes
    return plan(n, m, c, grads=grads, weights_known=weights_known, workspace_bytes=budget)


def blocks_of(p: Problem, backend: str, *, need: Need, weights_known: bool, invariant: bool = False,
              rank: bool = False) -> tuple[Plan, bool]:  # fmt: skip
    """The blocks of a problem; and whether its rows to skip are counted: where that is possible and pays."""
    planned = functools.partial(_plan, p, backend, invariant, need, weights_known, rank=rank)
    # what bias, adapters, ranks, columns and positives sum over the rows is not counted
    others = p.bias is not None or p.x2 is not None or p.shard is not None or p.positives is not None or p.symmetric
    if not (invariant or others or p.skip is None) and countable(p.x, p.w, backend):
        blocks = planned(counts=True)
        if worth_counting(blocks, p.x.shape[1]):
            return blocks, True
    return planned(), False


def _planned(p: Problem, backend: str, **options: Any) -> tuple[Problem, Plan]:
    """The problem, with rows to skip counted where ``blocks_of`` says so; and its blocks."""
    blocks, counts = blocks_of(p, backend, **options)
    return (counted(p) if counts else p), blocks


def _per_row(p: Problem, state: RowState, backend: str) -> RowValues:
    """What ``nll_stats`` gives, over all N rows; zeros at ignored rows."""
    evaluate = tile_kernels(backend, p.x).row_values
    if p.kept is not None:
        return evaluate(state, p.columns, p.margin, p.scale, None, p.rows, p.kept)
    values = evaluate(state, p.columns, p.margin, p.scale, p.skip)
    if p.positives is not None:  # not by way of the pooled logit, whose rounding may be larger than the difference
        excess = (state.max - p.positives.mean()) + state.dot / state.sum
        values.excess.copy_(excess if p.skip is None else excess.masked_fill(p.skip, 0))
    if p.rows is not None:
        return RowValues(*(f.new_zeros(len(p.x)).index_copy_(0, p.rows, f) for f in values))
    return values


def _statistics(p: Problem, state: RowState, columns: Columns | None, rank: bool,
                backend: str) -> tuple[Tensor, ...]:  # fmt: skip
    """What ``nll_stats`` gives."""
    pair_logit = p.scale.new_empty(0)
    if p.positives is not None:
        if rank:
            state.above.sub_(p.positives.above(state.target, p.target))
        state.target.copy_(p.positives.pooled())
        pair_logit = p.positives.logit
    nll, lse, entropy, soft, top, total, above, excess = _per_row(p, state, backend)
    none = [p.scale.new_empty(0) for _ in range(4)]
    col_nll, col_excess, col_top, col_total = none
    if columns is not None:
        col_top, col_total, col_dot = columns.state
        of_row = ColumnState(*(v[p.target - p.col0] for v in columns.state))
        lag = (of_row.max - state.target) + p.margin * p.scale
        col_nll, col_excess = of_row.sum.log() + lag, of_row.dot / of_row.sum + lag
    return nll, lse, entropy, soft, col_nll, top, total, above, excess, col_excess, col_top, col_total, pair_logit


def _ready(p: Problem, blocks, gap: float | None, rank: bool) -> Problem:
    """With what must be known of targets before a sweep."""
    p = p if gap is None else limited(p, blocks, gap)
    return best_positives(p, blocks) if rank else p


def _peers(ring: str | None, parts: list[int] | None, w: Tensor) -> Peers | None:
    if ring is None:
        return None
    return Peers(ring, parts or settle(group_of(ring), len(w))[0])


def _planning(group: str | None, workspace_bytes: int | None):
    """A budget may be too small on one rank alone; one that nobody gave never is."""
    return agreed(None if group is None or workspace_bytes is None else group_of(group), "blocks")


def _columns(p: Problem, row_group: str | None, weight: Tensor | None = None, top: Tensor | None = None,
             total: Tensor | None = None) -> Columns | None:  # fmt: skip
    """The columns' statistic, new or known, and the weights of rows' targets in their own softmax; None: not asked."""
    if not p.symmetric:
        return None
    m = len(p.w)
    state = ColumnState.empty(m, p.scale) if top is None or total is None else ColumnState(top, total, total)
    if weight is None:
        return Columns(state)
    of_columns = torch.zeros(m, dtype=p.scale.dtype, device=p.x.device).index_copy_(0, p.target - p.col0, weight)
    if row_group is not None:
        add_over_ranks(of_columns, row_group)
    return Columns(state, of_columns)


def _picked(p: Problem, weights: RowWeights) -> RowWeights:
    """Weights of the rows to visit, 0 in those to skip."""
    if p.rows is not None:  # where they are counted those of the others are not read
        return weights.map(lambda v: v[p.rows])
    skip = p.skip
    return weights if skip is None else weights.map(lambda v: v.masked_fill(skip, 0))


@operator("cosup::nll_stats")
def nll_stats(x: Tensor, w: Tensor, target: Tensor, scale: Tensor, bias: Tensor | None, row_id: Tensor | None,
              col_id: Tensor | None, soft: Tensor | None, x2: Tensor | None, w2: Tensor | None,
              pair_start: Tensor | None, pair_col: Tensor | None, softcap: float, ignore_index: int | None,
              margin: float, gap: float | None, pool: str, symmetric: bool, rank: bool, need: list[bool],
              workspace_bytes: int | None, backend: str, group: str | None, parts: list[int] | None, invariant: bool,
              row_group: str | None, ring: str | None,
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                         Tensor, Tensor]:  # fmt: skip
    """nll, lse, entropy, sum_m soft[m] z[m], nll of the target's column among the rows: each [N], with derivatives;
    maximum, sum of exp(z - maximum), columns above the target, mean of z less the target's, the same for the target's
    column among the rows: each [N]; maximum and sum of the columns: each [M]; logits of the pairs [P].

    What is of columns is empty unless ``symmetric``, what is of pairs unless ``pair_start`` [N + 1] and ``pair_col``
    [P] list several positives of each row, whose pooled logit (``cosup.positives``) then is the target's in nll.

    ``need``: which gradients a backward pass will make: of x, w, bias, x2, w2, scale. ``row_group``: its ranks hold the
    rows among them, and columns have the statistic over all; asked only with ``symmetric``. ``ring``: its ranks hold
    rows and columns among them; targets are among the columns of all, and here. ``parts``: what ``parts_of`` told of
    the group, or the columns of each rank of the ring; None: ask them.
    """
    peers = _peers(ring, parts, w)
    p = _problem(x, w, target, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, softcap, ignore_index,
                 margin, pool, symmetric, workspace_bytes, backend, group, parts, invariant, peers=peers)  # fmt: skip
    of = Need(*need[:GRADS])  # in the blocks of the backward pass: products of other shapes may round otherwise
    planned = functools.partial(_plan, backend=backend, invariant=False, need=of, weights_known=False)
    with _planning(row_group or ring, workspace_bytes):
        p, blocks = _planned(p, backend, invariant=invariant, need=of, weights_known=False)
        for m in set(() if peers is None else peers.counts):
            planned(p._replace(w=w.new_empty(m, 0)))
    p = _ready(p, blocks, gap, rank)
    if peers is not None:
        state, columns = ring_walk.statistics(p, peers, planned, backend, rank)
        return _statistics(p, state, columns, rank, backend)  # type: ignore[return-value]
    columns = _columns(p, row_group)
    state, *_ = walk(p, blocks, backend, columns=columns, rank=rank)
    if columns is not None and row_group is not None:
        merge_columns(columns.state, row_group)
    return _statistics(p, state, columns, rank, backend)  # type: ignore[return-value]


@nll_stats.register_fake
def _(x, w, target, scale, *others):
    return _fake_statistics(w, target, scale, others[7], symmetric=others[13])


def _fake_statistics(w, target, scale, pair_col, symmetric):
    rows = [torch.empty_like(target, dtype=scale.dtype) for _ in range(9)]
    rows[7:7] = [torch.empty_like(target, dtype=torch.int32)]
    m = w.shape[0] if symmetric else 0
    if not symmetric:
        rows[4], rows[9] = scale.new_empty(0), scale.new_empty(0)
    return *rows, scale.new_empty(m), scale.new_empty(m), scale.new_empty(0 if pair_col is None else pair_col.shape[0])


@operator("cosup::nll_stats_backward")
def nll_stats_backward(grad_nll: Tensor, grad_lse: Tensor | None, grad_entropy: Tensor | None, grad_soft: Tensor | None,
                       grad_column: Tensor | None, entropy: Tensor, top: Tensor, total: Tensor, col_top: Tensor,
                       col_total: Tensor, pair_logit: Tensor, x: Tensor, w: Tensor, target: Tensor, scale: Tensor,
                       bias: Tensor | None, row_id: Tensor | None, col_id: Tensor | None, soft: Tensor | None,
                       x2: Tensor | None, w2: Tensor | None, pair_start: Tensor | None, pair_col: Tensor | None,
                       softcap: float, ignore_index: int | None, margin: float, gap: float | None, pool: str,
                       symmetric: bool, need: list[bool], workspace_bytes: int | None, backend: str,
                       group: str | None, parts: list[int] | None, invariant: bool, row_group: str | None,
                       ring: str | None,
                       ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw, dbias, dx2, dw2 for upstream gradients of what ``nll_stats`` gives; empty where not needed."""
    peers = _peers(ring, parts, w)
    p = _problem(x, w, target, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, softcap, ignore_index,
                 margin, pool, symmetric, workspace_bytes, backend, group, parts, invariant, pair_logit,
                 peers)  # fmt: skip
    of = Need(*need[:GRADS])
    p, blocks = _planned(p, backend, invariant=invariant, need=of, weights_known=False)
    p = _ready(p, blocks, gap, rank=False)
    soft_weight = None if grad_soft is None else -grad_soft
    weights = _picked(p, RowWeights(grad_nll, grad_lse, soft_weight, None, grad_entropy))
    rows = slice(None) if p.rows is None else p.rows
    top, total, entropy = top[rows], total[rows], entropy[rows]
    dot = torch.where(total == 0, 0.0, (total.log() - entropy) * total)  # no sum: an ignored row
    known = RowState(top, total, dot, top, top, target)  # a gradient reads the first three
    grad_column = torch.zeros_like(grad_nll) if grad_column is None else grad_column
    columns = _columns(p, row_group, grad_column, col_top, col_total)
    asked: Any = {"weights": weights, "known": known, "columns": columns, "need": of}
    if peers is None:
        _, *grads = walk(p, blocks, backend, **asked)
    else:
        planned = functools.partial(_plan, backend=backend, invariant=False, need=of, weights_known=False)
        grads = [*ring_walk.gradients(p, peers, planned, backend, **asked), None, None]
    return tuple(x.new_empty(0) if g is None else g for g in grads)  # type: ignore[return-value]


@nll_stats_backward.register_fake
def _(grad_nll, grad_lse, grad_entropy, grad_soft, grad_column, entropy, top, total, col_top, col_total, pair_logit, x,
      w, target, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, softcap, ignore_index, margin, gap,
      pool, symmetric, need, *_):  # fmt: skip
    return _fake_grads(x, w, scale, x2, w2, need)


def _fake_grads(x, w, scale, x2, w2, need):
    like = (x, w, w.new_empty(w.shape[0], dtype=scale.dtype), x2, w2)
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else x.new_empty(0)
                 for t, wanted in zip(like, need, strict=False))  # fmt: skip


def _stats_context(ctx, inputs, output):
    tensors, ctx.features, ctx.need, ctx.end = inputs[:12], inputs[12:-9], inputs[-8], inputs[-7:]
    ctx.save_for_backward(*tensors, *output[:7], *output[8:])
    ctx.mark_non_differentiable(*output[5:])
    ctx.set_materialize_grads(False)


def _stats_backward(ctx, grad_nll, grad_lse, grad_entropy, grad_soft, grad_column, *_):
    grads = (grad_nll, grad_lse, grad_entropy, grad_soft, grad_column)
    _once(*grads)
    saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
    tensors, (nll, lse, entropy, soft_logit, _, top, total, excess, col_excess, *known) = saved[:12], saved[12:]
    dx = dw = dbias = dx2 = dw2 = dscale = None
    if all(g is None for g in grads):
        return 27 * (None,)
    if any(ctx.need[:GRADS]):
        grad_nll = torch.zeros_like(nll) if grad_nll is None else grad_nll
        options = (*ctx.features, ctx.need, *ctx.end)
        found = call(nll_stats_backward, grad_nll, *grads[1:], entropy, top, total, *known, *tensors, *options)
        dx, dw, dbias, dx2, dw2 = (g if wanted else None for g, wanted in zip(found, ctx.need, strict=False))
    if ctx.need[GRADS]:
        if grad_entropy is not None:
            raise RuntimeError("the entropy has no gradient of the temperature")
        weights = RowWeights(torch.zeros_like(nll) if grad_nll is None else grad_nll, grad_lse,
                             None if grad_soft is None else -grad_soft)  # fmt: skip
        of_columns = None if grad_column is None else times(grad_column, col_excess)
        dscale = _scale_grad(weights, lse, entropy, excess, soft_logit, of_columns, *tensors[3:5], dbias)
    return dx, dw, None, dscale, dbias, None, None, None, dx2, dw2, *17 * [None]


def _once(*grads: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(g is not None for g in grads) and not torch.compiler.is_compiling():
        raise RuntimeError("cosup's losses have first derivatives only: create_graph=True is not supported")


def _scale_grad(v: RowWeights, lse, entropy, excess, soft_logit, of_columns, scale, bias, dbias):
    """d loss / d scale = sum_m dz[m] (z[m] - bias[m]) / scale: logits are linear in scale wherever this is asked."""
    rows = times(v.b, excess)
    if v.c is not None:
        rows = rows + times(v.c, lse - entropy)
    if v.q is not None:
        rows = rows + times(v.q, lse * (lse - entropy))
    if v.e is not None:
        rows = rows - times(v.e, soft_logit)
    if of_columns is not None:
        rows = rows + of_columns
    total = rows.sum(dtype=torch.float64)  # its terms cancel
    if bias is not None:
        total = total - times(dbias, bias).sum(dtype=torch.float64)
    return (total / scale).to(scale.dtype)


differentiable(nll_stats, _stats_backward, _stats_context)


@operator("cosup::loss_and_grads")
def loss_and_grads(x: Tensor, w: Tensor, target: Tensor, b: Tensor, c: Tensor | None, e: Tensor | None,
                   q: Tensor | None, v: Tensor | None, scale: Tensor, bias: Tensor | None, row_id: Tensor | None,
                   col_id: Tensor | None, soft: Tensor | None, x2: Tensor | None, w2: Tensor | None,
                   pair_start: Tensor | None, pair_col: Tensor | None, softcap: float, ignore_index: int | None,
                   margin: float, gap: float | None, pool: str, rank: bool, need: list[bool],
                   workspace_bytes: int | None, backend: str, group: str | None, parts: list[int] | None,
                   invariant: bool, row_group: str | None,
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                              Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The sum of :func:`row_losses`, what ``nll_stats`` gives, the sum's gradients as ``nll_stats_backward`` does.
    ``v`` [N]: weights of the targets' columns among the rows; None: no statistic of columns."""
    p = _problem(x, w, target, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, softcap, ignore_index,
                 margin, pool, v is not None, workspace_bytes, backend, group, parts, invariant)  # fmt: skip
    # columns' statistics must be merged between two sweeps where ranks hold the rows
    of = Need(*need[:GRADS])
    planned = functools.partial(_planned, invariant=invariant, need=of, weights_known=row_group is None, rank=rank)
    with _planning(row_group, workspace_bytes):
        all_rows, (p, blocks) = p, planned(p, backend)
        if backend == NARROW and rank and blocks.block_cols < len(w):  # a rank compares the logits of several tiles
            backend = "triton"
            p, blocks = planned(all_rows, backend)
    weights, known, columns = RowWeights(b, c, e, q), None, _columns(p, row_group, v)
    p = _ready(p, blocks, gap, rank)
    if blocks.strategy is Strategy.RECOMPUTE:  # in the same blocks: products of other shapes may round otherwise
        known, *_ = walk(p, blocks, backend, columns=columns, rank=rank)
        if columns is not None and row_group is not None:
            merge_columns(columns.state, row_group)
    state, *grads = walk(p, blocks, backend, weights=_picked(p, weights), known=known, columns=columns, rank=rank,
                         need=of)  # fmt: skip
    statistics = _statistics(p, state, columns, rank, backend)
    found = (x.new_empty(0) if g is None else g for g in grads)
    nll, lse, _, soft_logit, col_nll, *_ = statistics
    loss = row_losses(weights, nll, lse, soft_logit, v, col_nll).sum()
    return loss, *statistics, *found  # type: ignore[return-value]


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, value):
        ctx.save_for_backward(weight, value)
        return times(weight, value)

    @staticmethod
    def backward(ctx, grad):
        weight, value = ctx.saved_tensors
        return times(value, grad), times(weight, grad)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, total):
        ctx.save_for_backward(weight, total)
        return weight / total

    @staticmethod
    def backward(ctx, grad):
        weight, total = ctx.saved_tensors
        return grad / total, -times(weight, grad).sum() / total.square()


def weighted(weight: Tensor, value: Tensor) -> Tensor:
    """times, with the gradients of both [N]: that of a weight of 0 is the value."""
    return _Weighted.apply(weight, value) if weight.requires_grad else times(weight, value)


def divided(weight: Tensor, total: Tensor) -> Tensor:
    """weight [N] / total, with gradients in which a weight of 0 meets no infinite one."""
    return _Divided.apply(weight, total) if weight.requires_grad else weight / total


def row_losses(weights: RowWeights, nll: Tensor, lse: Tensor, soft_logit: Tensor, v: Tensor | None,
               col_nll: Tensor) -> Tensor:  # fmt: skip
    """b nll + c lse - e sum_m soft[m] z[m] + q lse^2 / 2 of each row, and v col_nll."""
    loss = weighted(weights.b, nll)
    if weights.c is not None:
        loss = loss + weighted(weights.c, lse)
    if weights.e is not None:
        loss = loss - weighted(weights.e, soft_logit)
    if weights.q is not None:
        loss = loss + weighted(weights.q, lse.square() / 2)
    return loss if v is None else loss + weighted(v, col_nll)


@loss_and_grads.register_fake
def _(x, w, target, b, c, e, q, v, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, softcap,
      ignore_index, margin, gap, pool, rank, need, *_):  # fmt: skip
    statistics = _fake_statistics(w, target, scale, pair_col, symmetric=v is not None)
    return torch.empty_like(scale), *statistics, *_fake_grads(x, w, scale, x2, w2, need)


def _grads_context(ctx, inputs, output):
    ctx.need, ctx.backend = inputs[-7], inputs[-5]
    ctx.save_for_backward(*inputs[3:10], *output[1:6], *output[9:11], *output[1 + STATS :])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _grads_backward(ctx, grad_loss, *_):
    _once(grad_loss)
    b, c, e, q, v, scale, bias, nll, lse, entropy, soft_logit, col_nll, excess, col_excess, *grads = ctx.saved_tensors
    if grad_loss is None:
        return 30 * (None,)
    dscale = None
    if ctx.need[GRADS]:
        of_columns = None if v is None else times(v, col_excess)
        statistics = (lse, entropy, excess, soft_logit, of_columns)
        dscale = scaled(_scale_grad(RowWeights(b, c, e, q), *statistics, scale, bias, grads[2]), grad_loss)
    made = (_scaled(g, grad_loss, ctx.backend) if w else None for g, w in zip(grads, ctx.need, strict=False))
    dx, dw, dbias, dx2, dw2 = made
    rows = (lambda: nll, lambda: lse, lambda: -soft_logit, lambda: lse.square() / 2, lambda: col_nll)
    wanted = ctx.needs_input_grad[3:8]
    dweights = [times(r(), grad_loss) if asked else None for r, asked in zip(rows, wanted, strict=True)]
    return dx, dw, None, *dweights, dscale, dbias, None, None, None, dx2, dw2, *15 * [None]


def _scaled(grad: Tensor, factor: Tensor, backend: str) -> Tensor:
    """scaled(grad, factor), in grad's own memory where this is its last use."""
    if type(grad) is not Tensor:  # traced
        return scaled(grad, factor).to(grad.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()
    tile_kernels(backend, grad).scale(grad, factor)
    return grad


differentiable(loss_and_grads, _grads_backward, _grads_context)


@operator("cosup::column_values")
def column_values(vector: Tensor, target: Tensor, group: str | None,
                  parts: list[int] | None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """vector[target] [N], the vector's sum and its length, where the vector's parts lie on the ranks of a group.

    Targets that are no column give any value; the engine refuses them, or ignores their rows.
    """
    m = len(vector)
    total, count = vector.sum(), torch.full_like(vector[:1].sum(), m)
    if group is None:
        values = vector[target.clamp(0, m - 1)] if m else torch.zeros_like(target, dtype=vector.dtype)
        return values, total, count
    part = shard(group, parts or parts_of(group_of(group), m))
    here = part.holds(target, m)
    values = torch.where(here, vector[(target - part.start).clamp(0, m - 1)], 0.0)
    sums = torch.stack([total, count])
    for t in (values, sums):
        sum_over_ranks(t, part)
    return values, sums[0].clone(), sums[1].clone()


@column_values.register_fake
def _(vector, target, group, parts):
    return vector.new_empty(target.shape), vector.new_empty(()), vector.new_empty(())


@operator("cosup::pairs_of_ids")
def pairs_of_ids(row_id: Tensor, col_id: Tensor) -> tuple[Tensor, Tensor]:
    """start [N + 1] and columns [P]: for each row the columns of its id, ascending. The host waits for P."""
    ids, order = col_id.sort(stable=True)
    first = torch.searchsorted(ids, row_id)
    count = torch.searchsorted(ids, row_id, right=True) - first
    start = F.pad(count.cumsum(0), (1, 0))
    row = torch.repeat_interleave(torch.arange(len(row_id), device=row_id.device), count)
    return start, order[first[row] + torch.arange(len(row), device=row.device) - start[row]]


@pairs_of_ids.register_fake
def _(row_id, col_id):
    count = torch.library.get_ctx().new_dynamic_size()
    return row_id.new_empty(row_id.shape[0] + 1), row_id.new_empty(count)


TRIANGLE_BLOCKS = 8  # of rows, at least: of the square's products 1/2 + 1/16 are left


def _triangle(x: Tensor, scale: Tensor, ids: Tensor | None, workspace_bytes: int | None, backend: str, grads: bool):
    """The problem, and its blocks: several of rows, or there were nothing to leave out."""
    target = torch.full(x.shape[:1], -1, device=x.device)
    x = x if 1 in x.stride() else x.contiguous()
    c = cost(x, backend, gathered=False, symmetric=True)._replace(moves=None)  # of all tiles, which are not visited
    budget = workspace_bytes
    if budget is None:
        budget = enough(len(x), len(x), c, grads, default_workspace(x.device))
    p = Problem(x, x, target, scale, row_id=ids, col_id=ids, symmetric=True, triangle=True, columns=len(x),
                workspace_bytes=budget)  # fmt: skip
    blocks = plan(len(x), len(x), c, grads=grads, weights_known=False, workspace_bytes=budget)
    rows = min(blocks.block_rows, max(c.least_rows, -(-len(x) // TRIANGLE_BLOCKS)))
    fits = used(len(x), len(x), rows, blocks.block_cols, c, grads) <= budget
    return p, blocks._replace(block_rows=rows, strip_cols=strip_cols(rows, blocks.block_cols, c)) if fits else blocks


@operator("cosup::lse_of_others")
def lse_of_others(x: Tensor, scale: Tensor, ids: Tensor | None, need: bool, workspace_bytes: int | None, backend: str,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """lse and entropy of each row's logits with all other rows but those of its id, [N]; their maximum and sum."""
    p, blocks = _triangle(x, scale, ids, workspace_bytes, backend, need)  # a budget that will not do is refused now
    columns = Columns(ColumnState.empty(len(x), scale))
    state, *_ = walk(p, blocks, backend, columns=columns)
    top, total, dot = joined(ColumnState(*state[:3]), columns.state)
    return top + total.log(), total.log() - dot / total, top, total


@lse_of_others.register_fake
def _(x, scale, *_):
    return tuple(scale.new_empty(x.shape[0]) for _ in range(4))


@operator("cosup::lse_of_others_backward")
def lse_of_others_backward(grad: Tensor, top: Tensor, total: Tensor, x: Tensor, scale: Tensor, ids: Tensor | None,
                           workspace_bytes: int | None, backend: str) -> Tensor:  # fmt: skip
    """Gradient of x, as a row and as a column."""
    p, blocks = _triangle(x, scale, ids, workspace_bytes, backend, True)
    dx = torch.zeros_like(x, dtype=scale.dtype, memory_format=torch.contiguous_format)
    if len(x) < 2:
        return dx.to(x.dtype)
    known = RowState(top, total, top, top, top, p.target)  # a gradient reads the first two
    columns = Columns(ColumnState(top, total, total), grad)
    _, _, dw, *_ = walk(p, blocks, backend, known=known, weights=RowWeights(torch.zeros_like(grad), grad),
                        columns=columns, need=Need(x=True, w=True), dx_sum=dx)  # fmt: skip
    return (dx + dw).to(x.dtype)


@lse_of_others_backward.register_fake
def _(grad, top, total, x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _others_context(ctx, inputs, output):
    x, scale, ids, ctx.need, *ctx.end = inputs
    ctx.save_for_backward(x, scale, ids, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _others_backward(ctx, grad, *_):
    _once(grad)
    if grad is None:
        return 6 * (None,)
    x, scale, ids, lse, entropy, top, total = ctx.saved_tensors
    dx = call(lse_of_others_backward, grad, top, total, x, scale, ids, *ctx.end) if ctx.needs_input_grad[0] else None
    dscale = times(grad, lse - entropy).sum(dtype=torch.float64) / scale if ctx.needs_input_grad[1] else None
    return dx, None if dscale is None else dscale.to(scale.dtype), *4 * [None]


differentiable(lse_of_others, _others_backward, _others_context)


@operator("cosup::sigmoid_loss")
def sigmoid_loss(x: Tensor, w: Tensor, target: Tensor, weight: Tensor | None, scale: Tensor, bias: Tensor,
                 row_id: Tensor | None, col_id: Tensor | None, sums: bool, need: list[bool],
                 workspace_bytes: int | None, backend: str,
                 ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, rows, dot, soft, dx, dw. rows, dot, soft [N]: of ``reference.sigmoid_stats``, zeros unless ``sums``.

    With ``weight`` [N] the loss is sum_n weight[n] rows[n], and dx, dw are its gradients, from the same sweep. Without,
    the loss is [N], rows is empty, dx, dw come in the backward pass. ``need``: of x, w, scale or bias.
    """
    options: Any = (*5 * [None], 0.0, None, 0.0, "", False, workspace_bytes, backend, None, None, False)
    p = _problem(x, w, target, scale, bias.expand(len(w)), row_id, col_id, *options)._replace(sigmoid=True)
    weights = None if weight is None else RowWeights(weight)
    known, asked = None if sums else RowState.empty(len(x), scale), Need(*need[:2])
    blocks = _plan(p, backend, False, asked, weights_known=True)  # a budget too small for the backward is refused now
    if weights is None:
        asked = Need()
        blocks = _plan(p, backend, False, asked, weights_known=True)
    state, dx, dw, *_ = walk(p, blocks, backend, known=known, weights=weights, need=asked)
    dx, dw = (x.new_empty(0) if g is None else g for g in (dx, dw))
    total, dot, soft = (field.clone() for field in (state.sum, state.dot, state.soft))  # apart
    if weight is None:
        return total, scale.new_empty(0), dot, soft, dx, dw
    return times(weight, total).sum(), total, dot, soft, dx, dw


@sigmoid_loss.register_fake
def _(x, w, target, weight, scale, bias, row_id, col_id, sums, need, *_):
    rows = [torch.empty_like(target, dtype=scale.dtype) for _ in range(3)]
    loss = (rows[0], scale.new_empty(0)) if weight is None else (torch.empty_like(scale), rows[0])
    wanted = [weight is not None and n for n in need[:2]]
    return *loss, *rows[1:], *_fake_grads(x, w, scale, None, None, wanted)


def _sigmoid_context(ctx, inputs, output):
    *tensors, _, ctx.need, ctx.workspace_bytes, ctx.backend = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _sigmoid_backward(ctx, grad, *_):
    _once(grad)
    if grad is None:
        return 12 * (None,)
    x, w, target, weight, scale, bias, row_id, col_id, rows, dot, soft, dx, dw = ctx.saved_tensors
    dweight = None
    if weight is None:
        of_rows = grad
        if any(ctx.need[:2]):
            end = (False, ctx.need, ctx.workspace_bytes, ctx.backend)
            *_, dx, dw = call(sigmoid_loss, x, w, target, grad, scale, bias, row_id, col_id, *end)
    else:
        of_rows, dweight = times(weight, grad), times(rows, grad)
        dx, dw = (_scaled(g, grad, ctx.backend) for g in (dx, dw))
    dx, dw = (g if wanted else None for g, wanted in zip((dx, dw), ctx.need, strict=False))
    dscale = dbias = None
    if ctx.need[2]:  # summed in float64: their terms cancel
        dscale = (times(of_rows, dot).sum(dtype=torch.float64) / scale).to(scale.dtype)
        dbias = times(of_rows, soft).sum(dtype=torch.float64).to(bias.dtype)
    return dx, dw, None, dweight, dscale, dbias, *6 * [None]


differentiable(sigmoid_loss, _sigmoid_backward, _sigmoid_context)
