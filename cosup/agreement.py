"""What the ranks of a group agree on before they exchange anything else: that all make the same call, and none failed.

    with agreed(group, "name", facts):      an error in here is raised on all ranks, if the message is still due
        ...                                 what this rank does alone
        counts, = settle(group, count)      the message: at the latest where the block ends
        ...                                 now they may exchange what they like
        reopen(group)                       from here on another message is due, at the latest where the block ends

Every message has one form: a digest of what the host knows of the call, or that this rank failed, and a few numbers.
So that of a rank that failed meets that of the others, whichever call they are in: nobody waits, and no later call
meets an earlier one. Only where digests differ a second message says why. It goes by the CPU where the group can.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import struct
import threading
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

NUMBERS = 3  # of a message, at most
FAILED = -1  # in place of a digest, which is positive
KINDS = (ValueError, IndexError, TypeError)  # of errors that others raise too
Function = TypeVar("Function", bound=Callable)


@dataclass(eq=False)
class _Block:
    group: str
    call: str
    facts: dict[str, Any]
    due: bool = True  # whether its message is


class _Blocks(threading.local):
    def __init__(self) -> None:
        self.open: list[_Block] = []  # of this thread, the outermost first


_blocks = _Blocks()
_sent: set[tuple[str, int]] = set()  # groups and digests of messages that wait for a GPU


class _Tensor(NamedTuple):
    dtype: str
    ndim: int
    shape: tuple[int, ...]  # as far as it must be alike
    device: str
    gradient: bool  # whether one is asked
    number: int | float | None  # what it holds, or its checksum

    def __str__(self) -> str:
        shape = ", ".join(map(str, [*(self.ndim - len(self.shape)) * "*", *self.shape]))
        gradient = " with a gradient" * self.gradient
        number = "" if self.number is None else f" of {self.number}"
        return f"{self.dtype} [{shape}] on {self.device}{gradient}{number}"


@contextmanager
def agreed(group: dist.ProcessGroup | None, call: str, facts: Mapping[str, Any] | None = None) -> Iterator[None]:
    """An error in this block is raised on all ranks of the group, unless it comes after the message; None: on this one.

    The message is sent by ``settle``, also that of a block in this one, or where the block ends. What ``facts`` hold
    must be alike on all ranks.

    Raises:
        ValueError, IndexError, TypeError, RuntimeError: The first error of a rank, which it names, by its kind; of
            any other kind a RuntimeError. ValueError: The facts of ranks differ.
    """
    if group is None:
        yield
        return
    block, failure = _Block(group.group_name, call, dict(facts or {})), None
    _blocks.open.append(block)
    try:
        yield
    except Exception as error:
        if not block.due:
            raise
        failure = error
    finally:
        _blocks.open.remove(block)
    if block.due:
        _exchange(group, [*_due(group), block], (), failure, needed=True)


def settle(group: dist.ProcessGroup | None, *numbers: float, needed: bool = True) -> list[list[Any]]:
    """Send the message that is due, with numbers, int or float; waits for the answer: each number on every rank.

    Without ``needed`` the answer may be []: where the message goes by a GPU, it is then sent only if it is the first of
    its facts, so that the host waits for the GPU no second time.
    """
    if group is None:
        return [[number] for number in numbers]
    return _exchange(group, _due(group), numbers, None, needed)


def reopen(group: dist.ProcessGroup | None) -> None:
    """From here on an error in the blocks that are open is told in the next message."""
    for block in _blocks.open:
        block.due |= group is not None and block.group == group.group_name


def is_due(group: dist.ProcessGroup | None) -> bool:
    return group is not None and bool(_due(group))


def note(group: dist.ProcessGroup | None, **facts: Any) -> None:
    """More facts of the innermost block, once they are known."""
    if group is not None and _blocks.open:
        _blocks.open[-1].facts |= facts


def same_call(alike: Collection[str] = (), contents: Collection[str] = ()) -> Callable[[Function], Function]:
    """Decorator: a function with ``process_group`` is ``agreed``, its arguments are the facts.

    Tensors may have other rows on each rank, but for those named in ``alike``, and in ``contents``, which hold the same
    numbers (looked at on a CPU alone). With ``alike`` the others' gradients may be asked on some ranks. Budgets are no
    facts.
    """

    def decorate(function: Function) -> Function:
        parameters = inspect.signature(function).parameters
        defaults = {name: _fact(p.default) for name, p in parameters.items() if p.default is not p.empty}
        no_facts = {"process_group", "workspace_bytes"}

        def fact(name: str, value: Any) -> Any:
            whole, same = name in alike, name in contents
            return _fact(value, bool(alike) and not whole, whole or same, same)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            group = kwargs.get("process_group")
            if group is None or torch.compiler.is_compiling():  # compiled: the sizes are told by the operators
                return function(*args, **kwargs)
            if not isinstance(group, dist.ProcessGroup):
                raise ValueError(f"process_group must be a torch.distributed.ProcessGroup or None, got {group!r}")
            with agreed(group, function.__name__):
                given = dict(zip(parameters, args, strict=False)) | kwargs
                known = {name: fact(name, value) for name, value in given.items() if name not in no_facts}
                note(group, **{n: f for n, f in known.items() if n not in defaults or f != defaults[n]})
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorate


def _fact(value: Any, frozen: bool = False, alike: bool = True, contents: bool = False) -> Any:
    """What must be alike of an argument. frozen: whether a gradient is asked of it may differ."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1.0 is 1
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_fact(part, frozen, alike, contents) for part in value]
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape: tuple[int, ...] = (*value.shape,)
    number: int | float | None = None
    if not alike:  # rows, and how many there are to a sequence, may differ
        shape = shape[-1:] if len(shape) > 1 and value.is_floating_point() else ()
    if value.device.type == "cpu" and contents and value.numel() == 1:
        number = value.item()
    elif value.device.type == "cpu" and contents:
        number = zlib.crc32(value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    gradient = value.requires_grad and not frozen and torch.is_grad_enabled()
    return _Tensor(str(value.dtype), value.ndim, shape, value.device.type, gradient, number)


def _due(group: dist.ProcessGroup) -> list[_Block]:
    return [block for block in _blocks.open if block.due and block.group == group.group_name]


def _exchange(group: dist.ProcessGroup, blocks: list[_Block], numbers: tuple[float, ...], failure: Exception | None,
              needed: bool) -> list[list[Any]]:  # fmt: skip
    for block in blocks:
        block.due = False
    bits: list[int] = []
    try:
        bits = [_bits(number) for number in numbers]
    except (struct.error, OverflowError, TypeError, ValueError) as error:
        failure = failure or error
    if group.size() == 1:
        if failure is not None:
            raise failure
        return [[number] for number in numbers]
    facts = [(block.call, sorted(block.facts.items())) for block in blocks]
    kinds = [isinstance(number, float) for number in numbers]
    digest = int.from_bytes(hashlib.blake2b(repr((facts, kinds)).encode(), digest_size=7).digest(), "big")
    device = _device(group)
    if device.type != "cpu" and not needed and failure is None:
        if torch.cuda.is_current_stream_capturing() or (group.group_name, digest) in _sent:
            return []
        _sent.add((group.group_name, digest))
    row = [digest if failure is None else FAILED, *bits, *(NUMBERS - len(bits)) * [0]]
    mine = torch.tensor(row * group.size(), device=device)  # one for each
    told = torch.empty_like(mine)
    dist.all_to_all_single(told, mine, group=group)  # over gloo half the time of all_gather
    flat = told.tolist()
    digests, *columns = (flat[place :: len(row)] for place in range(len(row)))
    if failure is not None or len(set(digests)) > 1:
        _refuse(group, [(block.call, block.facts) for block in blocks], failure)
    return [[_number(bits, is_float) for bits in column] for is_float, column in zip(kinds, columns, strict=False)]


def _refuse(group: dist.ProcessGroup, facts: list[tuple[str, dict[str, Any]]], failure: Exception | None) -> NoReturn:
    """Raise what a rank failed with, or how the facts differ; collective."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, (facts, failure and _said(failure)), group=group)
    if failure is not None and all(failed == told[0][1] for _, failed in told):
        raise failure
    for rank, (_, failed) in enumerate(told):
        if failed is not None:
            kind, text = failed
            # contextlib would take an error for the StopIteration that it comes from
            cause = None if isinstance(failure, StopIteration) else failure
            raise next((k for k in KINDS if k.__name__ == kind), RuntimeError)(f"rank {rank}: {text}") from cause
    first, *others = [({"call": " in ".join(call for call, _ in facts[::-1])}, *(known for _, known in facts))
                      for facts, _ in told]  # fmt: skip
    for rank, other in enumerate(others, 1):
        for ours, theirs in zip(first, other, strict=False):
            for name in ours | theirs:
                here, there = (known.get(name, "its default") for known in (ours, theirs))
                if here != there:
                    got = f"{here} on rank 0, {there} on rank {rank}"
                    raise ValueError(f"{name}: wanted the same on all ranks, got {got}")
    raise ValueError("process_group: wanted the same numbers of all ranks, got other kinds of them")


def _said(failure: Exception) -> tuple[str, str]:
    """The kind of an error that all are to raise, and its text."""
    try:
        text = str(failure)
    except Exception:  # of a class with a mistake of its own
        text = "it cannot say why"
    kind = next((kind.__name__ for kind in KINDS if isinstance(failure, kind)), "")
    return kind, text if kind else f"{type(failure).__name__}: {text}"


def _device(group: dist.ProcessGroup) -> torch.device:
    """Where its messages go: the CPU, if it has a backend for it."""
    devices = [part.split(":")[0] for part in str(dist.get_backend_config(group)).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _bits(number: float) -> int:
    """The 64 bits of a number, as an integer."""
    if not isinstance(number, float) and not -(2**63) <= number < 2**63:
        raise ValueError(f"wanted an integer of 64 bits, got {number}")
    return struct.unpack("<q", struct.pack("<d" if isinstance(number, float) else "<q", number))[0]


def _number(bits: int, is_float: bool) -> float:
    return struct.unpack("<d", struct.pack("<q", bits))[0] if is_float else bits
