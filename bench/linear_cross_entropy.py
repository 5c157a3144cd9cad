"""linear_cross_entropy against its peers and the bare three matrix products: time, memory and gradient error.

python bench/linear_cross_entropy.py [--shape 2048 768 50257 ...] [--hidden-states FILE] [--ignored 0.75]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosup import linear_cross_entropy
from cosup.bench import hidden_states, peers, report
from cosup.bench.gemms import engine_gemms, torch_mm
from cosup.bench.measure import Loss, Problem, measure
from cosup.predict import planned
from cosup.walk import default_workspace

IGNORED = -100
SHAPES = {  # N, D, V
    "cpu": [(2048, 768, 50257)],
    "cuda": [
        (8192, 2304, 256000), (8192, 4096, 128256), (8192, 4096, 151936), (16384, 2048, 248320), (4096, 7168, 129280),
        (2048, 3584, 152064), (512, 4096, 128256), (1024, 4096, 128256), (8191, 768, 50257),
    ],
}  # fmt: skip
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def run(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser("cosup bench linear_cross_entropy", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--shape", type=report.positive, nargs=3, action="append", metavar=("N", "D", "V"),
                       help="random operands of this shape; may be repeated")  # fmt: skip
    given.add_argument("--hidden-states", type=Path, metavar="FILE",
                       help="operands from a file that `cosup bench hidden-states` wrote")  # fmt: skip
    parser.add_argument("--dtype", default=DTYPE[device], choices=report.DTYPES, help="of the operands (%(default)s)")
    parser.add_argument("--ignored", type=float, default=0.0, metavar="SHARE",
                        help="share of labels that are ignored; times are then also relative to none")  # fmt: skip
    parser.add_argument("--workspace-mib", type=report.positive, default=default_workspace(torch.device(device)) >> 20,
                        help="budget of cosup (%(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=report.positive, default=5, help="of which the quickest counts (%(default)s)")
    args = parser.parse_args(arguments)
    if not 0 <= args.ignored < 1:
        parser.error(f"--ignored must be in [0, 1), got {args.ignored}")
    title = "linear_cross_entropy" + "_hidden_states" * bool(args.hidden_states) + "_ignored" * bool(args.ignored)
    records: list[dict[str, Any]] = []
    for shape in [None] if args.hidden_states else args.shape or SHAPES[device]:
        torch.manual_seed(0)
        dtype = getattr(torch, args.dtype)
        operands = hidden_states.read(args.hidden_states) if shape is None else random_operands(*shape, dtype, device)
        x, w, target = (t.to(device, dtype) if t.is_floating_point() else t.to(device) for t in operands)
        name = "random" if shape else args.hidden_states.name
        records.append(compare(x, w, target, args.workspace_mib, args.rounds, ignored=args.ignored, operands=name))
        report.show(title, records[-1])
        saved = report.save(title, records)  # after each: a later one may take the process down
    return saved


def compare(x: Tensor, w: Tensor, dense: Tensor, workspace_mib: int, rounds: int, *, ignored: float = 0.0,
            operands: str = "random", others: dict[str, Loss] | None = None,
            until: float = math.inf) -> dict[str, Any]:  # fmt: skip
    """The record of one problem: cosup beside others (None: every peer that is installed), all in turn.

    Args:
        dense: [N] labels, of which the share ``ignored`` is masked; times with none masked stand beside.
        operands: What x and w are, for the record.
        until: As of ``measure``.
    """
    x, w = (t.requires_grad_() for t in (x, w))
    target = dense.masked_fill(torch.rand(len(dense), device=x.device) < ignored, IGNORED)
    (n, d), v = x.shape, len(w)
    workspace = workspace_mib << 20

    # a CPU picks the rows that are not ignored; CUDA masks, whether or not there are any
    on_gpu = x.is_cuda
    rows = n if on_gpu else int((target != IGNORED).sum())
    ours, backend, _ = planned(x, w, rows, workspace, scale=1.0, skips=on_gpu or rows < n)
    whole, *_ = planned(x, w, n, workspace, scale=1.0, skips=on_gpu)
    print(f"plan: {ours}, {backend}")
    products = {  # of all rows, ignored or not
        "three torch.mm": lambda: torch_mm(x, w, n if on_gpu else whole.block_rows),
        "three GEMMs": lambda: engine_gemms(x, w, whole, backend),
    }
    others, absent = peers.losses() if others is None else (others, {})
    losses = {"cosup": lambda x, w, t: linear_cross_entropy(x, w, t, workspace_bytes=workspace), **others}
    problem = Problem(x, w, target, peers.plain, dense if ignored else None)
    size = {"N": n, "D": d, "V": v, "dtype": str(x.dtype).removeprefix("torch."), "workspace_MiB": workspace_mib,
            "ignored": ignored, "operands": operands}  # fmt: skip
    return report.summarise(
        measure(problem, products, losses, rounds, until), size=size, products=(*products,), flop=6 * n * d * v,
        gradient_bytes=(n + v) * d * x.element_size(), stated_bytes=ours.workspace_bytes, absent=absent,
    )  # fmt: skip


def random_operands(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x = (0.5 * torch.randn(n, d, device=device)).to(dtype)
    w = (0.05 * torch.randn(v, d, device=device)).to(dtype)
    return x, w, torch.randint(v, (n,), device=device)


if __name__ == "__main__":
    run()
