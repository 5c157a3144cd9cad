"""How every benchmark measures: all methods of a problem in turn, round after round, so that a ratio is of one run.

    seconds            forward and backward;  forward_seconds: the loss alone, no gradient asked. On CUDA of a call
                       among CALLS back to back, by the device's own clock
    host_seconds       on CUDA: in which Python has started such a call
    dense_seconds      forward and backward with no label ignored, where some are
    peak_bytes         most bytes alive during forward and backward above those before: gradients are counted
    dx_error           |dx - dx64| / |dx64|, Frobenius norms;  dw_error: the same of dw
    dw_row_error       mean over the rows of w of |dw[m] - dw64[m]| / |dw64[m]|: sees a small gradient that was dropped

The errors are of the first 256 rows of x over all of w (over 256 of w too where a problem is square), against plain
PyTorch's gradients in float64. A method that raises is a result: ``failed`` says what it raised, and the others go on.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells of each profile

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # x [N, D], w [M, D], target [N] -> mean loss
ERROR_ROWS = 256
CALLS, LONGEST = 5, 0.25  # calls back to back on CUDA; seconds that they take at most, if more than one


class Problem(NamedTuple):
    x: Tensor  # [N, D], asks a gradient
    w: Tensor  # [M, D], asks a gradient
    target: Tensor  # [N] int64
    reference: Loss  # in plain PyTorch: in float64 its gradients are the true ones
    dense: Tensor | None = None  # the target with no label ignored, where some are
    square: bool = False  # row n of w is the target of row n of x


def measure(
    problem: Problem,
    products: dict[str, Callable[[], object]],
    losses: dict[str, Loss],
    rounds: int,
    until: float = math.inf,
) -> list[dict[str, Any]]:
    """A row for each method: the bare matrix products, which have no loss, and the losses.

    until: no method, no round but the first and no check of errors begins after this reading of ``time.monotonic``.
    """
    x, w, target, _, dense, _ = problem
    runs: dict[str, dict[str, Callable[[], object]]] = {name: {"seconds": run} for name, run in products.items()}
    for name, loss in losses.items():
        runs[name] = {
            "seconds": partial(gradients, loss, x, w, target),
            "forward_seconds": partial(loss, x.detach(), w.detach(), target),
        }
        if dense is not None:
            runs[name]["dense_seconds"] = partial(gradients, loss, x, w, dense)

    gc.collect()
    gc.freeze()  # for good: collected before every time, without another walk over all that is loaded by now
    rows: dict[str, dict[str, Any]] = {}
    for name, passes in runs.items():
        row = rows[name] = {"method": name, "failed": None, "peak_bytes": None} | {key: [] for key in passes}
        with recorded(row):
            if time.monotonic() > until:
                raise TimeoutError("no time left")
            for run in passes.values():
                run()
            row["peak_bytes"] = peak_bytes(passes["seconds"])
    for done in range(rounds):
        if done and time.monotonic() > until:
            break
        for name, passes in runs.items():
            for key, run in passes.items():
                if not rows[name]["failed"]:
                    with recorded(rows[name]):
                        taken, host = seconds(run)
                        rows[name][key].append(taken)
                        if host and key == "seconds":
                            rows[name].setdefault("host_seconds", []).append(host)
    _measure_errors(problem, losses, rows, until)
    return list(rows.values())


@contextmanager
def recorded(row: dict[str, Any]) -> Iterator[None]:
    """What is raised inside becomes ``row["failed"]``."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        row["failed"] = "out of memory"
    except Exception as error:  # of any kind: the methods are other projects'
        row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def gradients(loss: Loss, x: Tensor, w: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw = torch.autograd.grad(loss(x, w, target), (x, w))
    return dx, dw


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors alive during ``run``, above those alive before; what it returns is counted."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = run()  # noqa: F841  alive until the profile ends
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def _measure_errors(
    problem: Problem, losses: dict[str, Loss], rows: dict[str, dict[str, Any]], until: float
) -> None:
    table = problem.w[:ERROR_ROWS] if problem.square else problem.w
    x, w = (t.detach().requires_grad_() for t in (problem.x[:ERROR_ROWS], table))
    target = problem.target[:ERROR_ROWS]
    true = gradients(problem.reference, *(t.detach().double().requires_grad_() for t in (x, w)), target)
    for name, loss in losses.items():
        row = rows[name]
        row["dx_error"] = row["dw_error"] = row["dw_row_error"] = None
        check: dict[str, Any] = {"failed": None}  # of fewer rows: its times stand
        if not row["failed"]:
            with recorded(check):
                if time.monotonic() > until:
                    raise TimeoutError("no time left")
                dx, dw = gradients(loss, x, w, target)
                row["dx_error"], _ = _errors(dx, true[0])
                row["dw_error"], row["dw_row_error"] = _errors(dw, true[1])
        row["check_failed"] = check["failed"]


def _errors(found: Tensor, true: Tensor) -> tuple[float, float]:
    """Relative error of the whole matrix, and the mean of its rows' own."""
    off, size = (t.norm(dim=1) for t in (found.double().sub_(true), true))
    return (off.norm() / size.norm()).item(), (off / size.clamp(min=torch.finfo(size.dtype).tiny)).mean().item()


def seconds(run: Callable[[], object]) -> tuple[float, float | None]:
    """Of a call; on CUDA also in which the host has started it."""
    gc.collect()
    start = time.perf_counter()
    if not torch.cuda.is_available():
        run()
        return time.perf_counter() - start, None
    run()  # alone: wakes the device, and says how many follow
    torch.cuda.synchronize()
    calls = max(1, min(CALLS, int(LONGEST / (time.perf_counter() - start))))
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    first.record()
    for _ in range(calls):
        run()
    last.record()
    host = (time.perf_counter() - start) / calls
    torch.cuda.synchronize()
    return first.elapsed_time(last) / calls / 1e3, host
