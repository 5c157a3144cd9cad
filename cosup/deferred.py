"""Logits that are not made, of a patched model's head, until their cross entropy is asked for.

What a model does to them on the way is noted, and goes into `cosup.linear_cross_entropy`. What that cannot give exactly
is refused, with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cosup.losses import linear_cross_entropy, linear_log_prob
from cosup.softmax import RowStats

ReturnStats = bool | Literal["differentiable"]


@dataclass
class Call:
    """A call of a patched model, for whose time its head defers."""

    name: str
    return_stats: ReturnStats
    losses: int = 0  # made from deferred logits
    mean: Tensor | None = None  # of the last of them, over its targets
    stats: RowStats | None = None


class Refused(ValueError):
    def __init__(self, name: str, does: str):
        want = "wanted one whose loss is the cross entropy of its head's logits, scaled or soft capped"
        super().__init__(f"model: {want}; {name} {does}. cosup.unpatch(model) leaves it as it was")


@dataclass(eq=False, repr=False)
class DeferredLogits:
    """Logits [..., V] that are not made: what the head was given, [..., D], and what was done to its output since.

        z = scale * (hidden @ weight.T + bias + sum of factor * the same of what was added),  or cap * tanh(that)

    ``width``: only the first of V columns were kept. Weights are those of the head's own call; outside it they may not
    be there, as those of parametrizations.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    head: Any
    call: Call
    dtype: torch.dtype
    added: tuple[tuple[Tensor, Tensor, Tensor | None, float], ...] = ()
    scale: float = 1.0
    cap: float | None = None
    width: int | None = None

    def _with_rows(self, change: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits:
        added = tuple((change(hidden), w, bias, factor) for hidden, w, bias, factor in self.added)
        return replace(self, hidden=change(self.hidden), added=added, **changes)

    def _refuse(self, does: str) -> NoReturn:
        raise Refused(self.call.name, f"does {does} with them")

    # what leaves the numbers as they are

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.width or self.weight.shape[0]])

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> DeferredLogits:
        return self

    def float(self) -> DeferredLogits:
        return replace(self, dtype=torch.float32)

    def to(self, *args, **kwargs) -> DeferredLogits:
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return self._with_rows(lambda hidden: hidden.to(like.device), dtype=like.dtype)

    def view(self, *shape) -> DeferredLogits:
        *rows, last = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        if last != self.shape[-1] and (last != -1 or math.prod(rows) != math.prod(self.shape[:-1])):
            self._refuse("a view with columns of two rows in one")
        return self._with_rows(lambda hidden: hidden.reshape(*rows, hidden.shape[-1]))

    reshape = view

    def __getitem__(self, index) -> DeferredLogits:
        *rows, last = index if isinstance(index, tuple) else (index,)
        taken = sum(part.ndim if isinstance(part, Tensor) and part.dtype == torch.bool else part is not None
                    for part in (*rows, last) if part is not ...)  # fmt: skip
        if last is ... or (taken < self.ndim and not any(part is ... for part in rows)):  # columns are not touched
            return self._with_rows(lambda hidden: hidden[index])
        if not isinstance(last, slice) or last.start not in (None, 0) or last.step not in (None, 1):
            self._refuse("a choice of columns other than the first ones")
        width = len(range(self.shape[-1])[last])
        return self._with_rows(lambda hidden: hidden[(*rows, slice(None))], width=width)

    # what changes them in a way that the loss has too

    def __mul__(self, factor) -> DeferredLogits:
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not factor > 0:
            self._refuse(f"a product with {factor!r}" if isinstance(factor, int | float) else "a product with a tensor")
        if self.cap is not None:
            return replace(self, cap=self.cap * factor)
        return replace(self, scale=self.scale * factor)

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor) -> DeferredLogits:
        return self * (1 / divisor if isinstance(divisor, int | float) and divisor else divisor)

    div = __truediv__

    def tanh(self) -> DeferredLogits:
        if self.cap is not None:
            self._refuse("a second tanh")
        return replace(self, cap=1.0)

    def _loss_arguments(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Of `linear_cross_entropy` and `linear_log_prob`: (input, weight), and what the logits are besides."""
        held = self.head._parameters.get("weight")
        if held is not None and (hasattr(held, "full_tensor") or not held.numel()):
            want = f"model: wanted the head of {self.call.name} whole at the loss, got a part"
            raise ValueError(f"{want}; shard it with the model, or fully_shard(head, reshard_after_forward=False)")
        w = self.weight[: self.width]
        bias = None if self.bias is None else self.bias[: self.width]
        lora = None
        for _, _, part, factor in self.added:
            if part is not None:
                bias = factor * part[: self.width] + (0 if bias is None else bias)
        if self.added:
            h = torch.cat([factor * hidden for hidden, _, _, factor in self.added], dim=-1)
            lora = (h.to(w.device), torch.cat([weight[: self.width] for _, weight, _, _ in self.added], dim=1))
        scale = self.scale if self.cap is None else self.scale * self.cap
        same = {"linear_bias": bias, "logit_scale": scale, "logit_softcap": self.cap, "lora": lora}
        return (self.hidden.to(w.device), w), same

    def logsumexp(self, dim, keepdim=False) -> Tensor:
        """In a pass of its own: for losses beside the cross entropy, as a z-loss."""
        if dim not in (-1, self.ndim - 1):
            self._refuse("a sum over rows")
        (x, w), same = self._loss_arguments()
        target = torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device)
        lse = linear_log_prob(x, w, target, **same).lse.to(self.dtype)
        return lse[..., None] if keepdim else lse

    def cross_entropy(self, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
                      label_smoothing=0.0) -> Tensor:  # fmt: skip
        if size_average is not None or reduce is not None or self.ndim > 2 or target.is_floating_point():
            self._refuse("a cross entropy of another form than [N, V] with targets [N]")
        (x, w), same = self._loss_arguments()
        same, call = {**same, "ignore_index": ignore_index}, self.call
        if call.return_stats == "differentiable":
            if weight is not None or label_smoothing:
                raise ValueError("return_stats: wanted no class weights and no label smoothing beside it, got them")
            call.stats = linear_log_prob(x, w, target, **same)
            loss = call.stats.nll
            if reduction != "none":
                loss = loss.sum() / ((target != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)
        else:
            made = linear_cross_entropy(x, w, target, weight=weight, reduction=reduction,
                                        label_smoothing=label_smoothing, return_stats=call.return_stats, **same)
            loss, call.stats = made if isinstance(made, tuple) else (made, None)
        mean = loss if reduction == "mean" else loss.sum() / (target != ignore_index).sum().clamp(min=1)
        call.losses, call.mean = call.losses + 1, mean.clone()  # models add to it in place
        return loss if torch.is_autocast_enabled(self.device.type) else loss.to(self.dtype)

    def __add__(self, other) -> DeferredLogits:
        """A head and its adapter's part, as PEFT adds them."""
        if not isinstance(other, DeferredLogits) or other.added or (self.cap, self.width, other.cap) != (None,) * 3:
            self._refuse("a sum with something else")
        part = (other.hidden, other.weight, other.bias, other.scale / self.scale)
        return replace(self, added=(*self.added, part), dtype=torch.promote_types(self.dtype, other.dtype))

    def _other_operation(self, *others):
        self._refuse("another operation than a product, a quotient, a tanh or a shape")

    # in place too: other names of the same logits would have it, and these here do not know them
    __radd__ = __sub__ = __rsub__ = __neg__ = __pow__ = __matmul__ = __rtruediv__ = __setitem__ = _other_operation
    __iadd__ = __isub__ = __imul__ = __itruediv__ = __lt__ = __le__ = __gt__ = __ge__ = __iter__ = _other_operation
    __eq__ = __ne__ = _other_operation  # type: ignore[assignment]
    __hash__ = object.__hash__

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        if func not in (F.cross_entropy, torch.tanh, torch.logsumexp) or not isinstance(args[0], cls):
            next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))._refuse(func.__name__)
        return getattr(cls, func.__name__)(*args, **kwargs)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(name)
