"""Losses of queries against a pool of candidates.

info_nce        next sequence: softmax over the embeddings of passages
sigmoid_loss    the same by a yes or no for each pair
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosup import ops
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
from cosup.distributed import SumOverRanks, sizes_of_ranks
from cosup.distributed import gather as gather_rows
from cosup.positives import POOLS
from cosup.softmax import RowStats, softmax_nll
from cosup.walk import default_workspace, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GATHERS = ("exact", "detached", "local")
LAYOUTS = ("auto", "all_gather", "ring")
RING_WORKSPACES = 4  # more of them than this are not gathered


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
    """Contrastive loss of queries against a pool of candidates; the similarity matrix is never stored whole.

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
            is a walk of its own, 4U of its size, and a mean or sum takes 4U for the first; ids leave out pairs in them
            as in the first; ranks are among the candidates. Not with ``positives``, nor on a ring.
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
            the others how many rows are here, and waits; all ranks make the same calls and ask the same gradients.
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
    given = target
    if positives is not None and target is None:
        target = torch.zeros(query.shape[:1], dtype=torch.int64, device=query.device)
    query, candidates, target, query_ids = _pool(query, candidates, target, query_ids, candidate_ids)
    n, m = query.shape[0], candidates.shape[0]
    if positives is not None:
        _check_positives(positives, positives_pool, given, n, m, query_ids, candidate_ids)
        more_negatives = hard_negatives is not None or query_negatives or candidate_negatives
        if symmetric or margin or false_negative_margin is not None or more_negatives:
            names = "symmetric, hard_, query_ and candidate_negatives, margin and false_negative_margin"
            raise ValueError(f"want positives or one of {names}, got both")
    if candidate_bias is not None:
        check_vector("candidate_bias", candidate_bias, (m,), query.device, None)
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, (n,), query.device, None)
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
    by_id = isinstance(positives, str)
    inner = query_negatives or candidate_negatives
    if layout == "ring" and (gather != "exact" or by_id or inner):
        raise ValueError('layout "ring" wants gather "exact", positives as lists, no query_ or candidate_negatives')
    if symmetric and candidate_negatives:
        raise ValueError("want symmetric or candidate_negatives, got both")
    if process_group is not None and symmetric and gather == "detached":
        raise ValueError('want gather "exact" or "local" where symmetric, got "detached"')
    if symmetric:
        check_distinct(target, m)
    hard = hard_negatives
    if hard is not None:
        hard, *_ = autocast(hard, candidates, None)
        if hard.ndim != 3 or (hard.shape[0], hard.shape[2]) != query.shape or hard.dtype != query.dtype:
            want = f"[{n}, H, {query.shape[1]}] of {query.dtype}"
            raise ValueError(f"hard_negatives must be {want}, got {[*hard.shape]} of {hard.dtype}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / as_temperature(temperature, query.device).to(dtype)
    if normalize:
        query, candidates = _unit(query), _unit(candidates)
        hard = None if hard is None else _unit(hard)
    weight, local_reduction, first, everyone, ring = sample_weight, reduction, 0, None, False
    own_ids, all_queries, first_query, all_query_ids = candidate_ids, query, 0, query_ids
    if process_group is not None:
        if positives is None:
            check_targets(target, m)
        if gather != "local":
            budget = default_workspace(query.device) if workspace_bytes is None else workspace_bytes
            queries, counts, budgets = sizes_of_ranks(process_group, query.device, n, m, budget)
            first, m, everyone = sum(counts[: process_group.rank()]), sum(counts), process_group.group_name
            target = target + first if positives is None else target
            held = 2 * m * query.shape[1] * query.element_size()
            large = gather == "exact" and not by_id and not inner and held > RING_WORKSPACES * min(budgets)
            ring = layout == "ring" or (layout == "auto" and large)
            exact = gather == "exact"
            if candidate_ids is not None:
                candidate_ids = gather_rows(candidate_ids, counts, process_group, gradients=False)
            if query_negatives:
                all_queries = gather_rows(query, queries, process_group, gradients=exact)
                first_query = sum(queries[: process_group.rank()])
                if query_ids is not None:
                    all_query_ids = gather_rows(query_ids, queries, process_group, gradients=False)
            if not ring:
                candidates = gather_rows(candidates, counts, process_group, gradients=exact)
                own_ids = candidate_ids
                if candidate_bias is not None:
                    candidate_bias = gather_rows(candidate_bias, counts, process_group, gradients=exact)
    pairs = None
    if positives is not None:
        pairs, has_any, query_ids, candidate_ids = _pairs(positives, first, query_ids, candidate_ids)
        weight = has_any.to(dtype) if weight is None else weight.to(dtype) * has_any
    if process_group is not None and reduction == "mean":
        weight = torch.ones_like(target, dtype=dtype) if weight is None else weight.to(dtype)
        total = SumOverRanks.apply(weight.sum(), process_group)
        weight, local_reduction = weight / torch.where(total == 0, 1.0, total), "sum"
    kept = None
    if label_smoothing and query_ids is not None and candidate_ids is not None:
        ordered = candidate_ids.sort().values
        same = torch.searchsorted(ordered, query_ids, right=True) - torch.searchsorted(ordered, query_ids)
        kept = m - same + (candidate_ids[target.clamp(0, m - 1)] == query_ids)
    elif label_smoothing:
        kept = torch.full((), m, device=query.device)
    loss, stats = softmax_nll(
        query, candidates, target, scale, bias=None if candidate_bias is None else candidate_bias.to(dtype),
        row_id=query_ids, col_id=None if query_ids is None else own_ids, pairs=pairs, pool=positives_pool,
        margin=margin, gap=false_negative_margin, symmetric=symmetric, weight=weight, label_smoothing=label_smoothing,
        kept=kept, rank=return_stats, row_group=everyone if symmetric and not ring else None,
        ring=everyone if ring else None, reduction=local_reduction if hard is None and not inner else "none",
        workspace_bytes=workspace_bytes, backend=backend,
    )  # fmt: skip
    if pairs is not None:
        stats = RowStats(*(f * has_any for f in stats))
    if hard is not None or inner:
        place: Tensor | None = None
        further: list[tuple[Tensor, Tensor]] = []
        if hard is not None:
            z_NH = scale * torch.bmm(hard, query[:, :, None]).squeeze(2).to(dtype)
            place = _place(stats, z_NH, margin * scale)
            further.append((z_NH, torch.zeros_like(z_NH)))
        others = functools.partial(_others, scale=scale, workspace_bytes=workspace_bytes, backend=backend)
        if query_negatives:
            own = first_query + torch.arange(n, device=query.device)
            further.append(others(query, all_queries, own, query_ids, all_query_ids))
        if candidate_negatives:
            further.append(others(candidates[target], candidates, target, query_ids, candidate_ids))
        lse_NG, entropy_NG = (torch.cat(groups, 1) for groups in zip(*further, strict=True))
        more, stats = _with_further_negatives(stats, lse_NG, entropy_NG, place)
        weight = torch.ones_like(more) if weight is None else weight.to(dtype)
        loss = loss + (weight / 2 if symmetric else weight) * more
        if local_reduction != "none":
            divisor = weight.sum() if local_reduction == "mean" else 1.0
            loss = loss.sum() / divisor if n else loss.sum()
    if process_group is not None and reduction != "none":
        elsewhere = SumOverRanks.apply(loss.detach(), process_group) - loss.detach()
        loss = loss + elsewhere
    return (loss, RowStats(*(f.detach() for f in stats))) if return_stats else loss


def sigmoid_loss(query: Tensor, candidates: Tensor, target: Tensor | None = None, *,
                 temperature: float | Tensor = 0.1, bias: float | Tensor = -10.0, normalize: bool = True,
                 query_ids: Tensor | None = None, candidate_ids: Tensor | None = None,
                 sample_weight: Tensor | None = None, reduction: str = "mean",
                 process_group: ProcessGroup | None = None, gather: str = "exact",
                 workspace_bytes: int | None = None, backend: str = "auto") -> Tensor:  # fmt: skip
    """Each pair of a query and a candidate by itself: do they belong together? The matrix of pairs is never stored.

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
    query, candidates, target, query_ids = _pool(query, candidates, target, query_ids, candidate_ids)
    n, m = query.shape[0], candidates.shape[0]
    if sample_weight is not None:
        check_vector("sample_weight", sample_weight, (n,), query.device, None)
    check_reduction(reduction)
    if gather not in GATHERS:
        raise ValueError(f"gather must be one of {GATHERS}, got {gather!r}")
    check_call(workspace_bytes)
    backend = resolve(backend, query)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / as_temperature(temperature, query.device).to(dtype)
    shift = as_number("bias", bias, query.device).to(dtype)
    if normalize:
        query, candidates = _unit(query), _unit(candidates)
    weight = torch.ones_like(target, dtype=dtype) if sample_weight is None else sample_weight.to(dtype)
    if process_group is not None:
        check_targets(target, m)
        if gather != "local":
            _, counts = sizes_of_ranks(process_group, query.device, n, m)
            target = target + sum(counts[: process_group.rank()])
            candidates = gather_rows(candidates, counts, process_group, gradients=gather == "exact")
            if candidate_ids is not None:
                candidate_ids = gather_rows(candidate_ids, counts, process_group, gradients=False)
    if reduction == "mean":
        total = weight.sum() if process_group is None else SumOverRanks.apply(weight.sum(), process_group)
        weight = weight / torch.where(total == 0, 1.0, total)
    grad = torch.is_grad_enabled()
    need = [grad and t.requires_grad for t in (query, candidates)]
    need.append(grad and (scale.requires_grad or shift.requires_grad))
    # float16 waits for the upstream gradient, as a softmax does
    known = weight if reduction != "none" and query.dtype != torch.float16 and any(need[:2]) else None
    end: Any = (True, need, workspace_bytes, "triton" if backend == "fused" else backend)
    loss, *_ = ops.sigmoid_loss(query, candidates, target, known, scale, shift, query_ids, candidate_ids, *end)
    if known is None:
        loss = weight * loss if reduction == "none" else (weight * loss).sum()
    if process_group is not None and reduction != "none":
        loss = loss + (SumOverRanks.apply(loss.detach(), process_group) - loss.detach())
    return loss


def _pool(query, candidates, target, query_ids, candidate_ids):
    """Check queries, candidates and what says which belong together; the target and the ids, if not given."""
    query, candidates, _ = autocast(query, candidates, None)
    if query.ndim != 2:
        raise ValueError(f"query must be [N, D], got {[*query.shape]}")
    check_pair("query", query, "candidates", candidates)
    n, m = query.shape[0], candidates.shape[0]
    if target is None:
        if m < n:
            raise ValueError(
                f"candidates must have a row for each of the {n} queries when target is None, got {m} rows"
            )
        target = torch.arange(n, device=query.device)
    check_vector("target", target, (n,), query.device, torch.int64)
    if query_ids is not None and candidate_ids is None:
        raise ValueError("query_ids without candidate_ids: want both, or candidate_ids alone")
    if candidate_ids is not None:
        check_vector("candidate_ids", candidate_ids, (m,), query.device, torch.int64)
        if query_ids is None:  # out-of-range targets are the engine's to refuse
            query_ids = candidate_ids[target.clamp(0, m - 1)] if m else target
        check_vector("query_ids", query_ids, (n,), query.device, torch.int64)
    return query, candidates, target, query_ids


def _check_positives(positives, pool, target, n: int, m: int, query_ids, candidate_ids) -> None:
    """Lists are looked into on a CPU, and asserted on CUDA."""
    if pool not in POOLS:
        raise ValueError(f"positives_pool must be one of {POOLS}, got {pool!r}")
    if target is not None:
        raise ValueError("want target or positives, got both")
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


def _pairs(positives: tuple[Tensor, Tensor] | str, first: int, query_ids: Tensor | None, candidate_ids: Tensor | None):
    """The lists of positives among the columns of all ranks, which rows have any, and what ids mask then."""
    if isinstance(positives, str):
        start, col = ops.pairs_of_ids(query_ids, candidate_ids)
    else:
        start, col = positives[0], positives[1] + first
    return (start, col), start.diff() > 0, None, None  # where ids say what is positive they leave out nothing


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
            grad[part] = (wide - along * unit) / long
        return grad


def _others(x: Tensor, w: Tensor, own: Tensor, x_id: Tensor | None, w_id: Tensor | None, *, scale: Tensor,
            workspace_bytes: int | None, backend: str) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-sum-exp and entropy of each row's logits, its own column and those of its id left out. [N, 1] each"""
    _, stats = softmax_nll(x, w, own, scale, row_id=x_id, col_id=w_id, margin=float("inf"), reduction="none",
                            rank=False, workspace_bytes=workspace_bytes, backend=backend)  # fmt: skip
    return stats.lse[:, None], stats.entropy.detach().nan_to_num(0.0)[:, None]  # NaN where nothing is left


def _place(stats: RowStats, z_NH: Tensor, margin: Tensor) -> Tensor:
    """The target's rank among further logits too."""
    target = stats.lse - stats.nll + margin
    slack = 4 * torch.finfo(target.dtype).eps * (stats.lse.abs() + stats.nll)  # a tie is not above
    return stats.rank + (z_NH > (target + slack)[:, None]).sum(1)


def _with_further_negatives(stats: RowStats, lse_NG: Tensor, entropy_NG: Tensor,
                            place: Tensor | None) -> tuple[Tensor, RowStats]:  # fmt: skip
    """What further groups of logits add to each row's loss, and the statistics with them."""
    lse_NG = lse_NG.clamp(min=torch.finfo(lse_NG.dtype).min / 4)  # of nothing: no NaN in its gradient
    more = F.softplus(lse_NG.logsumexp(1) - stats.lse)
    lse, nll = stats.lse + more, stats.nll + more
    lse_NG = torch.cat([stats.lse[:, None], lse_NG], 1)
    entropy_NG = torch.cat([stats.entropy[:, None], entropy_NG], 1)
    gap_NG = (lse[:, None] - lse_NG).detach()
    entropy = (torch.exp(-gap_NG) * (entropy_NG + gap_NG)).sum(1)
    place = stats.rank if place is None else place
    return more, RowStats(nll, lse, -nll, entropy, place, place == 1)
