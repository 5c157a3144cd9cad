"""Calls of operators without torch's dispatcher, where nothing but autograd listens: its wrapping of an operator with
many arguments takes about as long as the products of a hundred rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import has_torch_function
from torch.utils import _python_dispatch

_modes: Callable[[], int] | None = getattr(_python_dispatch, "_len_torch_dispatch_stack", None)  # private to torch

_DIRECT: dict[Any, Callable] = {}


def operator(name: str) -> Callable[[Callable], Any]:
    """Decorator: the ``torch.library`` operator of that name, which changes no argument; ``call`` it."""

    def register(function: Callable) -> Any:
        op = torch.library.custom_op(name, function, mutates_args=())
        _DIRECT[op] = function
        return op

    return register


def differentiable(op: Any, backward: Callable, setup_context: Callable) -> None:
    """Give the operator its derivatives, as ``register_autograd`` takes them."""
    op.register_autograd(backward, setup_context=setup_context)
    function = _DIRECT[op]

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function(*arguments)
        setup_context(ctx, arguments, output)
        return output

    fields = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    made: Any = type(function.__name__, (torch.autograd.Function,), fields)
    _DIRECT[op] = made.apply


def call(op: Any, *arguments: Any) -> Any:
    """op(*arguments); by the dispatcher where a compiler, a mode or another kind of tensor wants to see it."""
    seen = torch.compiler.is_compiling() or _modes is None or _modes() > 0 or has_torch_function(arguments)
    return op(*arguments) if seen or not all(map(_is_plain, arguments)) else _DIRECT[op](*arguments)


def _is_plain(value: Any) -> bool:
    return not isinstance(value, Tensor) or type(value).__torch_dispatch__ is Tensor.__torch_dispatch__
