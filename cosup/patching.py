"""Drop-in for causal language models of transformers: the same loss and gradients, within a memory budget.

    cosup.patch(model)      in training, model(..., labels=labels) returns logits=None
    cosup.unpatch(model)

A patched model runs its own forward; only its head waits. Instead of logits [B, T, V] it returns `DeferredLogits`
(cosup.deferred): the hidden state [B, T, D] and the head. They become `cosup.linear_cross_entropy` where the model asks
for their cross entropy. So whatever else it does, as losses of its experts, images, adapters or caches, it goes on
doing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from cosup.deferred import Call, DeferredLogits, Refused, ReturnStats
from cosup.softmax import RowStats

Model = TypeVar("Model", bound=nn.Module)


def patch(model: Model) -> Model:
    """Let a causal language model make its training loss within a memory budget. It is changed itself, and returned.

    In training, ``model(..., labels=labels)`` gives the loss and gradients that it gave, to rounding, and ``logits``
    None. Calls without labels, and in evaluation, are as before. Two more arguments are understood beside ``labels``:

        return_logits   True: as before, in training too; False: no logits, in evaluation too
        return_stats    True: ``outputs.stats`` is a :class:`cosup.RowStats` of the loss's rows, [B, T], from the same
                        pass: the row at t is of the target at t + 1, and zeros stand where there is none.
                        ``outputs.cross_entropy`` is the mean over the targets, without what the model adds to its
                        loss, as a balance of experts
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
    if "_cosup_before" in causal.__dict__ and getattr(causal.forward, "__func__", None) is not type(causal).forward:
        # wrapped since, as by accelerate; what was loaded anew has its class's own
        if getattr(_try(causal), "logits", causal) is not None:
            want = f"model: wanted {name} as cosup.patch left it"
            raise ValueError(f"{want}, got it with another forward; unwrap it first")
        return model
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
    forward = module.__dict__.get("forward")  # torch 2.11's compiler knows no `__func__` of it
    return isinstance(forward, MethodType) and hasattr(forward, "of_cosup")


def _set_forward(module: nn.Module, forward: Callable) -> None:
    """The one that the instance had, if any, is kept on it: a deep copy of the module then copies that too."""
    module.__dict__["_cosup_before"] = module.__dict__.get("forward")
    module.__dict__["forward"] = MethodType(forward, module)


def _own_forward(module: Any, *args, **kwargs):
    before = module._cosup_before
    return type(module).forward(module, *args, **kwargs) if before is None else before(*args, **kwargs)


def _try(model: nn.Module) -> Any:
    """What a patched model makes of two tokens; None where they cannot be run. Raises ValueError where it refuses."""
    weights = [*model.parameters()]
    if any(w.is_meta or hasattr(w, "full_tensor") or not w.numel() for w in weights):
        return None
    tokens = torch.tensor([[1, 2]], device=weights[0].device)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return model(input_ids=tokens, labels=tokens, return_logits=False)
    except Refused:
        raise
    except Exception:  # noqa: BLE001, S110  # it wants other inputs, or another device: its first call will tell
        return None
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
        call = Call(type(self).__name__, return_stats) if deferring else None
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


def _finished(outputs: Any, call: Call, labels: Tensor) -> Any:
    if not call.losses:
        raise Refused(call.name, "makes its loss from something else")
    outputs = _without_logits(outputs)
    if call.stats is not None:
        if not isinstance(outputs, ModelOutput) or call.losses > 1:
            got = "return_dict=False" if call.losses == 1 else f"{call.losses} cross entropies"
            raise ValueError(f"return_stats: wanted one cross entropy and return_dict=True, got {got}")
        rows = labels.shape if call.stats.nll.numel() == labels.numel() else (*labels.shape[:-1], -1)
        outputs["stats"] = RowStats(*(f.reshape(rows) for f in call.stats))
        outputs["cross_entropy"] = call.mean
    return outputs


def _head_forward(self, input: Tensor, *args, **kwargs):
    if self._cosup_call is None:
        return _own_forward(self, input, *args, **kwargs)
    if self._backward_hooks or self._backward_pre_hooks:
        raise Refused(self._cosup_call.name, "has a backward hook on its head")
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
