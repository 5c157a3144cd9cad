"""Drop-in for causal language models of transformers: the same loss and gradients, without the logits.

    cosup.patch(model)      in training, model(..., labels=labels) returns logits=None
    cosup.unpatch(model)

A patched model runs its own forward; only its head waits. Instead of logits [B, T, V] it returns `DeferredLogits`: the
hidden state [B, T, D] and the head. They note what the model does to its logits,

    z = scale * (hidden @ weight.T + bias)      or      z = cap * tanh(scale * (hidden @ weight.T + bias) / cap),

and become `cosup.linear_cross_entropy` where it asks for their cross entropy. So whatever else a model does, as losses
of its experts, images, adapters or caches, it goes on doing. What is none of these is refused with the reason.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.utils import ModelOutput

from cosup.losses import linear_cross_entropy, linear_log_prob
from cosup.softmax import RowStats

ReturnStats = bool | Literal["differentiable"]
Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Let a causal language model make its training loss without its logits. The model itself is changed, and returned.

    In training, ``model(..., labels=labels)`` gives the loss and gradients that it gave, to rounding, and ``logits``
    None. Calls without labels, and in evaluation, are as before. Two more arguments are understood beside ``labels``:

        return_logits   True: as before, in training too; False: no logits, in evaluation too
        return_stats    True: ``outputs.stats`` is a :class:`cosup.RowStats` of the loss's rows, [B, T], from the same
                        pass: the row at t is of the target at t + 1, and zeros stand where there is none.
                        "differentiable": with gradients of ``log_prob``, ``nll``, ``lse`` and ``entropy``, for losses
                        of one's own, as of :func:`cosup.linear_log_prob`

    A batch without any target has loss 0, where it had NaN.

    Args:
        model: A causal language model of transformers, or another of its models with a language model's head inside:
            bare, in a PEFT wrapper or compiled. Adapters of the head are to be there before.

    Returns:
        ``model``.

    Raises:
        ValueError: The head is no linear layer, or the loss is not the cross entropy of what it gives, scaled or soft
            capped; the reason is named. A run of two tokens finds it or, where there can be none (sharded weights, none
            at all, other inputs), the first call with labels.
    """
    causal = _causal(model)
    if "_cosup" in causal.__dict__:
        return model
    name = type(causal).__name__
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"model: wanted a causal language model with a head, got {name}")
    if "labels" not in inspect.signature(causal.forward).parameters:
        raise ValueError(f"model: wanted one whose forward takes labels, got {name}")
    state = _State(name)
    for part in _linear_parts(head, name):
        state.set_forward(part, _head_forward(part))
    state.set_forward(causal, _model_forward(causal))
    try:
        _try(causal)
    except ValueError:
        state.undo()
        raise
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`. A model that is not patched is left as it is.

    Raises:
        ValueError: Its forward was wrapped once more, and not unwrapped.
    """
    state = _causal(model).__dict__.get("_cosup")
    if state is not None:
        state.undo()
    return model


@dataclass
class _State:
    """What a patched model and its head share."""

    name: str
    deferring: bool = False
    return_stats: ReturnStats = False
    losses: int = 0  # made from deferred logits in this call
    stats: RowStats | None = None
    forwards: list[tuple[nn.Module, Any, Any]] = field(default_factory=list)  # module, ours, the one before on it

    def set_forward(self, module: nn.Module, forward: Callable) -> None:
        ours = MethodType(forward, module)
        self.forwards.append((module, ours, module.__dict__.get("forward")))
        module.__dict__["forward"] = ours
        module.__dict__["_cosup"] = self

    def undo(self) -> None:
        for module, ours, _ in self.forwards:
            if module.__dict__.get("forward") is not ours:
                name = type(module).__name__
                raise ValueError(f"model: wanted the forward of {name} as cosup.patch left it, got another")
        for module, _, before in self.forwards:
            del module.__dict__["forward"], module.__dict__["_cosup"]
            if before is not None:
                module.__dict__["forward"] = before

    def __deepcopy__(self, memo: dict) -> _State:  # PEFT trains a copy of a head: it is to wait as the first did
        return self


def _causal(model: Any) -> Any:
    """The model of transformers within `torch.compile`'s or PEFT's wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _linear_parts(head: Any, name: str) -> list[nn.Module]:
    """The linear layers onto the vocabulary: the head itself or, within PEFT's, its base, its copies and adapters."""
    rows = len(head.weight) if hasattr(head, "weight") else None
    parts = [part for part in head.modules() if type(part).forward is nn.Linear.forward and len(part.weight) == rows]
    if not parts:
        raise ValueError(f"model: wanted a linear layer as head, got the {type(head).__name__} of {name}")
    return parts


def _try(model: nn.Module) -> None:
    """Run two tokens through a patched model, where it can be. Raises ValueError where it refuses them."""
    weights = [*model.parameters()]
    if any(w.is_meta or hasattr(w, "full_tensor") or not w.numel() for w in weights):
        return
    tokens = torch.tensor([[1, 2]], device=weights[0].device)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=tokens, labels=tokens, return_logits=False)
    except _Refused as refused:
        raise ValueError(str(refused)) from None
    except Exception:  # noqa: BLE001, S110  # it wants other inputs, or another device: its first call will tell
        pass
    finally:
        for module in training:
            module.training = True


def _function(module: nn.Module) -> Callable:
    """A module's forward as a function of the module too, so that a deep copy calls its own."""
    forward = module.forward
    return getattr(forward, "__func__", None) or (lambda self, *args, **kwargs: forward(*args, **kwargs))


def _model_forward(model: nn.Module) -> Callable:
    original = _function(model)
    position = [*inspect.signature(model.forward).parameters].index("labels")

    @functools.wraps(original)  # whoever reads the signature sees the model's own
    def forward(self, *args, return_logits: bool | None = None, return_stats: ReturnStats = False, **kwargs):
        state = self._cosup
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if return_logits is None:
            return_logits = not self.training
        if return_stats not in (False, True, "differentiable"):
            raise ValueError(f'return_stats: wanted True, False or "differentiable", got {return_stats!r}')
        if labels is None or return_logits:
            if return_stats:
                raise ValueError("return_stats: wanted labels and return_logits=False with it, got none")
            return original(self, *args, **kwargs)
        state.deferring, state.return_stats, state.losses, state.stats = True, return_stats, 0, None
        try:
            outputs = original(self, *args, **kwargs)
        finally:
            state.deferring = False
        if not state.losses:
            raise _Refused(state.name, "makes its loss from something else")
        stats, state.stats = state.stats, None
        outputs = _without_logits(outputs)
        if stats is not None:
            if not isinstance(outputs, ModelOutput):
                raise ValueError("return_stats: wanted return_dict=True with it, got False")
            outputs["stats"] = RowStats(*(f.reshape(len(labels), -1) for f in stats))
        return outputs

    return forward


def _head_forward(head: nn.Module) -> Callable:
    original = _function(head)

    @functools.wraps(original)
    def forward(self, input: Tensor, *args, **kwargs):
        if not self._cosup.deferring:
            return original(self, input, *args, **kwargs)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        return DeferredLogits(input, self, dtype=dtype)

    return forward


def _without_logits(outputs: Any) -> Any:
    """Outputs of a model, deferred logits taken out, as transformers takes out what is None."""
    if isinstance(outputs, ModelOutput):
        kept = {name: _without_logits(value) for name, value in outputs.items()}
        return type(outputs)(**{name: value for name, value in kept.items() if value is not None})
    if isinstance(outputs, tuple) and type(outputs) is tuple:
        return tuple(value for value in outputs if not isinstance(value, DeferredLogits))
    return None if isinstance(outputs, DeferredLogits) else outputs


class _Refused(ValueError, AttributeError):
    """Both: what asks `hasattr` goes on."""

    def __init__(self, name: str, does: str):
        want = "wanted one whose loss is the cross entropy of its head's logits, scaled or soft capped"
        super().__init__(f"model: {want}; {name} {does}. cosup.unpatch(model) leaves it as it was")


class DeferredLogits:
    """Logits [..., V] that are not made: what the head was given, [..., D], and what was done to its output since.

        z = scale * (head(hidden) + sum of factor * head(hidden) of what was added),  or cap * tanh(that)

    ``width``: only the first of V columns were kept.
    """

    def __init__(self, hidden: Tensor, head: Any, dtype: torch.dtype, added: tuple[tuple[Tensor, Any, float], ...] = (),
                 scale: float = 1.0, cap: float | None = None, width: int | None = None):  # fmt: skip
        self.hidden, self.head, self.dtype, self.added = hidden, head, dtype, added
        self.scale, self.cap, self.width = scale, cap, width

    def _with(self, **changes: Any) -> DeferredLogits:
        return DeferredLogits(**{**vars(self), **changes})

    def _with_rows(self, change: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits:
        added = tuple((change(hidden), head, factor) for hidden, head, factor in self.added)
        return self._with(hidden=change(self.hidden), added=added, **changes)

    def _refuse(self, does: str) -> NoReturn:
        raise _Refused(self.head._cosup.name, f"does {does} with them")

    # what leaves the numbers as they are

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def shape(self) -> torch.Size:
        return torch.Size([*self.hidden.shape[:-1], self.width or self.head.weight.shape[0]])

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> DeferredLogits:
        return self

    def float(self) -> DeferredLogits:
        return self._with(dtype=torch.float32)

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
            return self._with(cap=self.cap * factor)
        return self._with(scale=self.scale * factor)

    __rmul__ = mul = __mul__

    def __truediv__(self, divisor) -> DeferredLogits:
        return self * (1 / divisor if isinstance(divisor, int | float) and divisor else divisor)

    div = __truediv__

    def tanh(self) -> DeferredLogits:
        if self.cap is not None:
            self._refuse("a second tanh")
        return self._with(cap=1.0)

    def _loss_arguments(self) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
        """Of `linear_cross_entropy` and `linear_log_prob`: (input, weight), and what the logits are besides."""
        if hasattr(self.head.weight, "full_tensor") or not self.head.weight.numel():
            want = f"model: wanted the head of {self.head._cosup.name} whole at the loss, got a part"
            raise ValueError(f"{want}; shard it with the model, or fully_shard(head, reshard_after_forward=False)")
        w, bias = self.head.weight[: self.width], _bias(self.head, self.width)
        lora = None
        for _, head, factor in self.added:
            if head.bias is not None:
                bias = factor * _bias(head, self.width) + (0 if bias is None else bias)
        if self.added:
            h = torch.cat([factor * hidden for hidden, _, factor in self.added], dim=-1)
            lora = (h.to(w.device), torch.cat([head.weight[: self.width] for _, head, _ in self.added], dim=1))
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
        same, state = {**same, "ignore_index": ignore_index}, self.head._cosup
        if state.return_stats == "differentiable":
            if weight is not None or label_smoothing:
                raise ValueError("return_stats: wanted no class weights and no label smoothing beside it, got them")
            state.stats = linear_log_prob(x, w, target, **same)
            loss = state.stats.nll
            if reduction != "none":
                loss = loss.sum() / ((target != ignore_index).sum().clamp(min=1) if reduction == "mean" else 1)
        else:
            loss = linear_cross_entropy(x, w, target, weight=weight, reduction=reduction,
                                        label_smoothing=label_smoothing, return_stats=state.return_stats, **same)
            if isinstance(loss, tuple):
                loss, state.stats = loss
        state.losses += 1
        return loss if torch.is_autocast_enabled(self.device.type) else loss.to(self.dtype)

    def __add__(self, other) -> DeferredLogits:
        """A head and its adapter's part, as PEFT adds them."""
        if not isinstance(other, DeferredLogits) or other.added or (self.cap, self.width, other.cap) != (None,) * 3:
            self._refuse("a sum with something else")
        part = (other.hidden, other.head, other.scale / self.scale)
        return self._with(added=(*self.added, part), dtype=torch.promote_types(self.dtype, other.dtype))

    def __radd__(self, other):
        self._refuse("a sum with something else")

    __sub__ = __rsub__ = __radd__

    def __setitem__(self, index, value):
        self._refuse("an assignment")

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


def _bias(head: Any, width: int | None) -> Any:
    return None if head.bias is None else head.bias[:width]
