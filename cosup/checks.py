"""What the losses ask of their input: each check names the argument, what was wanted and what came."""

from __future__ import annotations

import operator
from typing import SupportsIndex

import torch
from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def check_call(workspace_bytes: int | None) -> None:
    if not torch.compiler.is_compiling() and (_functorch_level() is not None or _forward_ad_level() >= 0):
        raise RuntimeError("cosup's losses have reverse-mode gradients only: no torch.func transform, no forward mode")
    given = 0 if workspace_bytes is None else workspace_bytes
    if isinstance(given, bool) or not isinstance(given, int) or given < 0:
        raise ValueError(f"workspace_bytes must be an integer of at least 0, got {workspace_bytes!r}")


def _functorch_level() -> int | None:
    return torch._C._functorch.maybe_current_level()


def _forward_ad_level() -> int:
    return torch.autograd.forward_ad._current_level


def autocast(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or torch.float64 in (x.dtype, w.dtype):
        return x, w, bias
    dtype = torch.get_autocast_dtype(kind)
    return x.to(dtype), w.to(dtype), bias


def as_temperature(temperature: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(temperature, Tensor):
        check_positive("temperature", temperature)
        return torch.full((), temperature, dtype=torch.float64, device=device)
    if temperature.numel() != 1 or temperature.device != device:
        raise ValueError(
            f"temperature must be one number on {device}, got {[*temperature.shape]} on {temperature.device}"
        )
    if device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async((temperature > 0).all(), "temperature must be positive")
    elif not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature.item()}")
    return temperature.reshape(())


def as_number(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        if not isinstance(value, float | int) or not abs(value) < float("inf"):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        return torch.full((), value, dtype=torch.float64, device=device)
    if value.numel() != 1 or not value.is_floating_point() or value.device != device:
        got = f"{value.dtype} {[*value.shape]} on {value.device}"
        raise ValueError(f"{name} must be one floating number on {device}, got {got}")
    return value.reshape(())


def check_pair(x_name: str, x: Tensor, w_name: str, w: Tensor) -> None:
    if w.ndim != 2 or x.shape[-1] != w.shape[1]:
        raise ValueError(f"want {x_name} [..., D] and {w_name} [M, D], got {[*x.shape]} and {[*w.shape]}")
    if x.dtype != w.dtype or not x.is_floating_point():
        raise ValueError(f"want {x_name} and {w_name} in one floating dtype, got {x.dtype} and {w.dtype}")
    if x.device != w.device:
        raise ValueError(f"want {x_name} and {w_name} on one device, got {x.device} and {w.device}")


def check_vector(name: str, v: Tensor, shape, device: torch.device, dtype: torch.dtype | None) -> None:
    if v.shape != torch.Size(shape):
        raise ValueError(f"{name} must be {[*shape]}, got {[*v.shape]}")
    if v.dtype != dtype if dtype else not v.is_floating_point():
        raise ValueError(f"{name} must be {dtype or 'floating'}, got {v.dtype}")
    if v.device != device:
        raise ValueError(f"{name} must be on {device}, got {v.device}")


def check_positive(name: str, value: float) -> None:
    """A number whose inverse is finite too, in float32."""
    if not isinstance(value, float | int) or not 1e-30 < value < 1e30:
        raise ValueError(f"{name} must be a number, positive and finite (1e-30 to 1e30), got {value!r}")


def check_smoothing(label_smoothing: float) -> None:
    if label_smoothing is None or isinstance(label_smoothing, str) or not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")


def check_targets(target: Tensor, m: int) -> None:
    """That targets are rows of this rank: an error on a CPU, a device-side assertion on CUDA."""
    bad = (target < 0) | (target >= m)
    if target.device.type == "cpu" and bad.any():
        row = int(bad.nonzero()[0])
        raise IndexError(f"target must be in [0, {m}), got {int(target[row])} in row {row}")
    torch._assert_async(~bad.any(), f"target must be in [0, {m})")


def check_distinct(target: Tensor, m: int) -> None:
    """That no two targets are one column: an error on a CPU, a device-side assertion on CUDA."""
    counts = torch.zeros(max(m, 1), dtype=torch.int64, device=target.device)
    counts.index_add_(0, target.clamp(0, max(m - 1, 0)), torch.ones_like(target))
    twice = (counts > 1) & (m > 0)
    message = "target must be distinct rows of candidates where symmetric"
    if target.device.type == "cpu" and not torch.compiler.is_compiling() and twice.any():
        raise ValueError(f"{message}, got row {int(twice.nonzero()[0])} for {int(counts.max())} queries")
    torch._assert_async(~twice.any(), message)


def as_integer(name: str, value: SupportsIndex) -> int:
    """An integer of any kind, numpy's too."""
    if type(value) is int:  # a compiler follows
        return value
    try:
        return operator.index(value if not isinstance(value, bool) else None)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
