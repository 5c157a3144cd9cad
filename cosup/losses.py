"""Losses over an LM head, and the two of co-supervision together.

linear_cross_entropy   next token: softmax over the rows of the head
linear_log_prob        the same softmax's log-probabilities and entropies, row by row
co_supervision_loss    L = L_NTP + nsp_weight * L_NSP      (arXiv 2403.09024)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup.agreement import is_due, same_call, settle
from cosup.checks import (
    as_integer,
    autocast,
    check_pair,
    check_positive,
    check_reduction,
    check_smoothing,
    check_vector,
)
from cosup.contrastive import info_nce
from cosup.distributed import SumOverRanks, loss_of_ranks
from cosup.softmax import RowStats, softmax_nll

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MODES = ("joint", "ntp", "nsp")
LowRank = tuple[Tensor, Tensor, float] | tuple[Tensor, Tensor]


class CoSupervisionOutput(NamedTuple):
    """What :func:`co_supervision_loss` returns.

    Attributes:
        loss: ntp_loss + nsp_weight * nsp_loss, or one of the two.
        ntp_loss: Of next tokens.
        nsp_loss: Of next sequences.
        ntp_count: int64, next-token targets.
        nsp_count: Queries.
        nsp_stats: Of each query; None without queries, and in mode "ntp".
    """

    loss: Tensor
    ntp_loss: Tensor
    nsp_loss: Tensor
    ntp_count: Tensor
    nsp_count: int
    nsp_stats: RowStats | None


@same_call(alike=("input", "target", "token_weight"), contents=("target", "token_weight"))
def linear_cross_entropy(input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
                         weight: Tensor | None = None, reduction: str = "mean", ignore_index: int = -100,
                         label_smoothing: float = 0.0, z_loss: float = 0.0, logit_scale: float = 1.0,
                         logit_softcap: float | None = None, token_weight: Tensor | None = None, shift: int = 0,
                         lora: LowRank | None = None, return_stats: bool = False,
                         process_group: ProcessGroup | None = None, batch_invariant: bool = False,
                         workspace_bytes: int | None = None, backend: str = "auto",
                         ) -> Tensor | tuple[Tensor, RowStats]:  # fmt: skip
    """Cross entropy of a linear layer's logits, made in tiles within a budget of bytes.

        z = logit_scale * (input @ linear_weight.T + linear_bias);  z = logit_softcap * tanh(z / logit_softcap)
        lse[n] = logsumexp(z[n]),   t = target[n],   s = label_smoothing,   c = weight (1 without it)
        loss[n] = (1 - s) c[t] (lse[n] - z[n, t]) + s / V sum_v c[v] (lse[n] - z[n, v]) + z_loss lse[n]^2
        loss = sum_n token_weight[n] loss[n]          over rows not ignored

    Same value and gradients as ``F.cross_entropy(z, target, weight, label_smoothing=s)``. ``"mean"`` divides by
    sum_n token_weight[n] c[target[n]], or by 1 where that is 0. With no row left the loss and its gradients are 0, by
    whatever the loss is divided later: a gradient of 0 stays 0. A row of weight 0 counts for nothing, even if its loss
    is infinite; only that of an ignored row may hold infinite inputs.

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
            ``linear_weight`` frozen only A and B are trained. Or (h [..., r], B), z += h @ B.T, where h is made of the
            input otherwise, as with dropout. B is of this rank where there is a ``process_group``.
        return_stats: Also return :class:`RowStats`, from the same pass.
        process_group: The head's rows are split among its ranks, in rank order, evenly or not: ``linear_weight``,
            ``linear_bias`` and ``weight`` are the part of this rank; the rest is alike on all, ``target`` among all V.
            Loss, statistics and the gradient of ``input`` come out whole on every rank. Each call tells the others
            how many rows are here, and waits; all ranks make the same calls and ask the same gradients. An error on
            one, or a difference, is raised on all.
        batch_invariant: A row's loss, statistics and, with ``reduction`` "sum" or "none", gradient of ``input`` have
            the same bits whatever rows stand beside it. Slower: all products have 64 rows (256 on CUDA), ignored ones
            too; what grows with the number of rows is beside the workspace.
        workspace_bytes: Budget beside inputs, outputs and gradients; None: a sixteenth of the memory
            that is free when a process first asks, at most 256 MiB on a CPU and 4 GiB on CUDA, or what blocks need
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
    check_smoothing(label_smoothing)
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss must be at least 0 and finite, got {z_loss}")
    ignore_index = as_integer("ignore_index", ignore_index)
    if isinstance(shift, bool) or not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an integer of at least 0, got {shift!r}")
    check_reduction(reduction)
    head = _head(input, linear_weight, target, linear_bias, lora, logit_scale, logit_softcap, shift, ignore_index)
    rows = input.shape[:-1]
    if token_weight is not None:
        check_vector("token_weight", token_weight, rows, input.device, None)
        token_weight = F.pad(token_weight, (0, shift))[..., shift:].reshape(-1) if shift else token_weight.reshape(-1)
    if weight is not None:
        check_vector("weight", weight, head.w.shape[:1], input.device, None)
    loss, stats = softmax_nll(
        head.x, head.w, head.target, head.scale, bias=head.bias, lora=head.lora, softcap=head.softcap,
        ignore_index=ignore_index, reduction=reduction, weight=token_weight, class_weight=weight,
        label_smoothing=label_smoothing, z_loss=z_loss, rank=return_stats, process_group=process_group,
        host_scale=logit_scale, batch_invariant=batch_invariant, workspace_bytes=workspace_bytes, backend=backend,
    )  # fmt: skip
    loss = loss.reshape(rows) if reduction == "none" else loss
    return (loss, RowStats(*(f.detach().reshape(rows) for f in stats))) if return_stats else loss


@same_call(alike=("input", "target"), contents=("target",))
def linear_log_prob(input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
                    temperature: float = 1.0, ignore_index: int = -100, logit_scale: float = 1.0,
                    logit_softcap: float | None = None, shift: int = 0,
                    lora: LowRank | None = None, process_group: ProcessGroup | None = None,
                    batch_invariant: bool = False, workspace_bytes: int | None = None,
                    backend: str = "auto") -> RowStats:  # fmt: skip
    """Log-probability of each target under a linear layer's softmax, and its entropy: both with gradients.

        z as in :func:`linear_cross_entropy`, over temperature;   log_prob[n] = z[n, target[n]] - logsumexp(z[n])
        entropy[n] = -sum_v p[n, v] log p[n, v]

    For policy gradients and distillation: one pass over the logits now, one when gradients are asked, whichever of
    ``log_prob``, ``nll``, ``lse`` and ``entropy`` they come from.

    Args:
        temperature: Positive divisor of the logits, after the softcap.
        input, linear_weight, target, linear_bias, ignore_index: As in :func:`linear_cross_entropy`.
        logit_scale, logit_softcap, shift, lora, process_group: The same.
        batch_invariant, workspace_bytes, backend: The same.

    Returns:
        :class:`RowStats`, each field [...], float32 (float64 for float64 input); zeros at ignored rows.

    Raises:
        ValueError, IndexError: As :func:`linear_cross_entropy`.
    """
    check_positive("temperature", temperature)
    ignore_index = as_integer("ignore_index", ignore_index)
    softcap = None if logit_softcap is None else logit_softcap / temperature
    scale = logit_scale / temperature
    head = _head(input, linear_weight, target, linear_bias, lora, scale, softcap, shift, ignore_index)
    _, stats = softmax_nll(
        head.x, head.w, head.target, head.scale, bias=head.bias, lora=head.lora, softcap=head.softcap,
        ignore_index=ignore_index, reduction="none", rank=True, process_group=process_group,
        batch_invariant=batch_invariant, workspace_bytes=workspace_bytes, backend=backend,
    )  # fmt: skip
    return RowStats(*(f.reshape(input.shape[:-1]) for f in stats))


@same_call(contents=("temperature", "nsp_weight", "ntp_normalizer", "nsp_normalizer"))
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
        ntp_normalizer, nsp_normalizer: Targets and queries of the whole accumulated batch, of all ranks (1 for 0 of
            them); None: of this one, on all ranks.
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
    ntp_loss, no_queries = _nothing(hidden, linear_weight, linear_bias), _nothing(query, candidates, temperature)
    nsp_loss, nsp_stats = no_queries, None
    ntp_sum: Any = ntp_loss
    if mode != "nsp":
        ntp_sum = linear_cross_entropy(hidden, linear_weight, labels, linear_bias=linear_bias, reduction="sum", shift=1,
                                       logit_scale=logit_scale, logit_softcap=logit_softcap,
                                       workspace_bytes=workspace_bytes)  # fmt: skip
    if process_group is not None and (ntp_normalizer is None or nsp_normalizer is None):
        targets, queries = _counts(ntp_count, len(query), process_group)
        ntp_normalizer = targets if ntp_normalizer is None else ntp_normalizer
        nsp_normalizer = queries if nsp_normalizer is None else nsp_normalizer
    if mode != "nsp":
        normalizer = ntp_count if ntp_normalizer is None else ntp_normalizer
        ntp_loss = ntp_loss + ntp_sum / _one_for_none(normalizer)
        if process_group is not None:
            ntp_loss = loss_of_ranks(ntp_loss, process_group)
    if mode != "ntp" and (len(query) or process_group is not None):
        nsp_sum, nsp_stats = info_nce(query, candidates, target, temperature=temperature, normalize=normalize,
                                      candidate_ids=candidate_ids, reduction="sum", return_stats=True,
                                      process_group=process_group, gather=gather,
                                      workspace_bytes=workspace_bytes)  # fmt: skip
        nsp_loss = nsp_sum / _one_for_none(len(query) if nsp_normalizer is None else nsp_normalizer)
    without = not isinstance(nsp_weight, Tensor) and nsp_weight == 0  # 0 times an infinite loss is no number
    loss = ntp_loss + (no_queries if without else nsp_weight * nsp_loss)
    return CoSupervisionOutput(loss, ntp_loss, nsp_loss, ntp_count, len(query), nsp_stats)


def _counts(targets: Tensor, queries: int, group: ProcessGroup) -> tuple[float | Tensor, float | Tensor]:
    """Those of all ranks; in the message that is due, where the host knows them."""
    if targets.device.type == "cpu" and is_due(group):
        of_targets, of_queries = settle(group, int(targets), queries)
        return sum(of_targets), sum(of_queries)
    if is_due(group):
        settle(group, needed=False)
    counts = SumOverRanks.apply(torch.stack([targets, targets.new_tensor(queries)]), group)
    return counts[0], counts[1]


def _one_for_none(count: float | Tensor) -> float | Tensor:
    return torch.where(count == 0, 1, count) if isinstance(count, Tensor) else count or 1


def _nothing(*parts: Tensor | float | None) -> Tensor:
    """0, connected to every tensor: whoever waits for a gradient of each gets one."""
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.stack([(t if t.ndim else t.reshape(1))[:0].sum(dtype=torch.float32) for t in tensors]).sum()


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
    input, linear_weight, linear_bias = autocast(input, linear_weight, linear_bias)
    check_pair("input", input, "linear_weight", linear_weight)
    check_vector("target", target, input.shape[:-1], input.device, torch.int64)
    if linear_bias is not None:
        check_vector("linear_bias", linear_bias, linear_weight.shape[:1], input.device, None)
    check_positive("logit_scale", logit_scale)
    if logit_softcap is not None:
        check_positive("logit_softcap", logit_softcap)
    if shift:
        target = F.pad(target, (0, shift), value=ignore_index)[..., shift:]
    dtype = torch.promote_types(input.dtype, torch.float32)
    bias = None if linear_bias is None else linear_bias.to(dtype) * logit_scale
    scale = torch.full((), logit_scale, dtype=dtype, device=input.device)
    x = input.flatten(0, -2) if input.ndim > 1 else input[None]
    low_rank = None
    if lora is not None:
        low_rank = _low_rank(lora, input.shape, x, linear_weight, (target == ignore_index).reshape(-1, 1))
    return _Head(x, linear_weight, target.reshape(-1), scale, bias, logit_softcap or 0.0, low_rank)


def _low_rank(lora, shape: torch.Size, x: Tensor, w: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """An adapter as the rows [N, r] and columns [V, r] of a second product. An ignored row [N, 1] may hold anything."""
    want = f"lora must be (A [r, {x.shape[1]}], B [{len(w)}, r], finite scaling) on {x.device}, or (h [..., r], B)"
    if not isinstance(lora, tuple | list) or len(lora) not in (2, 3):
        raise ValueError(f"{want}, got {lora!r}")
    first, b, *factor = lora
    tensors = all(isinstance(t, Tensor) and t.is_floating_point() for t in (first, b))
    if not (tensors and all(isinstance(f, float | int) and abs(f) < float("inf") for f in factor)):
        raise ValueError(f"{want}, got {lora!r}")
    rank = first.shape[0] if factor else first.shape[-1]
    wanted = ((rank, x.shape[1]) if factor else (*shape[:-1], rank)), (len(w), rank)
    if (first.shape, b.shape) != wanted or {first.device, b.device} != {x.device}:
        got = f"{[*first.shape]} on {first.device} and B {[*b.shape]} on {b.device}"
        raise ValueError(f"{want}, got {'A' if factor else 'h'} {got}")
    first, b = first.to(x.dtype), b.to(x.dtype)
    if factor:
        return factor[0] * (x.masked_fill(ignored, 0.0) @ first.mT), b
    return first.reshape(len(x), rank), b
