"""Liger-Kernel's fused linear cross entropy, as its version 0.8.5 is called.

    z = input @ weight.T + bias;  z = softcap * tanh(z / softcap);  t = target[n],  s = label_smoothing,  c = ce_weight
    ce[n]     = (1 - s) c[t] (lse[n] - z[n, t]) + s / V sum_v c[v] (lse[n] - z[n, v])
    z_loss[n] = lse_square_scale lse[n]^2
    scale[n]  = softmax(z[n])[t], a constant, with use_token_scaling; else 1
    "mean"    = sum_n scale[n] ce[n] / sum_n c[t]  +  sum_n scale[n] z_loss[n] / N        over N rows, those not ignored

Source: the signatures and docstrings of liger-kernel 0.8.5, https://github.com/linkedin/Liger-Kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from cosup.checks import check_positive, check_reduction, check_smoothing, check_vector
from cosup.compat.tensors import check_tensors
from cosup.losses import linear_cross_entropy, linear_log_prob

SUMMED_IN = (None, torch.float16, torch.bfloat16, torch.float32)  # what sums in float32 satisfy


@dataclass
class CrossEntropyOutput:
    loss: Tensor
    z_loss: Tensor | None = None  # part of the loss; no gradient
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


def liger_fused_linear_cross_entropy(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None,
                                     ce_weight: Tensor | None = None, ignore_index: int = -100,
                                     lse_square_scale: float = 0.0, label_smoothing: float = 0.0,
                                     reduction: str = "mean", softcap: float | None = None,
                                     return_z_loss: bool = False, accum_dtype: torch.dtype | None = None,
                                     use_token_scaling: bool = False, return_token_accuracy: bool = False,
                                     return_predicted_tokens: bool = False, chunk_mem_const: int = 1,
                                     ) -> Tensor | CrossEntropyOutput:  # fmt: skip
    """``liger_kernel.transformers.functional.liger_fused_linear_cross_entropy`` on :func:`cosup.linear_cross_entropy`.

    The formula is at the top of the file.

    Args:
        input: [N, D], or [..., D]; float32, bfloat16, float16 or float64.
        weight: [V, D], dtype and device of ``input``.
        target: [N] int64, in [0, V) or ``ignore_index``.
        bias: [V].
        ce_weight: [V], a weight for each class; no gradient.
        lse_square_scale: Weight of the squared log-sum-exp, at least 0; always in the loss, whatever is returned.
        softcap: Positive bound of the logits.
        return_z_loss, return_token_accuracy: Return :class:`CrossEntropyOutput` with these.
        accum_dtype: None or a floating dtype of at most 32 bits; partial sums are float32 in any case.
        use_token_scaling: Weigh each target's loss by its own probability; one pass more over the logits.
        return_predicted_tokens: Must be False: the pass keeps the target's rank, not the index of the largest logit.
        chunk_mem_const: A positive integer, without effect: cosup plans its own workspace.

    Returns:
        The loss in float32 (float64 for float64 input): a scalar, or [N] with ``reduction="none"``. If anything else is
        asked, :class:`CrossEntropyOutput`: ``z_loss`` reduced as the loss is; ``token_accuracy`` [N] of 0 and 1 with
        "none", else its mean over rows not ignored (NaN where there is none).

    Raises:
        ValueError: A wrong shape, dtype, device or option, named with what was wanted and what came.
        IndexError: A target out of range (on CUDA a device-side assertion).
    """
    if isinstance(chunk_mem_const, bool) or not isinstance(chunk_mem_const, int) or chunk_mem_const < 1:
        raise ValueError(f"chunk_mem_const must be a positive integer, got {chunk_mem_const!r}")
    options = _Options(ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap, return_z_loss,
                       accum_dtype, use_token_scaling, return_token_accuracy, return_predicted_tokens)  # fmt: skip
    return _loss(("input", "weight", "target"), input, weight, target, bias, options)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """``liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss`` on :func:`cosup.linear_cross_entropy`.

    Arguments, results and errors are those of :func:`liger_fused_linear_cross_entropy`; options are attributes, checked
    here and at each call.
    """

    def __init__(self, ce_weight: Tensor | None = None, ignore_index: int = -100, lse_square_scale: float = 0.0,
                 label_smoothing: float = 0.0, reduction: str = "mean", softcap: float | None = None,
                 return_z_loss: bool = False, accum_dtype: torch.dtype | None = None, use_token_scaling: bool = False,
                 return_token_accuracy: bool = False, return_predicted_tokens: bool = False):  # fmt: skip
        super().__init__()
        options = _Options(ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
                           return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy,
                           return_predicted_tokens)  # fmt: skip
        for name in _NAMES:
            setattr(self, name, getattr(options, name))

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor,
                bias: Tensor | None = None) -> Tensor | CrossEntropyOutput:  # fmt: skip
        options = _Options(*(getattr(self, name) for name in _NAMES))
        return _loss(("_input", "lin_weight", "target"), _input, lin_weight, target, bias, options)


@dataclass(frozen=True)
class _Options:
    ce_weight: Tensor | None
    ignore_index: int
    lse_square_scale: float
    label_smoothing: float
    reduction: str
    softcap: float | None
    return_z_loss: bool
    accum_dtype: torch.dtype | None
    use_token_scaling: bool
    return_token_accuracy: bool
    return_predicted_tokens: bool

    def __post_init__(self):
        check_smoothing(self.label_smoothing)
        check_reduction(self.reduction)
        if self.softcap is not None:
            check_positive("softcap", self.softcap)
        if not isinstance(self.lse_square_scale, float | int) or not 0 <= self.lse_square_scale < float("inf"):
            raise ValueError(f"lse_square_scale must be a number, at least 0 and finite, got {self.lse_square_scale!r}")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise ValueError(f"ignore_index must be an integer, got {self.ignore_index!r}")
        if not isinstance(self.ce_weight, Tensor | None):
            raise ValueError(f"ce_weight must be a tensor or None, got {self.ce_weight!r}")
        for name in ("return_z_loss", "use_token_scaling", "return_token_accuracy", "return_predicted_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.accum_dtype not in SUMMED_IN:
            raise ValueError(f"accum_dtype must be one of {SUMMED_IN}, got {self.accum_dtype}")
        if self.return_predicted_tokens:
            raise ValueError("return_predicted_tokens must be False, got True: no index of the largest logit is kept")


_NAMES = tuple(field.name for field in fields(_Options))


def _loss(names, x, w, target, bias, o: _Options) -> Tensor | CrossEntropyOutput:
    x, w, bias = check_tensors(names, x, w, target, bias)
    head: dict[str, Any] = {"linear_bias": bias, "ignore_index": o.ignore_index, "logit_softcap": o.softcap}
    valid = target != o.ignore_index
    count, class_weight, reduction = valid.sum(), o.ce_weight, o.reduction
    if class_weight is not None:
        check_vector("ce_weight", class_weight, w.shape[:1], x.device, None)
    token_weight = None
    if o.use_token_scaling:
        with torch.no_grad():
            token_weight = linear_log_prob(x, w, target, **head).log_prob.exp()
    if reduction == "mean" and (class_weight is not None or token_weight is not None):
        # each part has its own divisor: rows over their number, class weights over their mean
        dtype, reduction = torch.promote_types(x.dtype, torch.float32), "sum"
        each = torch.ones_like(target, dtype=dtype) if token_weight is None else token_weight
        token_weight = each / count.clamp(min=1)
        if class_weight is not None:
            class_weight = class_weight.detach().to(dtype)
            own = class_weight[target.clamp(0, len(class_weight) - 1)]  # out of range: the engine's to refuse
            total = own.masked_fill(~valid, 0.0).sum()
            class_weight = class_weight * (count / torch.where(total == 0, 1.0, total))
    asked = o.return_z_loss or o.return_token_accuracy
    result: Any = linear_cross_entropy(
        x, w, target, weight=class_weight, label_smoothing=o.label_smoothing, z_loss=o.lse_square_scale,
        token_weight=token_weight, reduction=reduction, return_stats=asked, **head,
    )  # fmt: skip
    loss, stats = result if asked else (result, None)
    if stats is None:
        return loss
    output = CrossEntropyOutput(loss)
    if o.return_z_loss:
        rows = o.lse_square_scale * stats.lse.square()
        rows = rows if token_weight is None else rows * token_weight
        divisor = count.clamp(min=1) if reduction == "mean" else 1
        output.z_loss = rows if o.reduction == "none" else rows.sum() / divisor
    if o.return_token_accuracy:
        output.token_accuracy = stats.top1.float() if o.reduction == "none" else stats.top1.sum() / count
    return output
