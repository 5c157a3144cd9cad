"""How every benchmark measures: rounds that interleave the methods, the quietest time of each, and the peak of the
allocator above what lay there before. Results are a table, and JSON in bench/results/."""

from __future__ import annotations

import gc
import json
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def compare(methods: dict[str, Callable[[], object]], rounds: int) -> list[dict]:
    """Run every method once to warm up and measure memory, then all of them in turn, ``rounds`` times."""
    rows = {}
    for name, run in methods.items():
        try:
            run()
            rows[name] = {"method": name, "peak_bytes": peak_bytes(run), "seconds": []}
        except (torch.OutOfMemoryError, MemoryError):
            rows[name] = {"method": name, "peak_bytes": None, "seconds": []}  # a result, not a gap
    for _ in range(rounds):
        for name, row in rows.items():
            if row["peak_bytes"] is not None:
                row["seconds"].append(_seconds(methods[name]))
    return list(rows.values())


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


def report(title: str, rows: list[dict], *, baselines: tuple[str, ...], flop: float, size: dict, gradient_bytes: int,
           stated_bytes: int) -> None:  # fmt: skip
    """Print the table and write bench/results/<title>_<device>.json.

    Args:
        baselines: Bare products; the others' times are divided by that of the quickest.
        flop: FLOP of one run, for the rate.
        size: The problem's sizes, kept in the JSON.
        gradient_bytes: What every method returns; memory is reported above it.
        stated_bytes: The workspace that cosup's plan states.
    """
    seconds = {row["method"]: min(row["seconds"]) for row in rows if row["seconds"]}
    floor = min(seconds[name] for name in baselines)
    table = Table(title=f"{title}  {size}  {device_name()}")
    for column in ("method", "ms", "spread", "x GEMMs", "GFLOP/s", "workspace MB", "/ stated"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        name = row["method"]
        if name not in seconds:
            table.add_row(name, "out of memory")
            continue
        row["ratio"] = seconds[name] / floor
        row["workspace_bytes"] = row["peak_bytes"] - gradient_bytes
        row["stated_bytes"] = stated_bytes if name == "cosup" else None
        table.add_row(
            name, f"{1e3 * seconds[name]:.1f}", f"{max(row['seconds']) / seconds[name]:.2f}", f"{row['ratio']:.3f}",
            f"{flop / seconds[name] / 1e9:.0f}", f"{row['workspace_bytes'] / 1e6:.1f}",
            f"{row['workspace_bytes'] / stated_bytes:.3f}" if name == "cosup" else "",
        )  # fmt: skip
    Console(width=140).print(table)
    record = {"title": title, "size": size, "flop": flop, **environment(), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{title}_{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def environment() -> dict:
    return {"device": device_name(), "torch": torch.__version__, "threads": torch.get_num_threads(),
            "python": platform.python_version(), "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    found = [line for line in _lscpu() if line.startswith("Model name")]
    return found[0].split(":")[1].strip() if found else platform.processor() or platform.machine()


def _lscpu() -> list[str]:
    try:
        return subprocess.run(["lscpu"], capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def _seconds(run: Callable[[], object]) -> float:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
