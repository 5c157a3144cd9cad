"""docs/benchmarks.md from bench/results/*.json: a table for each problem of each file.

python bench/page.py
"""

from __future__ import annotations

import json
from pathlib import Path

from cosup.bench import report
from cosup.files import write_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Made of `bench/results/*.json` by `python bench/page.py`, and of nothing else. Every run of a loss has all methods in
turn, round after round, beside the bare matrix products of the same shapes; the quickest round counts, on a GPU the
median. `ranks` is
info_nce over processes of one thread each, beside its [cost model](info_nce.md#what-a-step-costs). What was expected,
found and given up is in [bench/LOG.md](../bench/LOG.md).

| column | |
| --- | --- |
| forward ms | the loss alone, no gradient asked |
| fwd+bwd ms | with the gradients of both operands |
| host ms | in which the host has started such a call: near the column before, it is what limits |
| spread | the slowest round over the quickest |
| x GEMMs | time over that of the quicker of the bare products |
| workspace MB | peak of memory above inputs and gradients |
| / stated | that peak over the one that cosup's plan states |
| dx error, dw error | relative to float64's gradient, Frobenius norms; "dw row error": mean over the rows |
| step ms, model ms | forward and backward, and what the cost model says |
| / plain | time over the model's without cosup |
| step MB, resident MB | the most that a step takes; the most that the process held |
| / none ignored | time over that with no label ignored |
"""


def page(folder: Path) -> str:
    """The page of all results in a folder.

    Raises:
        ValueError: A file that does not say which command made it.
    """
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if "command" not in run:
            raise ValueError(f"{path.name}: wanted the command that made it, got {sorted(run)}")
        versions = f"torch {run['torch']}, Python {run['python']}"
        if "packages" in run:
            named = [f"{name} {version}" for name, version in run["packages"].items()]
            versions = ", ".join([f"driver {run['driver']}", versions, *named])
        made = f"`{run['command']}`, {run['device']}, {run['threads']} threads, {versions}, {run['date']}"
        parts.append(f"## {path.stem}\n\n{made}.\n")
        for problem in run["problems"]:
            parts.append(", ".join(f"{name} {value}" for name, value in problem["size"].items()) + ":\n")
            parts.append(_markdown(report.cells(problem)))
            if remarks := report.remarks(problem):
                parts.append("\n".join(f"- {line}" for line in remarks) + "\n")
    return "\n".join(parts)


def _markdown(table: list[list[str]]) -> str:
    header, *rows = table
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    write_text(PAGE, page(report.RESULTS))
