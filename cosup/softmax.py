"""Negative log-likelihood of a softmax over inner products: the formula of every such loss as weights of the engine's
statistics, and the operator that knows them or waits for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup import ops
from cosup.agreement import note
from cosup.checks import check_call
from cosup.direct import call
from cosup.distributed import parts_of
from cosup.walk import RowWeights, default_workspace, narrowed, resolve

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class RowStats(NamedTuple):
    """What one pass over the logits says of each row; all [N], zeros at ignored rows.

    No gradients, but for those of ``nll``, ``lse``, ``log_prob`` and ``entropy`` from :func:`linear_log_prob`.

    Attributes:
        nll: -log p[target], nats.
        lse: log sum exp of the logits.
        log_prob: log p[target] = -nll.
        entropy: -sum p log p, nats.
        rank: int64, 1 + number of columns whose logit is above the target's; the last for a row of NaN.
        top1: bool, rank == 1 and no NaN.
    """

    nll: Tensor
    lse: Tensor
    log_prob: Tensor
    entropy: Tensor
    rank: Tensor
    top1: Tensor


def softmax_nll(x: Tensor, w: Tensor, target: Tensor, scale: Tensor, *, bias: Tensor | None = None,
                 lora: tuple[Tensor, Tensor] | None = None,
                 row_id: Tensor | None = None, col_id: Tensor | None = None,
                 pairs: tuple[Tensor, Tensor] | None = None, pool: str = "mean", softcap: float = 0.0,
                 ignore_index: int | None = None, margin: float = 0.0, gap: float | None = None,
                 symmetric: bool = False, reduction: str, weight: Tensor | None = None,
                 class_weight: Tensor | None = None, label_smoothing: float = 0.0, kept: Tensor | None = None,
                 z_loss: float = 0.0, rank: bool, process_group: ProcessGroup | None = None,
                 row_group: str | None = None, ring: str | None = None, parts: list[int] | None = None,
                 batch_invariant: bool = False,
                 host_scale: float | None = None,
                 workspace_bytes: int | None, backend: str) -> tuple[Tensor, RowStats]:  # fmt: skip
    """All losses: weigh the rows, run the operator that knows their weights or the one that waits for them, reduce.

    ``rank``: whether rank and top1 are asked of the statistics; else those two have no rows. ``host_scale``: what
    ``scale`` holds, where the host knows it without asking the device.
    """
    check_call(workspace_bytes)
    backend, group = resolve(backend, x), None if process_group is None else process_group.group_name
    grad = torch.is_grad_enabled()
    x2, w2 = (None, None) if lora is None else lora
    need = [grad and t is not None and t.requires_grad for t in (x, w, bias, x2, w2, scale)]
    need[2] |= need[5] and bias is not None  # the scale's gradient takes it in
    if backend == "fused" and (any(need[:-1]) or symmetric or margin or gap is not None or pairs is not None):
        backend = "triton"  # a second sweep's products must round as those did that the statistics are of
    if process_group is not None and not torch.compiler.is_compiling():  # there the operators ask
        note(process_group, dtype=str(x.dtype), backend=backend, gradients=[any(need[:-1]), need[0], need[3]])
        budget = default_workspace(x.device) if workspace_bytes is None else workspace_bytes
        parts = parts_of(process_group, len(w), budget, workspace_bytes is None)
    known = weights_known(reduction, x.dtype) and ring is None
    if known and any(need[:-1]) and all(t is None for t in (lora, pairs, gap, group, row_group)):
        backend = narrowed(backend, x, host_scale)
    valid = torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index
    weight = valid.to(scale.dtype) if weight is None else weight.to(scale.dtype).masked_fill(~valid, 0.0)
    n = x.shape[0]
    if batch_invariant:  # whole blocks of rows: a product's rows are independent of each other, but not of their number
        padding = (0, -n % ops.INVARIANT_ROWS.get(x.device.type, 1))
        x, x2 = F.pad(x, (0, 0, *padding)), None if x2 is None else F.pad(x2, (0, 0, *padding))
        target = F.pad(target, padding, value=ignore_index)
        weight, valid = F.pad(weight, padding), F.pad(valid, padding)
    weights, soft, divisor = _row_weights(weight, target, valid, w, class_weight, label_smoothing, kept, z_loss, group,
                                           parts)  # fmt: skip
    if reduction == "mean":
        divisor = divisor.masked_fill(divisor == 0, 1.0)
        weights = weights.map(lambda v: ops.divided(v, divisor))
    of_columns = None
    if symmetric:  # half of each direction
        weights = weights.map(lambda v: v / 2)
        of_columns = (ops.divided(weight, divisor) if reduction == "mean" else weight) / 2
    pair_start, pair_col = (None, None) if pairs is None else pairs
    options: Any = (softcap, ignore_index, margin, gap, pool)
    end: Any = (rank, need, workspace_bytes, backend, group, parts, batch_invariant, row_group)
    if known and any(need[:-1]):
        loss, nll, lse, entropy, _, _, _, _, above, *_ = call(
            ops.loss_and_grads, x, w, target, weights.b, weights.c, weights.e, weights.q, of_columns, scale, bias,
            row_id, col_id, soft, x2, w2, pair_start, pair_col, *options, *end,
        )  # fmt: skip
    else:
        nll, lse, entropy, soft_logit, col_nll, _, _, above, *_ = call(
            ops.nll_stats, x, w, target, scale, bias, row_id, col_id, soft, x2, w2, pair_start, pair_col, *options,
            symmetric, *end, ring,
        )
        loss = ops.row_losses(weights, nll, lse, soft_logit, of_columns, col_nll)
        loss = loss[:n] if reduction == "none" else loss.sum()
    nll, lse, entropy, above, valid = (t[:n] for t in (nll, lse, entropy, above, valid))
    place = (above.long() + 1) * valid if rank else above[:0].long()
    return loss, RowStats(nll, lse, -nll, entropy, place, (place == 1) & ~nll.isnan() if rank else place.bool())


def weights_known(reduction: str, dtype: torch.dtype) -> bool:
    """Before the backward pass. float16 waits for the upstream gradient: p / N is below its range without a loss scale,
    sums over N are above it."""
    return reduction != "none" and dtype != torch.float16


def _row_weights(weight, target, valid, w, class_weight, label_smoothing, kept, z_loss, group, parts):
    """The formula of :func:`linear_cross_entropy` as weights of the engine's statistics; the weights of the columns in
    the soft targets; what "mean" divides by."""
    b, c, e, soft = weight, None, None, None
    if class_weight is not None or label_smoothing:
        columns = weight.new_ones(w.shape[0]) if class_weight is None else class_weight.detach().to(weight.dtype)
        own, total, count = call(ops.column_values, columns, target, group, parts)
        b = ops.weighted(weight, own)  # an ignored target may have met a weight of inf
    divisor = b.sum()
    if label_smoothing:
        total, count = (total, count) if kept is None else (kept, kept)  # of columns that are not left out
        soft, e = columns, label_smoothing * weight / count.clamp(min=1)
        b, c = (1 - label_smoothing) * b, e * total
    return RowWeights(b, c, e, 2 * z_loss * weight if z_loss else None), soft, divisor
