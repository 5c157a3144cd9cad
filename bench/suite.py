"""Every benchmark that this machine can run, and one report of all: `cosup bench`.

Each subject has a process of its own: one that fails, or that the system ends for its memory, is a row of the report,
and the others go on. Beside the JSON and the picture of each lies report.md: device, versions, command, tables.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cosup import cards
from cosup.bench import measure, report
from cosup.doctor import version
from cosup.files import write_text

OURS = ("cosup", "patched", "all_gather", "ring")  # methods that are ours
THREADS = 4  # a quick problem of a CPU has as many of these parts of its rows as there are threads
VERSIONS = ("cosup", "torch", "triton", "transformers", "sentence-transformers", "liger-kernel", "cut-cross-entropy")


class Subject(NamedTuple):
    name: str
    command: str  # cosup bench ...
    quick: str  # arguments
    full: str  # arguments; of the published figures
    cpu_only: bool = False


def subjects() -> list[Subject]:
    """All of them, the quick problems sized to the machine."""
    if torch.cuda.is_available():
        rows = 8192 if torch.cuda.get_device_properties(0).total_memory > 40e9 else 2048
        head, square = f"--shape {rows} 4096 128256", "--shape 8192 8192 256"
        steps = "--steps 3"
    else:
        parts = min(torch.get_num_threads(), THREADS)
        head = f"--shape {2048 * parts // THREADS} 768 32768 --rounds 2"
        square = f"--shape {8192 * parts // THREADS} {8192 * parts // THREADS} 256 --rounds 3"
        steps = "--vocabulary 32768 --batch 4 256 --steps 3"
    return [
        Subject("linear_cross_entropy", "linear_cross_entropy", head, "--rounds 2"),
        Subject("linear_cross_entropy, labels ignored", "linear_cross_entropy", f"{head} --ignored 0.75",
                "--rounds 2 --ignored 0.75"),
        Subject("info_nce", "info_nce", square, ""),
        Subject("info_nce, symmetric", "info_nce", f"{square} --symmetric", "--symmetric"),
        Subject("patched model", "patched-model", steps, ""),
        Subject("info_nce over ranks", "ranks", "--ranks 1 2 --rows 1024 4096 256 --rounds 3", "", cpu_only=True),
        Subject("info_nce over ranks, symmetric", "ranks",
                "--ranks 1 2 --rows 1024 4096 256 --rounds 3 --symmetric", "--symmetric", cpu_only=True),
        Subject("large pool", "large-pool", "--shape 256 262144 256", "", cpu_only=True),
    ]  # fmt: skip


def run(out: Path, *, full: bool = False) -> bool:
    """Run them, print their tables, leave JSON, pictures and report.md in `out`. Returns whether none failed."""
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    sections: list[str] = []
    for subject in subjects():
        arguments = (subject.full if full else subject.quick).split()
        row: dict[str, Any] = {"subject": subject.name, "failed": None, "skipped": None, "seconds": 0.0}
        rows.append(row)
        if subject.cpu_only and torch.cuda.is_available():
            row["skipped"] = "measures CPUs alone"
        else:
            print(f"{subject.name}: cosup bench {subject.command} {' '.join(arguments)}", flush=True)
            start = time.perf_counter()
            with measure.recorded(row):
                found = _alone(subject.command, arguments, out)
                row["failed"] = _failure(found)
                sections.append(_section(subject, arguments, found))
            row["seconds"] = time.perf_counter() - start
        if row["failed"]:
            print(f"{subject.name}: failed: {row['failed']}", flush=True)
        write_text(out / "report.md", _report(rows, sections, full, out))  # the next one may be cut short
    print(f"report: {out / 'report.md'}")
    return not any(row["failed"] for row in rows)


def _alone(command: str, arguments: list[str], out: Path) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as process:
        return process.submit(_measure, command, arguments, out).result()


def _measure(command: str, arguments: list[str], out: Path) -> dict[str, Any]:
    report.RESULTS = out
    sys.argv = ["cosup", "bench", command, *arguments]  # the command that results say made them
    try:
        return import_module(f"cosup.bench.{command.replace('-', '_')}").run(arguments)
    except SystemExit as error:  # of its parser, which has said why
        raise ValueError(f"wrong arguments: {' '.join(arguments)}") from error


def _failure(run: dict[str, Any]) -> str | None:
    """What our own method raised. A peer's failure is a line under its table, and no failure of ours."""
    rows = (row for problem in run["problems"] for row in problem["rows"])
    said = [f"{row['method']}: {row['failed']}" for row in rows if row["failed"] and row["method"] in OURS]
    return "; ".join(said) or None


def _section(subject: Subject, arguments: list[str], run: dict[str, Any]) -> str:
    """A subject's tables and picture."""
    parts = [f"## {subject.name}", f"`cosup bench {' '.join([subject.command, *arguments])}`"]
    for problem in run["problems"]:
        parts.append(", ".join(f"{name} {value}" for name, value in problem["size"].items()))
        head, *rows = report.cells(problem)
        parts.append(cards.table(head, rows))
        parts += [f"- {line}" for line in report.remarks(problem)]
    file = report.file_name(run["title"], "cpu" if subject.cpu_only else None)
    return "\n\n".join([*parts, f"![{subject.name}]({file}.png)", f"[All figures]({file}.json)"])


def _report(rows: list[dict[str, Any]], sections: list[str], full: bool, out: Path) -> str:
    where = report.environment()
    versions = ", ".join(f"{name} {found}" for name in VERSIONS if (found := version(name)))
    state = ((row["subject"], _state(row)) for row in rows)
    head = [
        "# cosup bench",
        f"{where['device']}, {where['threads']} threads; Python {where['python']}, {versions}; {where['date']}; "
        f"`cosup bench{' --full' * full} --out {out}`",
        cards.table(("subject", ""), state),
        "Times are the quickest of the rounds of one run.",
    ]
    return "\n\n".join([*head, *sections]) + "\n"


def _state(row: dict[str, Any]) -> str:
    if row["skipped"]:
        return f"skipped: {row['skipped']}"
    return f"failed: {row['failed']}" if row["failed"] else f"{row['seconds']:.0f} s"
