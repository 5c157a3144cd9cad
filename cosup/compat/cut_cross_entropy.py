"""Apple's Cut Cross-Entropy, as its repository is called; release 25.1.1 on PyPI has fewer arguments.

    z = e @ c.T + bias;  z = softcap * tanh(z / softcap)
    lse[n] = logsumexp(z[n]);  loss[n] = lse[n] - z[n, targets[n]]

Source: the signatures, docstrings and README of https://github.com/apple/ml-cross-entropy, arXiv:2411.09009.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from cosup import losses
from cosup.agreement import agreed, settle
from cosup.checks import as_integer, check_positive, check_reduction
from cosup.compat.tensors import check_tensors


class LinearCrossEntropyImpl(enum.Enum):
    """Names that ``impl`` may have. All mean the same here: cosup picks its kernels by device and dtype."""

    CCE = enum.auto()
    TORCH_COMPILE = enum.auto()
    CCE_KAHAN = enum.auto()
    CCE_KAHAN_FULL_C = enum.auto()
    CCE_KAHAN_FULL_C_FULL_E = enum.auto()
    CCE_EXACT = enum.auto()


IMPLS = [impl.name.lower() for impl in LinearCrossEntropyImpl]


@dataclass
class VocabParallelOptions:
    """That ``c`` and ``bias`` are rows ``start`` to ``stop`` of a whole that lies on the ranks of ``group``."""

    start: int
    stop: int
    group: dist.ProcessGroup | None = None  # None: all processes
    reduce_e_grad: bool = True  # False: each rank has a share of the gradient of ``e``, to be summed by the caller

    @classmethod
    def from_vocab(cls, vocab_size: int, group: dist.ProcessGroup | None = None,
                   reduce_e_grad: bool = True) -> VocabParallelOptions:  # fmt: skip
        """Rows of this rank, where all have as many but the first few, which have one more."""
        rank, (each, more) = dist.get_rank(group), divmod(vocab_size, dist.get_world_size(group))
        start = rank * each + min(rank, more)
        return cls(start, start + each + (rank < more), group, reduce_e_grad)


def linear_cross_entropy(e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None, ignore_index: int = -100,
                         softcap: float | None = None, reduction: str = "mean", shift: bool | int = 0,
                         return_lse: bool = False, filter_eps: float | str | None = "auto", accum_e_fp32: bool = False,
                         accum_c_fp32: bool = False, filter_e_grad: bool = True, filter_c_grad: bool = True,
                         impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
                         vocab_parallel_options: VocabParallelOptions | None = None,
                         ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """``cut_cross_entropy.linear_cross_entropy`` on :func:`cosup.linear_cross_entropy`; the formula is at the top.

    Args:
        e: [..., D]; float32, bfloat16, float16 or float64. Under autocast it and ``c`` take autocast's dtype.
        c: [V, D], dtype and device of ``e``.
        targets: [...] int64, in [0, V) or ``ignore_index``.
        bias: [V].
        softcap: Positive bound of the logits.
        reduction: "mean" over targets not ignored, "sum" or "none".
        shift: The row at t predicts ``targets[..., t + shift]``; True is 1. Less than the length T of ``targets``.
        return_lse: Also return the log-sum-exp of each row; loss and log-sum-exp have gradients.
        filter_eps: None, a number, "auto" or "high": no gradient is dropped, which satisfies each.
        accum_e_fp32, accum_c_fp32, filter_e_grad, filter_c_grad: Without effect: partial sums are float32, and
            gradients whole, in any case.
        impl: One of :class:`LinearCrossEntropyImpl` or its name in lower case, without effect.
        vocab_parallel_options: Rows of the whole head that ``c`` and ``bias`` are, in rank order. ``e`` and
            ``targets``, among all V, are alike on every rank; so come out the loss and the gradient of ``e``.

    Returns:
        The loss in float32 (float64 for float64 ``e``): a scalar, or [..., T - shift] with ``reduction="none"``. With
        ``return_lse`` the pair (loss, lse [..., T - shift]). Zeros at ignored rows. With no target left the loss is 0.

    Raises:
        ValueError: A wrong shape, dtype, device or option, named with what was wanted and what came.
        IndexError: A target out of range (on CUDA a device-side assertion).
    """
    part = vocab_parallel_options
    group = None if part is None else _group(part)
    facts = {"return_lse": bool(return_lse), "reduce_e_grad": part is None or bool(part.reduce_e_grad)}
    with agreed(group, "cut_cross_entropy", facts):
        _check(softcap, reduction, shift, filter_eps, impl)
        e, c, bias = check_tensors(("e", "c", "targets"), e, c, targets, bias)
        length = targets.shape[-1] if targets.ndim else 1
        if not (shift == 0 or 0 < shift < length):
            raise ValueError(f"shift must be an integer in [0, {length}), got {shift!r}")
        shift = int(shift)
        if part is not None:
            _check_parts(c, part, group)
    if part is not None and not part.reduce_e_grad:
        e = _with_share_of_gradient(e, dist.get_world_size(group))
    head: dict[str, Any] = {"linear_bias": bias, "ignore_index": ignore_index, "logit_softcap": softcap,
                            "shift": shift, "process_group": group}  # fmt: skip
    if not return_lse:
        loss: Any = losses.linear_cross_entropy(e, c, targets, reduction=reduction, **head)
        return loss[..., : length - shift] if reduction == "none" and shift else loss
    stats = losses.linear_log_prob(e, c, targets, **head)
    rows, lse, predicted = stats.nll, stats.lse, targets
    if shift:
        rows, lse, predicted = rows[..., : length - shift], lse[..., : length - shift], targets[..., shift:]
    if reduction != "none":
        rows = rows.sum()
    if reduction == "mean":
        rows = rows / (predicted != ignore_index).sum().clamp(min=1)
    return rows, lse


class LinearCrossEntropy(nn.Module):
    """``cut_cross_entropy.LinearCrossEntropy``: :func:`linear_cross_entropy` with its options as attributes."""

    def __init__(self, ignore_index: int = -100, softcap: float | None = None, reduction: str = "mean",
                 shift: bool | int = 0, filter_eps: float | str | None = "auto", accum_e_fp32: bool = False,
                 accum_c_fp32: bool = False, filter_e_grad: bool = True, filter_c_grad: bool = True,
                 impl: str | LinearCrossEntropyImpl = LinearCrossEntropyImpl.CCE,
                 return_lse: bool = False):  # fmt: skip
        super().__init__()
        _check(softcap, reduction, shift, filter_eps, impl)
        self.ignore_index, self.softcap, self.reduction, self.shift = ignore_index, softcap, reduction, shift
        self.filter_eps, self.accum_e_fp32, self.accum_c_fp32 = filter_eps, accum_e_fp32, accum_c_fp32
        self.filter_e_grad, self.filter_c_grad, self.impl = filter_e_grad, filter_c_grad, impl
        self.return_lse = return_lse

    def forward(self, e: Tensor, c: Tensor, targets: Tensor,
                bias: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        return linear_cross_entropy(e, c, targets, bias, self.ignore_index, self.softcap, self.reduction, self.shift,
                                    self.return_lse, self.filter_eps, self.accum_e_fp32, self.accum_c_fp32,
                                    self.filter_e_grad, self.filter_c_grad, self.impl)  # fmt: skip


def _check(softcap, reduction, shift, filter_eps, impl) -> None:
    check_reduction(reduction)
    if softcap is not None:
        check_positive("softcap", softcap)
    if not isinstance(shift, int) or shift < 0:
        raise ValueError(f"shift must be an integer of at least 0, got {shift!r}")
    if not (filter_eps is None or filter_eps in ("auto", "high") or isinstance(filter_eps, float | int)):
        raise ValueError(f'filter_eps must be None, a number, "auto" or "high", got {filter_eps!r}')
    if (impl.name.lower() if isinstance(impl, enum.Enum) else impl) not in IMPLS:
        raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}")


def _with_share_of_gradient(e: Tensor, world: int) -> Tensor:
    e = e.view_as(e)  # the hook is not to be one of the caller's tensor
    if e.requires_grad:
        e.register_hook(lambda grad: grad / world)
    return e


def _group(part: VocabParallelOptions) -> dist.ProcessGroup:
    """The ranks of a head."""
    if not isinstance(part, VocabParallelOptions):
        raise ValueError(f"vocab_parallel_options must be VocabParallelOptions or None, got {part!r}")
    group = part.group or dist.group.WORLD
    if group is None:
        raise ValueError("vocab_parallel_options must have processes to be parallel over, got no process group")
    return group


def _check_parts(c: Tensor, part: VocabParallelOptions, group: dist.ProcessGroup | None) -> None:
    """That they lie in rank order. Collective; an error is raised on every rank."""
    ends = (as_integer(f"vocab_parallel_options.{name}", getattr(part, name)) for name in ("start", "stop"))
    starts, stops, rows = settle(group, *ends, len(c))
    if starts != [0, *stops[:-1]] or [b - a for a, b in zip(starts, stops, strict=True)] != rows:
        ranges = [*zip(starts, stops, strict=True)]
        raise ValueError(
            f"vocab_parallel_options must be ranges in rank order of as many rows as c has, {rows}, got {ranges}"
        )
