"""The lines of a stage: each figure is written as soon as it is known, and what raises is a line too."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cosup.bench import measure, report

Found = dict[str, Any]
LONGEST = 230  # characters of a line in the table
OURS = ("cosup", "patched", "GEMMs")  # words in the names of methods that are ours
ROUNDED = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}  # error of a number, at most
MOST_SUMMANDS = 1 << 18  # of the published shapes


class Recorder:
    """What a stage is given.

    small: no GPU; shapes of 1/256 the rows and so on, so that every line runs in seconds
    end: reading of ``time.monotonic`` at which the stage is ended from outside
    """

    def __init__(self, stage: str, path: Path, end: float, small: bool) -> None:
        self.stage, self.path, self.small, self.end = stage, path, small, end
        self.device = "cpu" if small else "cuda:0"
        self._lines = path.open("a")

    def line(self, name: str, show: bool = True, **fields: Any) -> None:
        line = {"stage": self.stage, "name": name, **fields, "show": show}
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        if show or fields.get("failed") or fields.get("wrong"):
            print("  " + text_of(line), flush=True)

    def figure(self, name: str, find: Callable[[], Found], show: bool = True, ours: bool = True, **more: Any) -> Found:
        """A line of what ``find`` gives, or of what it raises: ``failed`` if it is ours, else a result."""
        try:
            found = find()
            if found:
                self.line(name, show, **more, **found)
            return found
        except Exception as error:  # of any kind: the next figure is still wanted
            where = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            place = f"{said} ({Path(where.filename).name}:{where.lineno})"
            self.line(name, show, **more, **{"failed" if ours else "raised": place})
            return {}
        finally:
            gc.collect()
            if not self.small:
                with contextlib.suppress(Exception):  # of a context that an assertion took down
                    torch.cuda.empty_cache()

    def record(self, name: str, record: Found) -> None:
        """A problem's record of ``report.summarise``: whole in one line, and a line of each method to be read."""
        self.line(name, False, record=record)
        plain = next((row for row in record["rows"] if row["method"] == "plain"), {})
        for row in record["rows"]:
            ours = any(word in row["method"] for word in OURS)
            if row["failed"]:
                self.line(row["method"], **{"failed" if ours else "raised": row["failed"]})
                continue
            seconds = report.typical(row) or report.typical(row, "step_seconds")
            found = {"ms": _ms(seconds), "host": _ms(report.typical(row, "host_seconds")),
                     "MiB": _mib(row.get("workspace_bytes", row.get("step_bytes"))), "over": row.get("ratio"),
                     "over_plain": row.get("plain_ratio"), "over_dense": row.get("dense_ratio"),
                     "dx": row.get("dx_error"), "dw": row.get("dw_error")}  # fmt: skip
            if ours and found["dx"] is not None and plain.get("dx_error") is not None:
                dtype = getattr(torch, record["size"]["dtype"])
                pairs = [(row[error], plain[error]) for error in ("dx_error", "dw_error")]
                found["wrong"] = sum(not mine <= allowed(dtype, theirs, MOST_SUMMANDS) for mine, theirs in pairs)
            self.line(row["method"], **{key: value for key, value in found.items() if value is not None})

    def size(self, *shape: int) -> tuple[int, ...]:
        """Rows, features, columns; small ones without a GPU."""
        if not self.small:
            return shape
        return tuple(max(8, length // by) for length, by in zip(shape, (256, 64, 512), strict=True))

    def mib(self, size: int) -> int:
        """A budget of so many MiB, in MiB: of small shapes 1 or a little more."""
        return max(1, size >> 10) if self.small else size

    def timed(self, run: Callable[[], object], repeats: int = 3) -> Found:
        """The median of a few readings, each of calls back to back; and the peak of memory above what was there."""
        run()
        peak = measure.peak_bytes(run)
        readings = [measure.seconds(run) for _ in range(1 if self.small else repeats)]
        host = [h for _, h in readings if h]
        found = {"ms": _ms(statistics.median(s for s, _ in readings)), "MiB": _mib(peak)}
        return found | ({"host": _ms(statistics.median(host))} if host else {})

    @property
    def until(self) -> float:
        """Nothing long should begin after this reading of the clock."""
        return time.monotonic() + 0.6 * (self.end - time.monotonic())


def allowed(dtype: torch.dtype, theirs: float, summands: int) -> float:
    """A gradient's relative error: twice what plain PyTorch is off, or what writing it and float32 sums may cost."""
    return max(2 * theirs, ROUNDED[dtype] + ROUNDED[torch.float32] * summands**0.5)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def off(found: torch.Tensor, true: torch.Tensor) -> float:
    """Relative error, Frobenius norms; NaN is infinite."""
    error = ((found.double() - true).norm() / true.norm().clamp(min=1e-300)).item()
    return error if error == error else float("inf")


def lines_of(path: Path) -> list[Found]:
    """A run's lines; one that was cut short is left out."""
    found = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(text))
    return found


def text_of(line: Found) -> str:
    """A line as it is printed; the host's time where it is near the device's."""
    hidden = {"stage", "name", "show", "record", "of"}
    if line.get("host", 0) < line.get("ms", 0) / 2:
        hidden |= {"host"}
    parts = [f"{key} {_short(value)}" for key, value in line.items() if key not in hidden]
    return f"{line['stage']} {line['name']}: {' '.join(parts)}"[:LONGEST]


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return value


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20
