"""The losses: short formulas over the engine, and the checks of what the user gives.

linear_cross_entropy   next token:    softmax over the rows of an LM head
linear_log_prob        the same softmax's log-probabilities and entropies, row by row
info_nce               next sequence: softmax over the embeddings of passages
sigmoid_loss           the same by a yes or no for each pair
co_supervision_loss    L = L_NTP + nsp_weight * L_NSP      (arXiv 2403.09024)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cosup import ops
from cosup.distributed import SumOverRanks, sizes_of_ranks
from cosup.distributed import gather as gather_rows
from cosup.positives import POOLS
from cosup.walk import RowWeights, default_workspace, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REDUCTIONS = ("mean", "sum", "none")
GATHERS = ("exact", "detached", "local")
LAYOUTS = ("auto", "all_gather", "ring")
RING_WORKSPACES = 4  # more of them than this are not gathered
MODES = ("joint", "ntp", "nsp")


class RowStats(NamedTuple):
    """What one pass over the logits says of each row; all [N], zeros at ignored rows.

    No gradients, but for those of ``nll``, ``lse``, ``log_prob`` and ``entropy`` from :func:`linear_log_prob`.
    """

    nll: Tensor  # -log p[target], nats
    lse: Tensor  # log sum exp of the logits
    log_prob: Tensor  # log p[target] = -nll
    entropy: Tensor  # -sum p log p, nats
    rank: Tensor  # int64, 1 + number of columns whose logit is above the target's; the last for a row of NaN
    top1: Tensor  # bool, rank == 1 and no NaN


class CoSupervisionOutput(NamedTuple):
    loss: Tensor
    ntp_loss: Tensor
    nsp_loss: Tensor
    ntp_count: Tensor  # int64, NTP targets
    nsp_count: int  # queries
    nsp_stats: RowStats | None  # None without queries, and in mode "ntp"


def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
                         weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100,
                         label_smoothing: float = 0.0, z_loss: float = 0.0, logit_scale: float = 1.0,
                         logit_softcap: float | None = None, token_weight: Tensor | None = None, shift: int = 0,
                         lora: tuple[Tensor, Tensor, float] | None = None, return_stats: bool = False,
                         process_group: ProcessGroup | None = None, batch_invariant: bool = False,
                         workspace_bytes: int | None = None, backend: str = "auto",
                         ) -> Tensor | tuple[Tensor, RowStats]:  # fmt: skip
    """Cross entropy of a linear layer's logits, which are never stored whole.

        z = logit_scale * (input @ linear_weight.T + linear_bias);  z = logit_softcap * tanh(z / logit_softcap)
        lse[n] = logsumexp(z[n]),   t = target[n],   s = label_smoothing,   c = weight (1 without it)
        loss[n] = (1 - s) c[t] (lse[n] - z[n, t]) + s / V sum_v c[v] (lse[n] - z[n, v]) + z_loss lse[n]^2
        loss = sum_n token_weight[n] loss[n]          over rows not ignored

    Same value and gradients as ``F.cross_entropy(z, target, weight, label_smoothing=s)``. ``"mean"`` divides by
    sum_n token_weight[n] c[target[n]], or by 1 where that is 0. With no row left the loss and its gradients are 0.

    Args:
        input: [..., D]; float32, bfloat16, float16 or float64. Under autocast it and the head take autocast's dtype.
        linear_weight: [V, D], dtype and device of ``input``.
        target: [...] int64, in [0, V) or ``ignore_index``.
        linear_bias: [V].
        weight: [V], a weight for each class; no gradient.
        reduction: "mean", "sum" or "none" ([...], with any upstream gradient).
        label_smoothing: In [0, 1].
        z_loss: Weight of the squared log-sum-exp, at least 0.
        logit_scale: Positive factor of the logits.
        logit_softcap: Positive bound of the logits; None: no bound.
        token_weight: [...] weight of each target's loss, which may ask a gradient.
        shift: The row at t predicts ``target[..., t + shift]``: 1 for a causal model's labels, without a copy of
            ``input``. The last ``shift`` rows are ignored.
        lora: (A [r, D], B [V, r], scaling) of an adapted head, z += scaling * (input @ A.T) @ B.T, never merged. With
            ``linear_weight`` frozen only A and B are trained. B is of this rank where there is a ``process_group``.
        return_stats: Also return :class:`RowStats`, from the same pass.
        process_group: The head's rows are split among its ranks, in rank order, evenly or not: ``linear_weight``,
            ``linear_bias`` and ``weight`` are the part of this rank; the rest is alike on all, ``target`` among all V.
            Loss, statistics and the gradient of ``input`` come out whole on every rank. Each call tells the others
            how many rows are here, and waits; all ranks make the same calls and ask the same gradients.
        batch_invariant: A row's loss, statistics and, with ``reduction`` "sum" or "none", gradient of ``input`` have
            the same bits whatever rows stand beside it. Slower: all products have 64 rows (256 on CUDA), ignored ones
            too; what grows with the number of rows is beside the workspace.
        workspace_bytes: Budget beside inputs, outputs and gradients; None: a sixteenth of the memory
            that is free when a process first asks, down to a power of 2, at most 256 MiB on a CPU and 1 GiB on CUDA
            (`cosup doctor` says how much that is now). With ``process_group`` the least of all ranks.
        backend: "auto", "native" (C++, CPU), "triton" (CUDA), "reference" (PyTorch), or "fused" (Triton, CUDA, 16-bit
            operands): "triton", but where no gradient is asked the products are merged as they are made, and no tile
            of logits is in memory either.

    Returns:
        The loss in float32 (float64 for float64 input): a scalar, or [...] with ``reduction="none"``.

    Raises:
        ValueError: A wrong shape, dtype, device or option, named with what was wanted and what came.
        IndexError: A target out of range (on CUDA a device-side assertion).

    Source: gradients in forward, Liger-Kernel, arXiv:2410.10989; statistics by online softmax, arXiv:1805.02867; label
    smoothing, arXiv:1512.00567; z-loss, arXiv:2204.02311.
    """  # fmt: skip
    _check_smoothing(label_smoothing)
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
    if ignore_index is None:
        raise ValueError("ignore_index must be an integer, got None")
    if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an integer of at least 0, got {shift!r}")
    _check_reduction(reduction)
    head = _head(input, linear_weight, target, linear_bias, lora, logit_scale, logit_softcap, shift, ignore_index)
    rows = input.shape[:-1]
    if token_weight is not None:
        _check_vector("token_weight", token_weight, rows, input.device, None)
        token_weight = F.pad(token_weight, (0, shift))[..., shift:].reshape(-1) if shift else token_weight.reshape(-1)
    if weight is not None:
        _check_vector("weight", weight, head.w.shape[:1], input.device, None)
    loss, stats = _softmax_nll(
        head.x, head.w, head.target, head.scale, bias=head.bias, lora=head.lora, softcap=head.softcap,
        ignore_index=ignore_index, reduction=reduction, weight=token_weight, class_weight=weight,
        label_smoothing=label_smoothing, z_loss=z_loss, rank=return_stats, process_group=process_group,
        batch_invariant=batch_invariant, workspace_bytes=workspace_bytes, backend=backend,
    )  # fmt: skip
    loss = loss.reshape(rows) if reduction == "none" else loss
    return (loss, RowStats(*(f.detach().reshape(rows) for f in stats))) if return_stats else loss


def linear_log_prob(input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
                    temperature: float = 1.0, ignore_index: int = -100, logit_scale: float = 1.0,
                    logit_softcap: float | None = None, shift: int = 0,
                    lora: tuple[Tensor, Tensor, float] | None = None, process_group: ProcessGroup | None = None,
                    batch_invariant: bool = False, workspace_bytes: int | None = None,
                    backend: str = "auto") -> RowStats:  # fmt: skip
    """Log-probability of each target under a linear layer's softmax, and its entropy: both with gradients.

        z as in :func:`linear_cross_entropy`, over temperature;   log_prob[n] = z[n, target[n]] - logsumexp(z[n])
        entropy[n] = -sum_v p[n, v] log p[n, v]

    For policy gradients and distillation: one pass over the logits now, one when gradients are asked, whichever of
    ``log_prob``, ``nll``, ``lse`` and ``entropy`` they come from.

    Args:
        temperature: Positive divisor of the logits, after the softcap.
        input, linear_weight, target, linear_bias, ignore_index, logit_scale, logit_softcap, shift, lora,
            process_group, batch_invariant, workspace_bytes, backend: As in :func:`linear_cross_entropy`.

    Returns:
        :class:`RowStats`, each field [...], float32 (float64 for float64 input); zeros at ignored rows.

    Raises:
        ValueError, IndexError: As :func:`linear_cross_entropy`.
    """
    _check_positive("temperature", temperature)
    softcap = None if logit_softcap is None else logit_softcap / temperature
    scale = logit_scale / temperature
    head = _head(input, linear_weight, target, linear_bias, lora, scale, softcap, shift, ignore_index)
    _, stats = _softmax_nll(
        head.x, head.w, head.target, head.scale, bias=head.bias, lora=head.lora, softcap=head.softcap,
        ignore_index=ignore_index, reduction="none", rank=True, process_group=process_group,
        batch_invariant=batch_invariant, workspace_bytes=workspace_bytes, backend=backend,
    )  # fmt: skip
    return RowStats(*(f.reshape(input.shape[:-1]) for f in stats))


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
        _check_vector("candidate_bias", candidate_bias, (m,), query.device, None)
    if sample_weight is not None:
        _check_vector("sample_weight", sample_weight, (n,), query.device, None)
    for name, number in {"margin": margin, "false_negative_margin": false_negative_margin or 0.0}.items():
        if not isinstance(number, float | int) or not abs(number) < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {number!r}")
    _check_smoothing(label_smoothing)
    if label_smoothing and false_negative_margin is not None:
        raise ValueError("want label_smoothing or false_negative_margin, got both")
    _check_reduction(reduction)
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
        _check_distinct(target, m)
    hard = hard_negatives
    if hard is not None:
        hard, *_ = _autocast(hard, candidates, None)
        if hard.ndim != 3 or (hard.shape[0], hard.shape[2]) != query.shape or hard.dtype != query.dtype:
            want = f"[{n}, H, {query.shape[1]}] of {query.dtype}"
            raise ValueError(f"hard_negatives must be {want}, got {[*hard.shape]} of {hard.dtype}")
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / _temperature(temperature, query.device).to(dtype)
    if normalize:
        query, candidates = _unit(query), _unit(candidates)
        hard = None if hard is None else _unit(hard)
    weight, local_reduction, first, everyone, ring = sample_weight, reduction, 0, None, False
    own_ids, all_queries, first_query, all_query_ids = candidate_ids, query, 0, query_ids
    if process_group is not None:
        if positives is None:
            _check_targets(target, m)
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
    loss, stats = _softmax_nll(
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


def _pairs(positives: tuple[Tensor, Tensor] | str, first: int, query_ids: Tensor | None, candidate_ids: Tensor | None):
    """The lists of positives among the columns of all ranks, which rows have any, and what ids mask then."""
    if isinstance(positives, str):
        start, col = ops.pairs_of_ids(query_ids, candidate_ids)
    else:
        start, col = positives[0], positives[1] + first
    return (start, col), start.diff() > 0, None, None  # where ids say what is positive they leave out nothing


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
        _check_vector("sample_weight", sample_weight, (n,), query.device, None)
    _check_reduction(reduction)
    if gather not in GATHERS:
        raise ValueError(f"gather must be one of {GATHERS}, got {gather!r}")
    _check_call(workspace_bytes)
    backend = resolve(backend, query)
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = 1 / _temperature(temperature, query.device).to(dtype)
    shift = _number("bias", bias, query.device).to(dtype)
    if normalize:
        query, candidates = _unit(query), _unit(candidates)
    weight = torch.ones_like(target, dtype=dtype) if sample_weight is None else sample_weight.to(dtype)
    if process_group is not None:
        _check_targets(target, m)
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
    query, candidates, _ = _autocast(query, candidates, None)
    if query.ndim != 2:
        raise ValueError(f"query must be [N, D], got {[*query.shape]}")
    _check_pair("query", query, "candidates", candidates)
    n, m = query.shape[0], candidates.shape[0]
    if target is None:
        if m < n:
            raise ValueError(
                f"candidates must have a row for each of the {n} queries when target is None, got {m} rows"
            )
        target = torch.arange(n, device=query.device)
    _check_vector("target", target, (n,), query.device, torch.int64)
    if query_ids is not None and candidate_ids is None:
        raise ValueError("query_ids without candidate_ids: want both, or candidate_ids alone")
    if candidate_ids is not None:
        _check_vector("candidate_ids", candidate_ids, (m,), query.device, torch.int64)
        if query_ids is None:  # out-of-range targets are the engine's to refuse
            query_ids = candidate_ids[target.clamp(0, m - 1)] if m else target
        _check_vector("query_ids", query_ids, (n,), query.device, torch.int64)
    return query, candidates, target, query_ids


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
    _, stats = _softmax_nll(x, w, own, scale, row_id=x_id, col_id=w_id, margin=float("inf"), reduction="none",
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


def co_supervision_loss(hidden: Tensor, linear_weight: Tensor, labels: Tensor, query: Tensor, candidates: Tensor,
                        target: Tensor | None = None, *, linear_bias: Tensor | None = None,
                        candidate_ids: Tensor | None = None, nsp_weight: float = 1.0, mode: str = "joint",
                        temperature: float | Tensor = 0.05, normalize: bool = True, logit_scale: float = 1.0,
                        logit_softcap: float | None = None, ntp_normalizer: float | Tensor | None = None,
                        nsp_normalizer: float | Tensor | None = None, process_group: ProcessGroup | None = None,
                        gather: str = "exact", workspace_bytes: int | None = None,
                        ) -> CoSupervisionOutput:  # fmt: skip
    """Next-token and next-sequence loss of one batch.

        L = L_NTP + nsp_weight * L_NSP       mode "ntp" drops the second term, "nsp" the first
        L_NTP = sum_{b,t} nll(hidden[b, t] predicts labels[b, t + 1]) / ntp_normalizer
        L_NSP = sum_q info_nce(query[q] against candidates) / nsp_normalizer

    Args:
        hidden: [B, T, D] Gen's final hidden states.
        linear_weight, linear_bias, logit_scale, logit_softcap: Gen's head, as in :func:`linear_cross_entropy`.
        labels: [B, T] int64, not shifted, -100 where there is no target.
        query: [Q, D], Gen's state at each retrieval token.
        candidates: [P, D], passages by Ctx; ``target`` [Q], ``candidate_ids`` [P]: as in :func:`info_nce`.
        ntp_normalizer, nsp_normalizer: Targets and queries of the whole accumulated batch, of all ranks; None: of this
            one, on all ranks.
        process_group, gather: Each of its ranks has a batch of its own, and ``gather`` says which candidates a query
            sees: as in :func:`info_nce`. Both losses are over all ranks' rows and come out on every rank, with the
            gradients of what is here: their sum over ranks, not their mean, is a parameter's. Counts and statistics
            are of what is here.

    Returns:
        :class:`CoSupervisionOutput`; a term that is dropped, or has no targets, is 0 and keeps its graph.

    Raises:
        ValueError, IndexError: As the two losses.

    Source: arXiv:2403.09024 (there nsp_weight = 0.01, no normalisation, temperature 1).
    """  # fmt: skip
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if hidden.ndim != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(f"want hidden [B, T, D] and labels [B, T], got {[*hidden.shape]} and {[*labels.shape]}")
    ntp_count = (labels[:, 1:] != -100).sum()
    ntp_loss, nsp_loss = _nothing(hidden, linear_weight, linear_bias), _nothing(query, candidates, temperature)
    nsp_stats = None
    if process_group is not None and (ntp_normalizer is None or nsp_normalizer is None):
        counts = SumOverRanks.apply(torch.stack([ntp_count, ntp_count.new_tensor(len(query))]), process_group)
        ntp_normalizer = counts[0] if ntp_normalizer is None else ntp_normalizer
        nsp_normalizer = counts[1].clamp(min=1) if nsp_normalizer is None else nsp_normalizer
    if mode != "nsp":
        ntp_sum = linear_cross_entropy(hidden, linear_weight, labels, linear_bias=linear_bias, reduction="sum", shift=1,
                                       logit_scale=logit_scale, logit_softcap=logit_softcap,
                                       workspace_bytes=workspace_bytes)  # fmt: skip
        assert isinstance(ntp_sum, Tensor)
        normalizer = ntp_count if ntp_normalizer is None else ntp_normalizer
        ntp_loss = ntp_loss + ntp_sum / torch.as_tensor(normalizer, device=hidden.device).clamp(min=1)
        if process_group is not None:
            elsewhere = SumOverRanks.apply(ntp_loss.detach(), process_group) - ntp_loss.detach()
            ntp_loss = ntp_loss + elsewhere
    if mode != "ntp" and (len(query) or process_group is not None):
        nsp_sum, nsp_stats = info_nce(query, candidates, target, temperature=temperature, normalize=normalize,
                                      candidate_ids=candidate_ids, reduction="sum", return_stats=True,
                                      process_group=process_group, gather=gather,
                                      workspace_bytes=workspace_bytes)  # fmt: skip
        nsp_loss = nsp_sum / (len(query) if nsp_normalizer is None else nsp_normalizer)
    loss = ntp_loss + nsp_weight * nsp_loss
    return CoSupervisionOutput(loss, ntp_loss, nsp_loss, ntp_count, len(query), nsp_stats)


def _nothing(*parts: Tensor | float | None) -> Tensor:
    """0, connected to every tensor: whoever waits for a gradient of each gets one."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    zeros = [0 * (t[:0] if t.ndim else t).sum(dtype=torch.float32) for t in tensors]
    return torch.stack(zeros).sum()


class _Head(NamedTuple):
    x: Tensor  # [N, D]
    w: Tensor  # [V, D]
    target: Tensor  # [N]
    scale: Tensor
    bias: Tensor | None  # [V], scaled
    softcap: float
    lora: tuple[Tensor, Tensor] | None  # [N, r] and [V, r]


def _head(input, linear_weight, target, linear_bias, lora, logit_scale, logit_softcap, shift, ignore_index) -> _Head:
    """Check what the losses over a linear layer share, and lay it out for the engine."""
    if input.ndim < 1 or (shift and input.ndim < 2):
        raise ValueError(f"input must be {'[..., T, D] with a shift' if shift else '[..., D]'}, got {[*input.shape]}")
    if hasattr(linear_weight, "full_tensor"):
        raise ValueError(
            "linear_weight must be a plain tensor, got a DTensor. Gather it once, and say how ranks sum its gradient: "
            "linear_weight.full_tensor(grad_placements=...); or, where all ranks have the same input and each a part "
            "of the rows, give linear_weight.to_local() and process_group"
        )
    input, linear_weight, linear_bias = _autocast(input, linear_weight, linear_bias)
    _check_pair("input", input, "linear_weight", linear_weight)
    _check_vector("target", target, input.shape[:-1], input.device, torch.int64)
    if linear_bias is not None:
        _check_vector("linear_bias", linear_bias, linear_weight.shape[:1], input.device, None)
    _check_positive("logit_scale", logit_scale)
    if logit_softcap is not None:
        _check_positive("logit_softcap", logit_softcap)
    if shift:
        target = F.pad(target, (0, shift), value=ignore_index)[..., shift:]
    dtype = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(dtype) * logit_scale
    scale = torch.full((), logit_scale, dtype=dtype, device=input.device)
    x = input.flatten(0, -2) if input.ndim > 1 else input[None]
    low_rank = None
    if lora is not None:
        want = f"lora must be (A [r, {x.shape[1]}], B [{len(linear_weight)}, r], finite scaling) on {x.device}"
        if not isinstance(lora, tuple | list) or len(lora) != 3:
            raise ValueError(f"{want}, got {lora!r}")
        a, b, factor = lora
        matrices = all(isinstance(t, Tensor) and t.ndim == 2 and t.is_floating_point() for t in (a, b))
        if not (matrices and isinstance(factor, float | int) and abs(factor) < float("inf")):
            raise ValueError(f"{want}, got {lora!r}")
        if (a.shape[1], *b.shape) != (x.shape[1], len(linear_weight), a.shape[0]) or {a.device, b.device} != {x.device}:
            raise ValueError(f"{want}, got A {[*a.shape]} on {a.device} and B {[*b.shape]} on {b.device}")
        ignored = (target == ignore_index).reshape(-1, 1)  # such a row may hold anything
        low_rank = (factor * (x.masked_fill(ignored, 0.0) @ a.to(x.dtype).mT), b.to(x.dtype))
    return _Head(x, linear_weight, target.reshape(-1), scale, bias, logit_softcap or 0.0, low_rank)


def _softmax_nll(x: Tensor, w: Tensor, target: Tensor, scale: Tensor, *, bias: Tensor | None = None,
                 lora: tuple[Tensor, Tensor] | None = None,
                 row_id: Tensor | None = None, col_id: Tensor | None = None,
                 pairs: tuple[Tensor, Tensor] | None = None, pool: str = "mean", softcap: float = 0.0,
                 ignore_index: int | None = None, margin: float = 0.0, gap: float | None = None,
                 symmetric: bool = False, reduction: str, weight: Tensor | None = None,
                 class_weight: Tensor | None = None, label_smoothing: float = 0.0, kept: Tensor | None = None,
                 z_loss: float = 0.0, rank: bool, process_group: ProcessGroup | None = None,
                 row_group: str | None = None, ring: str | None = None, batch_invariant: bool = False,
                 workspace_bytes: int | None, backend: str) -> tuple[Tensor, RowStats]:  # fmt: skip
    """All losses: weigh the rows, run the operator that knows their weights or the one that waits for them, reduce."""
    _check_call(workspace_bytes)
    backend, group = resolve(backend, x), None if process_group is None else process_group.group_name
    grad = torch.is_grad_enabled()
    x2, w2 = (None, None) if lora is None else lora
    need = [grad and t is not None and t.requires_grad for t in (x, w, bias, x2, w2, scale)]
    need[2] |= need[5] and bias is not None  # the scale's gradient takes it in
    if backend == "fused" and (any(need[:-1]) or symmetric or margin or gap is not None or pairs is not None):
        backend = "triton"  # a second sweep's products must round as those did that the statistics are of
    # float16 waits for the upstream gradient: p / N is below its range without a loss scale, sums over N are above it
    known = reduction != "none" and x.dtype != torch.float16 and ring is None
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    weight = torch.ones_like(valid, dtype=scale.dtype) if weight is None else weight.to(scale.dtype)
    weight = weight.masked_fill(~valid, 0.0)
    n = x.shape[0]
    if batch_invariant:  # whole blocks of rows: a product's rows are independent of each other, but not of their number
        padding = (0, -n % ops.INVARIANT_ROWS.get(x.device.type, 1))
        x, x2 = F.pad(x, (0, 0, *padding)), None if x2 is None else F.pad(x2, (0, 0, *padding))
        target = F.pad(target, padding, value=ignore_index)
        weight, valid = F.pad(weight, padding), F.pad(valid, padding)
    weights, soft, divisor = _row_weights(weight, target, valid, w, class_weight, label_smoothing, kept, z_loss, group)
    if reduction == "mean":
        divisor = torch.where(divisor == 0, 1.0, divisor)
        weights, weight = weights.map(lambda v: v / divisor), weight / divisor
    of_columns = None
    if symmetric:  # half of each direction
        weights, of_columns = weights.map(lambda v: v / 2), weight / 2
    pair_start, pair_col = (None, None) if pairs is None else pairs
    options: Any = (softcap, ignore_index, margin, gap, pool)
    end: Any = (rank, need, workspace_bytes, backend, group, batch_invariant, row_group)
    if known and any(need[:-1]):
        loss, nll, lse, entropy, _, _, _, _, above, *_ = ops.loss_and_grads(
            x, w, target, weights.b, weights.c, weights.e, weights.q, of_columns, scale, bias, row_id, col_id, soft, x2,
            w2, pair_start, pair_col, *options, *end,
        )  # fmt: skip
    else:
        nll, lse, entropy, soft_logit, col_nll, _, _, above, *_ = ops.nll_stats(
            x, w, target, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, *options, symmetric, *end,
            ring,
        )
        loss = ops.row_losses(weights, nll, lse, soft_logit, of_columns, col_nll)
        loss = loss[:n] if reduction == "none" else loss.sum()
    nll, lse, entropy, above, valid = (t[:n] for t in (nll, lse, entropy, above, valid))
    place = (above.long() + 1) * valid
    return loss, RowStats(nll, lse, -nll, entropy, place, (place == 1) & ~nll.isnan())


def _row_weights(weight, target, valid, w, class_weight, label_smoothing, kept, z_loss, group):
    """The formula of :func:`linear_cross_entropy` as weights of the engine's statistics; the weights of the columns in
    the soft targets; what "mean" divides by."""
    b, c, e, soft = weight, None, None, None
    if class_weight is not None or label_smoothing:
        columns = weight.new_ones(w.shape[0]) if class_weight is None else class_weight.detach().to(weight.dtype)
        own, total, count = ops.column_values(columns, target, group)
        b = weight * own.masked_fill(~valid, 0.0)  # an ignored target may have met a weight of inf
    divisor = b.sum()
    if label_smoothing:
        total, count = (total, count) if kept is None else (kept, kept)  # of columns that are not left out
        soft, e = columns, label_smoothing / count.clamp(min=1) * weight
        b, c = (1 - label_smoothing) * b, e * total
    return RowWeights(b, c, e, 2 * z_loss * weight if z_loss else None), soft, divisor


def _check_call(workspace_bytes: int | None) -> None:
    if not torch.compiler.is_compiling() and (_functorch_level() is not None or _forward_ad_level() >= 0):
        raise RuntimeError("cosup's losses have reverse-mode gradients only: no torch.func transform, no forward mode")
    given = 0 if workspace_bytes is None else workspace_bytes
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ValueError(f"workspace_bytes must be an integer of at least 0, got {workspace_bytes!r}")


def _functorch_level() -> int | None:
    return torch._C._functorch.maybe_current_level()


def _forward_ad_level() -> int:
    return torch.autograd.forward_ad._current_level


def _autocast(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (x.dtype, w.dtype):
        return x, w, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), w.to(dtype), bias


def _temperature(temperature: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(temperature, Tensor):
        _check_positive("temperature", temperature)
        return torch.full((), temperature, dtype=torch.float64, device=device)
    if temperature.numel() != 1 or temperature.device != device:
        raise ValueError(
            f"temperature must be one number on {device}, got {[*temperature.shape]} on {temperature.device}"
        )
    if device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((temperature > 0).all(), "temperature must be positive")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature.item()}")
    return temperature.reshape(())


def _number(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        if not isinstance(value, float | int) or not abs(value) < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        return torch.full((), value, dtype=torch.float64, device=device)
    if value.numel() != 1 or not value.is_floating_point() or value.device != device:
        got = f"{value.dtype} {[*value.shape]} on {value.device}"
        raise ValueError(f"{name} must be one floating number on {device}, got {got}")
    return value.reshape(())


def _check_pair(x_name: str, x: Tensor, w_name: str, w: Tensor) -> None:
    if w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"want {x_name} [..., D] and {w_name} [M, D], got {[*x.shape]} and {[*w.shape]}")
    if x.dtype != w.dtype or not x.is_floating_point():
        raise ValueError(f"want {x_name} and {w_name} in one floating dtype, got {x.dtype} and {w.dtype}")
    if x.device != w.device:
        raise ValueError(f"want {x_name} and {w_name} on one device, got {x.device} and {w.device}")


def _check_vector(name: str, v: Tensor, shape, device: torch.device, dtype: torch.dtype | None) -> None:
    if v.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {[*shape]}, got {[*v.shape]}")
    if v.dtype != dtype if dtype else not v.is_floating_point():
        raise ValueError(f"{name} must be {dtype or 'floating'}, got {v.dtype}")
    if v.device != device:
        raise ValueError(f"{name} must be on {device}, got {v.device}")


def _check_positive(name: str, value: float) -> None:
    """A number whose inverse is finite too, in float32."""
    if not isinstance(value, float | int) or not 1e-30 < value < 1e30:
        raise ValueError(f"{name} must be a number, positive and finite (1e-30 to 1e30), got {value!r}")


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")


def _check_targets(target: Tensor, m: int) -> None:
    """That targets are rows of this rank: an error on a CPU, a device-side assertion on CUDA."""
    bad = (target < 0) | (target >= m)
    if target.device.type == "cpu" and bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(f"target must be in [0, {m}), got {int(target[row])} in row {row}")
    torch._assert_async(~bad.any(), f"target must be in [0, {m})")


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
    _check_vector("positives[0]", start, (n + 1,), col.device, torch.int64)
    _check_vector("positives[1]", col, col.shape[:1], start.device, torch.int64)
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


def _check_distinct(target: Tensor, m: int) -> None:
    """That no two targets are one column: an error on a CPU, a device-side assertion on CUDA."""
    counts = torch.zeros(max(m, 1), dtype=torch.int64, device=target.device)
    counts.index_add_(0, target.clamp(0, max(m - 1, 0)), torch.ones_like(target))
    twice = (counts > 1) & (m > 0)
    message = "target must be distinct rows of candidates where symmetric"
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and twice.any():
        raise ValueError(f"{message}, got row {int(twice.nonzero()[0])} for {int(counts.max())} queries")
    torch._assert_async(~twice.any(), message)


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
