"""What a benchmark leaves: a table of each problem, and JSON and a picture of the run.

They lie in the clone's bench/results/, or in ./cosup-bench/ where cosup is installed without its clone.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from cosup.doctor import version
from cosup.files import replaced, write_text

HERE = Path(__file__).parent
RESULTS = HERE / "results" if (HERE.parent / "pyproject.toml").exists() else Path("cosup-bench")
DTYPES = ("float32", "bfloat16", "float16", "float64")
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "inf-cl",
            "sentence-transformers")  # that a GPU's figures depend on, beside torch
GIGA, TERA = (1e9, "GFLOP/s"), (1e12, "TFLOP/s")


def positive(text: str) -> int:
    """A number of a command's options, at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"wanted an integer of at least 1, got {text!r}")
    return int(text)


def summarise(rows: list[dict[str, Any]], *, size: dict[str, Any], products: tuple[str, ...], flop: float,
              gradient_bytes: int, stated_bytes: int, absent: dict[str, str]) -> dict[str, Any]:  # fmt: skip
    """The record of one problem: the rows of ``measure``, and what follows from them.

    Args:
        size: The problem's sizes and options.
        products: Methods that are bare matrix products; the times of all are divided by that of the quickest.
        flop: Of forward and backward, the same for every method.
        gradient_bytes: What every method returns; the workspace is the peak without it.
        stated_bytes: The workspace that cosup's plan states.
        absent: Methods left out, and why.
    """
    bare = [typical(row) for row in rows if row["method"] in products]
    floor = min((seconds for seconds in bare if seconds), default=None)
    for row in rows:
        peak, seconds, dense = row["peak_bytes"], typical(row), typical(row, "dense_seconds")
        row["ratio"] = seconds / floor if seconds and floor else None
        row["flop_per_second"] = flop / seconds if seconds else None
        row["dense_ratio"] = seconds / dense if seconds and dense else None
        row["workspace_bytes"] = None if peak is None else peak - gradient_bytes
        row["stated_bytes"] = stated_bytes if row["method"] == "cosup" else None
    return {"size": size, "flop": flop, "absent": absent, "rows": rows}


def typical(row: dict[str, Any], key: str = "seconds") -> float | None:
    """Of a method's rounds the quickest; on CUDA, whose clock follows its heat, the median."""
    seconds = row.get(key)
    return (statistics.median if "host_seconds" in row else min)(seconds) if seconds else None


def show(title: str, record: dict[str, Any], device: str | None = None) -> None:
    """Print the table of one problem; below it what failed and what was left out. device: as of `save`."""
    head, *rows = cells(record)
    table = Table(title=f"{title}  {record['size']}  {device_name(device)}")
    table.add_column(head[0], no_wrap=True)
    for column in head[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console = Console(width=160)
    console.print(table)
    for line in remarks(record):
        console.print(line, markup=False, highlight=False)


def cells(record: dict[str, Any]) -> list[list[str]]:
    """The table of one problem, its head first. A column in which nothing stands is left out."""
    fastest = max((row.get("flop_per_second") or 0 for row in record["rows"]), default=0)
    unit, rate = TERA if fastest >= 1e13 else GIGA  # by the record alone: its page is the same on every machine

    def milliseconds(seconds: float) -> str:
        return f"{1e3 * seconds:.1f}"

    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "method": lambda row: row["method"],
        "forward ms": lambda row: _cell(typical(row, "forward_seconds"), milliseconds),
        "fwd+bwd ms": lambda row: _cell(typical(row), milliseconds),
        "host ms": lambda row: _cell(typical(row, "host_seconds"), milliseconds),
        "step ms": lambda row: _cell(typical(row, "step_seconds"), milliseconds),
        "model ms": lambda row: _cell(row.get("model_seconds"), milliseconds),
        "spread": lambda row: _cell(row.get("seconds"), lambda s: f"{max(s) / min(s):.2f}"),
        "x GEMMs": lambda row: _cell(row.get("ratio"), "{:.3f}".format),
        "/ plain": lambda row: _cell(row.get("plain_ratio"), "{:.3f}".format),
        rate: lambda row: _cell(row.get("flop_per_second"), lambda f: f"{f / unit:.0f}"),
        "workspace MB": lambda row: _cell(row.get("workspace_bytes"), lambda b: f"{b / 1e6:.1f}"),
        "/ stated": lambda row: _cell(row.get("stated_bytes"), lambda b: f"{row['workspace_bytes'] / b:.3f}"),
        "step MB": lambda row: _cell(row.get("step_bytes"), lambda b: f"{b / 1e6:.1f}"),
        "resident MB": lambda row: _cell(row.get("resident_bytes"), lambda b: f"{b / 1e6:.0f}"),
        "dx error": lambda row: _cell(row.get("dx_error"), "{:.1e}".format),
        "dw error": lambda row: _cell(row.get("dw_error"), "{:.1e}".format),
        "dw row error": lambda row: _cell(row.get("dw_row_error"), "{:.1e}".format),
        "/ none ignored": lambda row: _cell(row.get("dense_ratio"), "{:.2f}".format),
    }
    written = [[name, *(text(row) for row in record["rows"])] for name, text in columns.items()]
    return [list(line) for line in zip(*(column for column in written if any(column[1:])), strict=True)]


def remarks(record: dict[str, Any]) -> list[str]:
    """What failed in a problem, and what was left out."""
    failed = [f"{row['method']}: failed: {row['failed']}" for row in record["rows"] if row["failed"]]
    unchecked = [(row["method"], row["check_failed"]) for row in record["rows"] if row.get("check_failed")]
    failed += [f"{method}: errors not measured: {why}" for method, why in unchecked]
    return failed + [f"{name}: skipped: {why}" for name, why in record["absent"].items()]


def save(title: str, records: list[dict[str, Any]], device: str | None = None) -> dict[str, Any]:
    """Write <title>_<device>.json and .png, and say where; return what the first holds.

    device: "cpu" where a GPU has no part.
    """
    run = {"title": title, **environment(device), "problems": records}
    path = RESULTS / f"{file_name(title, device)}.json"
    write_text(path, json.dumps(run, indent=1) + "\n")
    _picture(f"{title}, {device_name(device)}", records, path.with_suffix(".png"))
    print(f"all figures: {path}; a picture: {path.with_suffix('.png')}")
    return run


def file_name(title: str, device: str | None = None) -> str:
    return f"{title}_{device or ('cuda' if torch.cuda.is_available() else 'cpu')}"


def environment(device: str | None = None) -> dict[str, Any]:
    program = Path(sys.argv[0]).name
    command = ["python", f"bench/{program}"] if program.endswith(".py") else [program]
    found = {"command": shlex.join([*command, *sys.argv[1:]]), "device": device_name(device),
             "torch": torch.__version__, "threads": torch.get_num_threads(), "python": platform.python_version(),
             "date": time.strftime("%Y-%m-%d")}  # fmt: skip
    if torch.cuda.is_available() and device != "cpu":
        found["driver"] = _driver()
        found["packages"] = {name: known for name in PACKAGES if (known := version(name))}
    return found


def _driver() -> str | None:
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):  # another vendor's
        return None


def device_name(device: str | None = None) -> str:
    if torch.cuda.is_available() and device != "cpu":
        return torch.cuda.get_device_name()
    found = [line for line in _lscpu() if line.startswith("Model name")]
    return found[0].split(":")[1].strip() if found else platform.processor() or platform.machine()


def _picture(title: str, records: list[dict[str, Any]], path: Path) -> None:
    """Time and memory of every method, a row of axes for each problem."""
    heights = [1.1 + 0.28 * len(record["rows"]) for record in records]
    figure = Figure(figsize=(10, sum(heights)), dpi=120, layout="constrained")
    axes = figure.subplots(len(records), 2, squeeze=False, sharey="row", height_ratios=heights)
    for (time_axes, memory_axes), record in zip(axes, records, strict=True):
        rows = record["rows"]
        whole = any("step_seconds" in row for row in rows)  # steps of training, or of a rank; else a loss
        both = [1e3 * (typical(row, "step_seconds" if whole else "seconds") or 0) for row in rows]
        forward = [1e3 * (typical(row, "forward_seconds") or 0) for row in rows]
        label = "a step" if whole else "forward and backward"
        bars = time_axes.barh(range(len(rows)), both, color="#0072b2", label=label)
        if any(forward):
            time_axes.barh(range(len(rows)), forward, height=0.4, color="#d55e00", label="forward alone")
        time_axes.bar_label(bars, [f"{ms:.4g}" if ms else "failed" for ms in both], padding=3, fontsize=8)
        time_axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
        time_axes.invert_yaxis()
        time_axes.set_xlabel("ms")
        time_axes.legend(fontsize=8)
        memory, meaning = ("step_bytes", "a step takes") if whole else ("workspace_bytes", "above inputs and gradients")
        megabytes = [1e-6 * (row.get(memory) or 0) for row in rows]
        bars = memory_axes.barh(range(len(rows)), megabytes, color="#009e73")
        memory_axes.bar_label(bars, [f"{MB:.4g}" if MB else "" for MB in megabytes], padding=3, fontsize=8)
        memory_axes.set_xlabel(f"MB {meaning}")
        time_axes.set_title(", ".join(f"{name} {value}" for name, value in record["size"].items()), size=9, loc="left")
        for panel in (time_axes, memory_axes):
            panel.margins(x=0.15)
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, size=10)
    with replaced(path) as part:
        figure.savefig(part)


def _cell(value: Any, text: Callable[[Any], str]) -> str:
    return "" if value is None or value == [] else text(value)


def _lscpu() -> list[str]:
    try:
        return subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []
