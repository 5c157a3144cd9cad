"""Drop-in for causal language models of transformers: the same loss and gradients, without the logits.

    cosup.patch(model)      in training, model(..., labels=labels) returns logits=None
    cosup.unpatch(model)

A patched model runs its own forward; only its head waits. Instead of logits [B, T, V] it returns `DeferredLogits`: the
hidden state [B, T, D] and the head. They note what the model does to its logits,

    z = scale * (hidden @ weight.T + bias)      or      z = cap * tanh(scale * (hidden @ weight.T + bias)),

and become `cosup.linear_cross_entropy` where it asks for their cross entropy. So whatever else a model does, as losses
of its experts, images, adapters or caches, it goes on doing. What is none of these is refused with the reason.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
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
            bare, in a PEFT wrapper or compiled.

    Returns:
        ``model``.

    Raises:
        ValueError: The head is no linear layer, or the loss is not the cross entropy of what it gives, scaled or soft
            capped; the reason is named. A run of two tokens finds it or, where there can be none (sharded weights, none
            at all, other inputs), the first call with labels.
    """
    causal = _causal(model)
    if _is_ours(causal):
        return model
    name = type(causal).__name__
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"model: wanted a causal language model with a head, got {name}")
    if "labels" not in inspect.signature(causal.forward).parameters:
        raise ValueError(f"model: wanted one whose forward takes labels, got {name}")
    _heads(causal)
    _set_forward(causal, _model_forward(causal))
    try:
        _try(causal)
    except BaseException:
        unpatch(causal)
        raise
    return model


def unpatch(model: Model) -> Model:
    """Undo :func:`patch`. A model that is not patched is left as it is.

    Raises:
        ValueError: Its forward was wrapped once more, and not unwrapped.
    """
    causal = _causal(model)
    if "_cosup_before" in causal.__dict__ and not _is_ours(causal):
        raise ValueError(f"model: wanted the forward of {type(causal).__name__} as cosup.patch left it, got another")
    if _is_ours(causal):
        for module in causal.modules():
            if module is causal or ("_cosup_call" in module.__dict__ and _is_ours(module)):
                module.__dict__.pop("_cosup_call", None)
                module.__dict__["forward"] = module.__dict__.pop("_cosup_before")
                if module.__dict__["forward"] is None:
                    del module.__dict__["forward"]
    return model


@dataclass
class _Call:
    """A call of a patched model, for whose time its head defers."""

    name: str
    return_stats: ReturnStats
    losses: int = 0  # made from deferred logits
    stats: RowStats | None = None


def _causal(model: Any) -> Any:
    """The model of transformers within `torch.compile`'s or PEFT's wrapper."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _heads(model: Any) -> list[Any]:
    """The linear layers onto the vocabulary: the head itself or, within PEFT's, its base, its copies and adapters.

    Looked for in each call, since a head may be replaced, and made to defer where they do not yet.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    rows = getattr(head, "out_features", None)
    parts = [part for part in head.modules() if type(part).forward is nn.Linear.forward and part.out_features == rows]
    if not parts:
        raise ValueError(f"model: wanted a linear layer as head, got the {type(head).__name__} of {name}")
    new = [part for part in parts if not _is_ours(part)]
    for part in new:
        _check_plain(part, name)
    for part in new:
        _set_forward(part, _head_forward)
        part.__dict__["_cosup_call"] = None
    return parts


def _check_plain(head: Any, name: str) -> None:
    """That a head does what `nn.Linear` does. accelerate's hook that moves its input is passed: the loss moves it."""
    hook, weight = head.__dict__.get("_hf_hook"), head._parameters.get("weight")
    moves = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
    if not (moves or getattr(head.forward, "__func__", None) is nn.Linear.forward):
        raise ValueError(f"model: wanted a linear layer as head, got that of {name} with a forward of its own")
    if weight is not None and type(weight) is not nn.Parameter and not hasattr(weight, "full_tensor"):
        raise ValueError(f"model: wanted a plain weight of the head, got the {type(weight).__name__} of {name}")


def _is_ours(module: nn.Module) -> bool:
    return hasattr(getattr(module.__dict__.get("forward"), "__func__", None), "of_cosup")


def _set_forward(module: nn.Module, forward: Callable) -> None:
    """The one that the instance had, if any, is kept on it: a deep copy of the module then copies that too."""
    module.__dict__["_cosup_before"] = module.__dict__.get("forward")
    module.__dict__["forward"] = MethodType(forward, module)


def _own_forward(module: Any, *args, **kwargs):
    before = module._cosup_before
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def _try(model: nn.Module) -> None:
    """Run two tokens through a patched model, where it can be. Raises ValueError where it refuses them."""
    weights = [*model.parameters()]
    if any(w.is_meta or hasattr(w, "full_tensor") or not w.numel() for w in weights):
        return
    tokens = torch.tensor([[1, 2]], device=weights[0].device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=tokens, labels=tokens, return_logits=False)
    except _Refused:
        raise
    except Exception:  # noqa: BLE001, S110  # it wants other inputs, or another device: its first call will tell
        pass
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.train(mode)  # a module may do more than note its mode


def _model_forward(model: nn.Module) -> Callable:
    signature = inspect.signature(model.forward)
    position = [*signature.parameters].index("labels")

    def forward(self, *args, return_logits: bool | None = None, return_stats: ReturnStats = False, **kwargs):
        labels = args[position] if len(args) > position else kwargs.get("labels")
        if return_logits is None:
            return_logits = not self.training
        if return_stats not in (False, True, "differentiable"):
            raise ValueError(f'return_stats: wanted True, False or "differentiable", got {return_stats!r}')
        deferring = labels is not None and not return_logits
        if return_stats and not deferring:
            raise ValueError("return_stats: wanted labels and return_logits=False with it, got none")
        call = _Call(type(self).__name__, return_stats) if deferring else None
        heads = _heads(self)
        outer = [head._cosup_call for head in heads]  # of a call that this one is within
        for head in heads:
            head._cosup_call = call
        try:
            outputs = _own_forward(self, *args, **kwargs)
        finally:
            for head, before in zip(heads, outer, strict=True):
                head._cosup_call = before
        return outputs if call is None or labels is None else _finished(outputs, call, labels)

    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])  # type: ignore[attr-defined]
    forward.of_cosup = True  # type: ignore[attr-defined]
    return forward


def _finished(outputs: Any, call: _Call, labels: Tensor) -> Any:
    if not call.losses:
        raise _Refused(call.name, "makes its loss from something else")
    outputs = _without_logits(outputs)
    if call.stats is not None:
        if not isinstance(outputs, ModelOutput) or call.losses > 1:
            got = "return_dict=False" if call.losses == 1 else f"{call.losses} cross entropies"
            raise ValueError(f"return_stats: wanted one cross entropy and return_dict=True, got {got}")
        rows = labels.shape if call.stats.nll.numel() == labels.numel() else (*labels.shape[:-1], -1)
        outputs["stats"] = RowStats(*(f.reshape(rows) for f in call.stats))
    return outputs


def _head_forward(self, input: Tensor, *args, **kwargs):
    if self._cosup_call is None:
        return _own_forward(self, input, *args, **kwargs)
    if self._backward_hooks or self._backward_pre_hooks:
        raise _Refused(self._cosup_call.name, "has a backward hook on its head")
    device = input.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
    return DeferredLogits(input, self.weight, self.bias, self, self._cosup_call, dtype)


_head_forward.of_cosup = True  # type: ignore[attr-defined]
_head_forward.__name__ = "forward"  # by which a bound method is pickled: what is loaded has its class's own


def _without_logits(outputs: Any) -> Any:
    """Outputs of a model, deferred logits taken out, as transformers takes out what is None."""
    if isinstance(outputs, ModelOutput):
        kept = {name: _without_logits(value) for name, value in outputs.items()}
        return type(outputs)(**{name: value for name, value in kept.items() if value is not None})
    if isinstance(outputs, tuple) and type(outputs) is tuple:
        return tuple(value for value in outputs if not isinstance(value, DeferredLogits))
    return None if isinstance(outputs, DeferredLogits) else outputs


class _Refused(ValueError):
    def __init__(self, name: str, does: str):
        want = "wanted one whose loss is the cross entropy of its head's logits, scaled or soft capped"
        super().__init__(f"model: {want}; {name} {does}. cosup.unpatch(model) leaves it as it was")


class DeferredLogits:
    """Logits [..., V] that are not made: what the head was given, [..., D], and what was done to its output since.

        z = scale * (hidden @ weight.T + bias + sum of factor * the same of what was added),  or cap * tanh(that)

    ``width``: only the first of V columns were kept. Weights are those of the head's own call; outside it they may not
    be there, as those of parametrizations.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Any, call: _Call, dtype: torch.dtype,
                 added: tuple[tuple[Tensor, Tensor, Tensor | None, float], ...] = (), scale: float = 1.0,
                 cap: float | None = None, width: int | None = None):  # fmt: skip
        self.hidden, self.weight, self.bias, self.head, self.call = hidden, weight, bias, head, call
        self.dtype, self.added, self.scale, self.cap, self.width = dtype, added, scale, cap, width

    def _with(self, **changes: Any) -> DeferredLogits:
        return DeferredLogits(**{**vars(self), **changes})

    def _with_rows(self, change: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits:
        added = tuple((change(hidden), *part) for hidden, *part in self.added)
        return self._with(hidden=change(self.hidden), added=added, **changes)

    def _refuse(self, does: str) -> NoReturn:
        raise _Refused(self.call.name, f"does {does} with them")

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
        call.losses += 1
        return loss if torch.is_autocast_enabled(self.device.type) else loss.to(self.dtype)

    def __add__(self, other) -> DeferredLogits:
        """A head and its adapter's part, as PEFT adds them."""
        if not isinstance(other, DeferredLogits) or other.added or (self.cap, self.width, other.cap) != (None,) * 3:
            self._refuse("a sum with something else")
        part = (other.hidden, other.weight, other.bias, other.scale / self.scale)
        return self._with(added=(*self.added, part), dtype=torch.promote_types(self.dtype, other.dtype))

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
