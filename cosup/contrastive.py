"""Losses of queries against a pool of candidates.

info_nce        next sequence: softmax over the embeddings of passages
sigmoid_loss    the same by a yes or no for each pair
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosup import ops
from cosup.agreement import note, reopen, same_call, settle
from cosup.checks import (
    as_number,
    as_temperature,
    autocast,
    check_call,
    check_distinct,
    check_pair,
    check_reduction,
    check_smoothing,
    check_targets,
    check_vector,
)
from cosup.direct import call
from cosup.distributed import SumOverRanks, loss_of_ranks, mean_of_ranks
from cosup.distributed import gather as gather_rows
from cosup.positives import POOLS
from cosup.softmax import RowStats, softmax_nll, weights_known
from cosup.walk import default_workspace, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GATHERS = ("exact", "detached", "local")
LAYOUTS = ("auto", "all_gather", "ring")
RING_WORKSPACES = 4  # more of them than this are not gathered


@same_call(contents=("temperature",))
def info_nce(query: Tensor, candidates: Tensor, target: Tensor | None = None, *, hard_negatives: Tensor | None = None,
             query_negatives: bool = False, candidate_negatives: bool = False,
             temperature: float | Tensor = 0.05, normalize: bool = True, symmetric: bool = False,
             query_ids: Tensor | None = None, candidate_ids: Tensor | None = None,
             positives: tuple[Tensor, Tensor] | str | None = None, positives_pool: str = "mean",
             candidate_bias: Tensor | None = None, sample_weight: Tensor | None = None, margin: float = 0.0,
             false_negative_margin: float | None = None, label_smoothing: float = 0.0, reduction: str = "mean",
             return_stats: bool = False, process_group: ProcessGroup | None = None, gather: str = "exact",
             layout: str = "auto", workspace_bytes: int | None = None,
             backend: str = "auto") -> Tensor | tuple[Tensor, RowStats]:  # fmt: skip
    """Contrastive loss of queries against a pool of candidates; similarities are made in tiles.

        z[n, m] = (<q[n], c[m]> - margin [m == target[n]]) / temperature + candidate_bias[m]
        loss[n] = logsumexp_m z[n, m] - z[n, target[n]]
        loss[n] = (that + logsumexp_n' z[n', target[n]] - z[n, target[n]]) / 2         symmetric
        loss[n] = logsumexp_m z[n, m] - pool_p z[n, p], p of positives of n            several positives

    Same value and gradients as ``F.cross_entropy(q @ c.T / temperature, target)`` with q, c normalised if asked, and
    symmetric as the mean of that and ``F.cross_entropy((q @ c.T / temperature).T[target], arange)``. A candidate with
    the id of a row's positive is no negative of that row, in either direction: the pair is left out of both softmaxes.

    Args:
        query: [N, D]; float32, bfloat16, float16 or float64. Under autocast both operands take autocast's dtype.
        candidates: [M, D], dtype and device of ``query``. M may be above N: further rows are further negatives.
        target: [N] int64, the row of each query's positive; None: row n for query n (M >= N).
        hard_negatives: [N, H, D], further negatives of each query alone. Their statistics join the row's after the
            sweep, so a mean or sum takes a second one: 4U. Those that all queries may see belong in ``candidates``.
        query_negatives: The other queries are negatives of a query too.
        candidate_negatives: The other candidates are negatives of a query's positive too, in the same softmax. Either
            is a walk of its own, 4U of its size or, where rows and columns are the same vectors, half of that, and a
            mean or sum takes 4U for the first; ids leave out pairs in them as in the first; ranks are among the
            candidates. Not with ``positives``, nor on a ring.
        temperature: Positive divisor; a scalar tensor gets its gradient.
        normalize: Divide rows by their Euclidean norm (at least 1e-12) first; the copies are beside the workspace.
        symmetric: Each positive must also be told its query among all queries; no two queries may have one positive.
            Both directions come from one product: 3U where all logits fit the budget, else 4U.
        query_ids: [N] int64, the id of each query's positive; None: ``candidate_ids[target]``.
        candidate_ids: [M] int64, equal for equal passages; None: no two are equal.
        positives: Several of each query, in place of ``target``: (start [N + 1], columns [P]), int64, where
            columns[start[n]:start[n + 1]] are rows of ``candidates``, each once; or "ids": all candidates with the id
            of the query. A query without any has the loss 0 and no weight in the mean. Ranks are of the best positive,
            among the negatives. Not with ``symmetric``, ``hard_negatives``, margins, or, as lists, ids. About 64 bytes
            to a pair are beside the workspace; on CUDA, "ids" makes the host wait for their number.
        positives_pool: "mean": each positive's own loss, on average (the others then stand in its denominator);
            "logsumexp": the probability of any of them.
        candidate_bias: [M] floating point, added to the logits, with a gradient: -log of the sampling probability
            corrects for popular candidates (logQ).
        sample_weight: [N] floating point, a weight of each query's loss; "mean" divides by their sum.
        margin: Taken from the positive's similarity in the loss (CosFace); the rank does not see it.
        false_negative_margin: Candidates whose similarity is above the positive's by more than this are taken for
            positives without a label, and left out; None: none.
        label_smoothing: This share of each query's target is spread over the candidates evenly, those left out
            excepted; in the direction of the queries only.
        reduction: "mean", "sum" or "none" ([N], with any upstream gradient).
        return_stats: Also return :class:`RowStats` (rank and top-1 among the candidates), from the same pass.
        process_group: Each of its ranks has queries and candidates of its own, none or many, and ``target`` among its
            own. A mean or sum is over all ranks' queries, and comes out on every rank, with the gradients of what is
            here: their sum over ranks, not their mean, is a parameter's. "none" gives the queries here. Each call tells
            the others how many rows are here, and waits; all ranks make the same calls and ask the same gradients. An
            error on one, or a difference, is raised on all.
        gather: Which candidates a query sees. "exact": those of all ranks, with gradients: as one process with all rows
            in rank order. "detached": those of all ranks, but gradients go to the own ones only. "local": the own ones.
        layout: How ``gather="exact"`` is done. "all_gather": each rank holds all candidates, and their gradient.
            "ring": each rank's go round, two ranks' are held at a time, and each is multiplied twice (4U). "auto": a
            ring where all of them and their gradient take more than four workspaces.
        workspace_bytes, backend: As in :func:`linear_cross_entropy`.

    Returns:
        The loss in float32 (float64 for float64 input): a scalar, or [N] with ``reduction="none"``; 0 for no queries.

    Raises:
        ValueError: A wrong shape, dtype, device or option, named with what was wanted and what came.
        IndexError: A target out of range (on CUDA a device-side assertion).

    Sources: van den Oord et al. 2018, arXiv:1807.03748, eq. 4; symmetric, Radford et al. 2021, arXiv:2103.00020;
    margin, Wang et al. 2018, arXiv:1801.09414; logQ, Yi et al. 2019, doi:10.1145/3298689.3346996; positives, "mean":
    Khosla et al. 2020, arXiv:2004.11362, eq. 2, "logsumexp": Miech et al. 2020, arXiv:1912.06430.
    """  # fmt: skip
    pool = _pool(query, candidates, target, query_ids, candidate_ids, candidate_bias, positives)
    n, device, by_id = len(pool.query), query.device, isinstance(positives, str)
    further = query_negatives or candidate_negatives
    if positives_pool not in POOLS:
        raise ValueError(f"positives_pool must be one of {POOLS}, got {positives_pool!r}")
    if positives is not None:
        _check_positives(positives, pool)
        if process_group is None or gather == "local":
            _check_some(n, len(pool.candidates))
        if symmetric or margin or false_negative_margin is not None or hard_negatives is not None or further:
            names = "symmetric, hard_, query_ and candidate_negatives, margin and false_negative_margin"
            raise ValueError(f"want positives or one of {names}, got both")
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, (n,), device, None)
    for name, number in {"margin": margin, "false_negative_margin": false_negative_margin or 0.0}.items():
        if not isinstance(number, float | int) or not abs(number) < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {number!r}")
    check_smoothing(label_smoothing)
    if label_smoothing and false_negative_margin is not None:
        raise ValueError("want label_smoothing or false_negative_margin, got both")
    check_reduction(reduction)
    for name, value, choices in (("gather", gather, GATHERS), ("layout", layout, LAYOUTS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}, got {value!r}")
    may_ring = gather == "exact" and not by_id and not further
    if layout == "ring" and not may_ring:
        raise ValueError('layout "ring" wants gather "exact", positives as lists, no query_ or candidate_negatives')
    if symmetric and candidate_negatives:
        raise ValueError("want symmetric or candidate_negatives, got both")
    if process_group is not None and symmetric and gather == "detached":
        raise ValueError('want gather "exact" or "local" where symmetric, got "detached"')
    if symmetric:
        check_distinct(pool.target, len(pool.candidates))
    hard = hard_negatives
    if hard is not None:
        hard, *_ = autocast(hard, candidates, None)
        if hard.ndim != 3 or (hard.shape[0], hard.shape[2]) != pool.query.shape or hard.dtype != pool.query.dtype:
            want = f"[{n}, H, {query.shape[1]}] of {pool.query.dtype}"
            raise ValueError(f"hard_negatives must be {want}, got {[*hard.shape]} of {hard.dtype}")
    dtype = torch.promote_types(pool.query.dtype, torch.float32)
    scale = 1 / as_temperature(temperature, device).to(dtype)
    if normalize:
        pool = pool.unit()
        hard = None if hard is None else _unit(hard)
    if process_group is not None:
        if positives is None:
            check_targets(pool.target, len(pool.candidates))
        layout = layout if may_ring else "all_gather"
        counts = _counts(pool, process_group, gather, reduction, workspace_bytes, backend)
        pool = _of_all_ranks(pool, process_group, gather, layout, query_negatives, counts)

    if pool.group is not None and positives is not None:
        _check_some(sum(counts[0]), pool.total)  # as all ranks do
    weight = None if sample_weight is None else sample_weight.to(dtype)
    pairs, row_id, col_id = None, pool.query_ids, pool.candidate_ids
    if positives is not None:
        if isinstance(positives, str):
            pairs = call(ops.pairs_of_ids, row_id, col_id)
        else:
            pairs = positives[0], positives[1] + pool.first
        row_id = col_id = None  # where ids say what is positive they leave out nothing
        pool = pool._replace(target=torch.zeros_like(pool.target))
        some = pairs[0].diff() > 0
        weight = some.to(dtype) if weight is None else weight.masked_fill(~some, 0.0)
    over_ranks: Callable[[Tensor, ProcessGroup], Tensor] = loss_of_ranks
    once = reduction  # of the rows here
    if process_group is not None and reduction == "mean":
        weight, over_ranks = _over_ranks(weight, pool, counts, process_group)
        once = "sum"
    alone = pool.group is None or not (pool.ring or symmetric)
    if alone and (reduction != "none" or workspace_bytes is not None):
        reopen(process_group)  # nothing is exchanged before the loss, and a budget may be too small
    later = hard is not None or further
    loss, stats = softmax_nll(
        pool.query, pool.candidates, pool.target, scale, bias=None if pool.bias is None else pool.bias.to(dtype),
        row_id=row_id, col_id=col_id, pairs=pairs, pool=positives_pool, margin=margin, gap=false_negative_margin,
        symmetric=symmetric, weight=weight, label_smoothing=label_smoothing,
        kept=_kept(pool, row_id) if label_smoothing else None, rank=return_stats,
        row_group=pool.group if symmetric and not pool.ring else None, ring=pool.group if pool.ring else None,
        parts=pool.counts if pool.ring else None,
        reduction="none" if later else once, host_scale=None if isinstance(temperature, Tensor) else 1 / temperature,
        workspace_bytes=workspace_bytes, backend=backend,
    )  # fmt: skip
    if pairs is not None and return_stats:
        stats = RowStats(*(f.masked_fill(~some, 0) for f in stats))
    if later:
        place: Tensor | None = None
        groups: list[tuple[Tensor, Tensor]] = []
        if hard is not None:
            z_NH = scale * torch.bmm(hard, pool.query[:, :, None]).squeeze(2).to(dtype)
            place = _place(stats, z_NH, margin * scale) if return_stats else None
            groups.append((z_NH, torch.zeros_like(z_NH)))
        options: Any = {"scale": scale, "workspace_bytes": workspace_bytes, "backend": backend}
        if query_negatives and pool.group is None:
            groups.append(_others_alike(pool.query, row_id, **options))
        elif query_negatives:
            own = pool.first_query + torch.arange(n, device=device)
            groups.append(_others(pool.query, pool.queries, own, row_id, pool.ids_of_queries, **options))
        if candidate_negatives and pool.group is None and target is None and query_ids is None and n == pool.total:
            groups.append(_others_alike(pool.candidates, col_id, **options))
        elif candidate_negatives:
            of_target = pool.candidates[pool.target]
            groups.append(_others(of_target, pool.candidates, pool.target, row_id, col_id, **options))
        lse_NG, entropy_NG = (torch.cat(parts, 1) for parts in zip(*groups, strict=True))
        more, stats = _with_further_negatives(stats, lse_NG, entropy_NG, place)
        weight = torch.ones_like(more) if weight is None else weight
        loss = loss + ops.weighted(weight / 2 if symmetric else weight, more)
        if once != "none":
            total = weight.sum()
            loss = loss.sum() / (torch.where(total == 0, 1.0, total) if once == "mean" else 1.0)
    if process_group is not None and reduction != "none":
        loss = over_ranks(loss, process_group)
    return (loss, RowStats(*(f.detach() for f in stats))) if return_stats else loss


@same_call(contents=("temperature", "bias"))
def sigmoid_loss(query: Tensor, candidates: Tensor, target: Tensor | None = None, *,
                 temperature: float | Tensor = 0.1, bias: float | Tensor = -10.0, normalize: bool = True,
                 query_ids: Tensor | None = None, candidate_ids: Tensor | None = None,
                 sample_weight: Tensor | None = None, reduction: str = "mean",
                 process_group: ProcessGroup | None = None, gather: str = "exact",
                 workspace_bytes: int | None = None, backend: str = "auto") -> Tensor:  # fmt: skip
    """Each pair of a query and a candidate by itself: do they belong together? Pairs are made in tiles.

        z[n, m] = <q[n], c[m]> / temperature + bias                 q, c of unit length if normalize
        loss[n] = softplus(-z[n, target[n]]) + sum_{m != target[n]} softplus(z[n, m])

    Same value and gradients as ``-F.logsigmoid(y * z).sum() / N`` with y 1 at the targets and -1 elsewhere: "mean" is
    SigLIP's, over queries and not over pairs. No pair waits for the rest of its row: a mean or sum takes 3U at any
    budget.

    Args:
        query: [N, D]; float32, bfloat16, float16 or float64. Under autocast both operands take autocast's dtype.
        candidates: [M, D], dtype and device of ``query``; further rows than positives are further negatives.
        target: [N] int64, the row of each query's positive; None: row n for query n (M >= N).
        temperature: Positive divisor; a scalar tensor gets its gradient.
        bias: Added to all logits; a scalar tensor gets its gradient. Far below 0 at the start, since most pairs are
            negatives.
        normalize: Divide rows by their Euclidean norm (at least 1e-12) first; the copies are beside the workspace.
        query_ids: [N] int64, the id of each query's positive; None: ``candidate_ids[target]``.
        candidate_ids: [M] int64, equal for equal passages: those with the positive's id are no negatives. None: no two
            are equal.
        sample_weight: [N] floating point, a weight of each query's loss, with a gradient; "mean" divides by their sum.
        reduction: "mean", "sum" or "none" ([N], with any upstream gradient).
        process_group, gather, workspace_bytes: As in :func:`info_nce`.
        backend: As in :func:`linear_cross_entropy`; "fused" is "triton" here.

    Returns:
        The loss in float32 (float64 for float64 input): a scalar, or [N] with ``reduction="none"``; 0 for no queries.

    Raises:
        ValueError: A wrong shape, dtype, device or option, named with what was wanted and what came.
        IndexError: A target out of range (on CUDA a device-side assertion).

    Source: SigLIP, Zhai et al. 2023, arXiv:2303.15343.
    """
    pool = _pool(query, candidates, target, query_ids, candidate_ids)
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, (len(pool.query),), query.device, None)
    check_reduction(reduction)
    if gather not in GATHERS:
        raise ValueError(f"gather must be one of {GATHERS}, got {gather!r}")
    check_call(workspace_bytes)
    backend = resolve(backend, pool.query)
    dtype = torch.promote_types(pool.query.dtype, torch.float32)
    scale = 1 / as_temperature(temperature, query.device).to(dtype)
    shift = as_number("bias", bias, query.device).to(dtype)
    if normalize:
        pool = pool.unit()
    if process_group is not None:
        check_targets(pool.target, len(pool.candidates))
        counts = _counts(pool, process_group, gather, reduction, workspace_bytes, backend)
        pool = _of_all_ranks(pool, process_group, gather, "all_gather", False, counts)
    weight = None if sample_weight is None else sample_weight.to(dtype)
    over_ranks: Callable[[Tensor, ProcessGroup], Tensor] = loss_of_ranks
    if process_group is not None and reduction == "mean":
        weight, over_ranks = _over_ranks(weight, pool, counts, process_group)
    weight = torch.ones_like(pool.target, dtype=dtype) if weight is None else weight
    if process_group is None and reduction == "mean":
        total = weight.sum()
        weight = ops.divided(weight, total.masked_fill(total == 0, 1.0))
    if reduction != "none" or workspace_bytes is not None:
        reopen(process_group)  # nothing is exchanged before the loss, and a budget may be too small
    grad = torch.is_grad_enabled()
    need = [grad and t.requires_grad for t in (pool.query, pool.candidates)]
    need.append(grad and (scale.requires_grad or shift.requires_grad))
    known = weight if weights_known(reduction, pool.query.dtype) and any(need[:2]) else None
    end: Any = (True, need, workspace_bytes, "triton" if backend == "fused" else backend)
    operands = (pool.query, pool.candidates, pool.target, known, scale, shift, pool.query_ids, pool.candidate_ids)
    loss, *_ = call(ops.sigmoid_loss, *operands, *end)
    if known is None:
        loss = ops.weighted(weight, loss)
        loss = loss if reduction == "none" else loss.sum()
    if process_group is not None and reduction != "none":
        loss = over_ranks(loss, process_group)
    return loss


class _Pool(NamedTuple):
    """Queries, and the candidates that they see: at first those here, then perhaps those of other ranks too."""

    query: Tensor  # [N, D]
    candidates: Tensor  # [M, D]
    target: Tensor  # [N], among the candidates of all ranks
    query_ids: Tensor | None  # [N]
    candidate_ids: Tensor | None  # [M]
    bias: Tensor | None  # [M]
    queries: Tensor  # of all ranks, where they are negatives,
    ids_of_queries: Tensor | None  # and theirs
    ids_of_all: Tensor | None  # of the candidates of all ranks,
    total: int  # of which there are so many
    first: int = 0  # number of the first one here
    group: str | None = None  # of the ranks whose candidates are seen,
    counts: list[int] | None = None  # so many of each
    ring: bool = False  # whether they come one rank's after another's; else they are gathered here
    first_query: int = 0  # the same of the queries, where those are negatives

    def unit(self) -> _Pool:
        query = _unit(self.query)
        return self._replace(query=query, candidates=_unit(self.candidates), queries=query)


def _pool(query, candidates, target, query_ids, candidate_ids, bias=None, positives=None) -> _Pool:
    """Check queries, candidates and what says which belong together; the target and the ids, if not given."""
    if positives is not None and target is not None:
        raise ValueError("want target or positives, got both")
    query, candidates, _ = autocast(query, candidates, None)
    if query.ndim != 2:
        raise ValueError(f"query must be [N, D], got {[*query.shape]}")
    check_pair("query", query, "candidates", candidates)
    n, m = query.shape[0], candidates.shape[0]
    if target is None and positives is None and m < n:
        raise ValueError(f"candidates must have a row for each of the {n} queries when target is None, got {m} rows")
    if query_ids is not None and candidate_ids is None:
        raise ValueError("query_ids without candidate_ids: want both, or candidate_ids alone")
    if positives is not None:
        target = torch.zeros(n, dtype=torch.int64, device=query.device)  # which is not read
    elif target is None:
        target = torch.arange(n, device=query.device)
    check_vector("target", target, (n,), query.device, torch.int64)
    if candidate_ids is not None:
        check_vector("candidate_ids", candidate_ids, (m,), query.device, torch.int64)
        if query_ids is None and positives is None:  # out-of-range targets are the engine's to refuse
            query_ids = candidate_ids[target.clamp(0, m - 1)] if m else target
    if query_ids is not None:
        check_vector("query_ids", query_ids, (n,), query.device, torch.int64)
    if bias is not None:
        check_vector("candidate_bias", bias, (m,), query.device, None)
    return _Pool(query, candidates, target, query_ids, candidate_ids, bias, query, query_ids, candidate_ids, m)


def _counts(pool: _Pool, group: ProcessGroup, gather: str, reduction: str, workspace_bytes: int | None,
            backend: str) -> list[list[int]]:  # fmt: skip
    """The call is the same on all ranks, and none failed: queries, candidates and budget of each; []: not told, as the
    rank is alone until the loss, or so that the host needs not wait for a GPU."""
    check_call(workspace_bytes)
    device, budgeted = pool.query.device, workspace_bytes is not None
    note(group, dtype=str(pool.query.dtype), backend=resolve(backend, pool.query), workspace_bytes=budgeted)
    if gather == "local" and reduction != "none":
        return []
    budget = workspace_bytes if workspace_bytes is not None else default_workspace(device)
    return settle(group, len(pool.query), len(pool.candidates), budget, needed=gather != "local")


def _over_ranks(weight: Tensor | None, pool: _Pool, counts: list[list[int]],
                group: ProcessGroup) -> tuple[Tensor, Callable[[Tensor, ProcessGroup], Tensor]]:  # fmt: skip
    """The weights of the rows here over those of all ranks' rows, and what then makes the sum here that of all. Without
    counts over the own ones times the number of ranks, which is the same where all ranks weigh the same."""
    weighted = weight is not None
    if weight is None:
        weight = torch.ones_like(pool.target, dtype=torch.promote_types(pool.query.dtype, torch.float32))
    if counts:
        total = SumOverRanks.apply(weight.sum(), group) if weighted else weight.new_full((), sum(counts[0]))
        return ops.divided(weight, total.masked_fill(total == 0, 1.0)), loss_of_ranks
    total = weight.sum()
    divisor = total.detach().masked_fill(total == 0, 1.0) * group.size()
    return ops.divided(weight, divisor), functools.partial(mean_of_ranks, total=total, divisor=divisor)


def _of_all_ranks(pool: _Pool, process_group: ProcessGroup, gather: str, layout: str, with_queries: bool,
                  told: list[list[int]]) -> _Pool:  # fmt: skip
    """With the candidates of all ranks, gathered or to come in a ring; collective."""
    if gather == "local":
        return pool
    d, exact, rank = pool.query.shape[1], gather == "exact", process_group.rank()
    queries, counts, budgets = told
    first, total = sum(counts[:rank]), sum(counts)
    large = 2 * total * d * pool.query.element_size() > RING_WORKSPACES * min(budgets)
    collect = functools.partial(gather_rows, counts=counts, group=process_group)
    ids = None if pool.candidate_ids is None else collect(pool.candidate_ids, gradients=False)
    ring = layout == "ring" or (layout == "auto" and large)
    pool = pool._replace(target=pool.target + first, ids_of_all=ids, total=total, first=first,
                         group=process_group.group_name, counts=counts, ring=ring)  # fmt: skip
    if with_queries:
        of_queries = functools.partial(gather_rows, counts=queries, group=process_group)
        pool = pool._replace(
            queries=of_queries(pool.query, gradients=exact), first_query=sum(queries[:rank]),
            ids_of_queries=None if pool.query_ids is None else of_queries(pool.query_ids, gradients=False),
        )  # fmt: skip
    if pool.ring:
        return pool
    return pool._replace(candidates=collect(pool.candidates, gradients=exact), candidate_ids=ids,
                         bias=None if pool.bias is None else collect(pool.bias, gradients=exact))  # fmt: skip


def _kept(pool: _Pool, row_id: Tensor | None) -> Tensor:
    """How many candidates ids do not leave out: of each query, or of all."""
    ids = pool.ids_of_all
    if row_id is None or ids is None:
        return torch.full((), pool.total, device=pool.query.device)
    ordered = ids.sort().values
    same = torch.searchsorted(ordered, row_id, right=True) - torch.searchsorted(ordered, row_id)
    return pool.total - same + (ids[pool.target.clamp(0, pool.total - 1)] == row_id)


def _check_some(n: int, m: int) -> None:
    if n and not m:
        raise ValueError(f"candidates must have rows where there are {n} queries, got none")


def _check_positives(positives, pool: _Pool) -> None:
    """Lists are looked into on a CPU, and asserted on CUDA."""
    n, m, query_ids, candidate_ids = len(pool.query), len(pool.candidates), pool.query_ids, pool.candidate_ids
    if isinstance(positives, str):
        if positives != "ids":
            raise ValueError(f'positives must be (start, columns) or "ids", got {positives!r}')
        if query_ids is None or candidate_ids is None:
            raise ValueError('positives "ids" wants query_ids and candidate_ids')
        return
    if query_ids is not None or candidate_ids is not None:
        raise ValueError("want positives as lists or ids, got both")
    if not isinstance(positives, tuple | list) or len(positives) != 2:
        raise ValueError(f'positives must be (start, columns) or "ids", got {positives!r}')
    start, col = positives
    if not isinstance(start, Tensor) or not isinstance(col, Tensor) or col.ndim != 1:
        raise ValueError(f"positives must be two tensors, [{n + 1}] and [P], got {positives!r}")
    check_vector("positives[0]", start, (n + 1,), col.device, torch.int64)
    check_vector("positives[1]", col, col.shape[:1], start.device, torch.int64)
    falls = (start[0] != 0) | (start[-1] != len(col)) | (start.diff() < 0).any()
    outside = (col < 0) | (col >= m)
    key = (torch.searchsorted(start, torch.arange(len(col), device=col.device), right=True) * max(m, 1) + col).sort()
    twice = key.values.diff() == 0
    if col.device.type == "cpu" and not torch.compiler.is_compiling():
        if falls:
            raise ValueError(f"positives[0] must rise from 0 to {len(col)}, the length of positives[1], got {start}")
        if outside.any():
            at = int(outside.nonzero()[0])
            raise IndexError(f"positives[1] must be in [0, {m}), got {int(col[at])} in place {at}")
        if twice.any():
            at = int(key.indices[twice.nonzero()[0]])
            raise ValueError(f"positives[1] must name a candidate once for a query, got {int(col[at])} again at {at}")
    torch._assert_async(~(falls | outside.any() | twice.any()), "positives must be lists of distinct candidates")


def _unit(t: Tensor) -> Tensor:
    """Rows over their Euclidean norm, taken in float32 at least."""
    if torch.compiler.is_compiling():
        return F.normalize(t.to(torch.promote_types(t.dtype, torch.float32)), dim=-1).to(t.dtype)
    return _Unit.apply(t)


class _Unit(torch.autograd.Function):
    """The same as PyTorch's, but part by part: neither pass makes a copy beside its result, and the backward pass
    writes that over the gradient that comes in, which nobody else has."""

    LEAST_NORM, PART = 1e-12, 1 << 22  # elements

    @staticmethod
    def parts(t: Tensor) -> Iterator[slice]:
        step = max(1, _Unit.PART // max(1, t[:1].numel()))
        return (slice(start, start + step) for start in range(0, len(t), step))

    @staticmethod
    def forward(ctx, t):
        dtype = torch.promote_types(t.dtype, torch.float32)
        unit = torch.empty_like(t, memory_format=torch.contiguous_format)
        norm = torch.empty(*t.shape[:-1], 1, dtype=dtype, device=t.device)
        for part in _Unit.parts(t):
            wide = t[part].to(dtype)
            norm[part] = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
            unit[part] = wide / norm[part].clamp(min=_Unit.LEAST_NORM)
        ctx.save_for_backward(t, norm)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        t, norm = ctx.saved_tensors
        for part in _Unit.parts(t):
            long = norm[part].clamp(min=_Unit.LEAST_NORM)
            unit, wide = t[part].to(norm.dtype) / long, grad[part].to(norm.dtype)
            along = (wide * unit).sum(-1, keepdim=True).masked_fill(norm[part] < _Unit.LEAST_NORM, 0.0)
            most = torch.finfo(grad.dtype).max  # which float16 reaches at a row of zeros
            grad[part] = ((wide - along * unit) / long).clamp(-most, most)
        return grad


def _others(x: Tensor, w: Tensor, own: Tensor, x_id: Tensor | None, w_id: Tensor | None, *, scale: Tensor,
            workspace_bytes: int | None, backend: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-sum-exp and entropy of each row's logits, its own column and those of its id left out. [N, 1] each"""
    _, stats = softmax_nll(x, w, own, scale, row_id=x_id, col_id=w_id, margin=float("inf"), reduction="none",
                            rank=False, workspace_bytes=workspace_bytes, backend=backend)  # fmt: skip
    return stats.lse[:, None], stats.entropy.detach().nan_to_num(0.0)[:, None]  # NaN where nothing is left


def _others_alike(x: Tensor, ids: Tensor | None, *, scale: Tensor, workspace_bytes: int | None,
                  backend: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same where rows and columns are one: each pair is multiplied once, for both of its rows."""
    need = torch.is_grad_enabled() and x.requires_grad
    backend = resolve(backend, x)
    backend = "triton" if backend == "fused" else backend  # columns' statistics need the tile
    lse, entropy, *_ = call(ops.lse_of_others, x, scale, ids, need, workspace_bytes, backend)
    return lse[:, None], entropy.nan_to_num(0.0)[:, None]


def _place(stats: RowStats, z_NH: Tensor, margin: Tensor) -> Tensor:
    """The target's rank among further logits too."""
    target = stats.lse - stats.nll + margin
    slack = 4 * torch.finfo(target.dtype).eps * (stats.lse.abs() + stats.nll)  # a tie is not above
    return stats.rank + (z_NH > (target + slack)[:, None]).sum(1)


def _with_further_negatives(stats: RowStats, lse_NG: Tensor, entropy_NG: Tensor,
                            place: Tensor | None) -> tuple[Tensor, RowStats]:  # fmt: skip
    """What further groups of logits add to each row's loss, and the statistics with them."""
    lse_NG = lse_NG.clamp(min=torch.finfo(lse_NG.dtype).min / 4)  # of nothing: no NaN in its gradient
    more = -F.logsigmoid(stats.lse - lse_NG.logsumexp(1))
    lse, nll = stats.lse + more, stats.nll + more
    lse_NG = torch.cat([stats.lse[:, None], lse_NG], 1)
    entropy_NG = torch.cat([stats.entropy[:, None], entropy_NG], 1)
    gap_NG = (lse[:, None] - lse_NG).detach()
    entropy = (torch.exp(-gap_NG) * (entropy_NG + gap_NG)).sum(1)
    place = stats.rank if place is None else place
    return more, RowStats(nll, lse, -nll, entropy, place, place == 1)
