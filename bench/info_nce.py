"""info_nce against its peers and the bare matrix products: time, memory and gradient error.

python bench/info_nce.py [--shape 8192 8192 256] [--symmetric] [--temperature 0.05] [--workspace-mib 64]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup import info_nce
from cosup.bench import peers, report
from cosup.bench.gemms import engine_gemms, torch_mm
from cosup.bench.measure import Loss, Problem, measure
from cosup.plan import Strategy
from cosup.predict import planned
from cosup.walk import default_workspace

SHAPE = {"cpu": [8192, 8192, 256], "cuda": [65536, 65536, 1024]}  # N, M, D
DTYPE = {"cpu": "float32", "cuda": "bfloat16"}


def run(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser("cosup bench info_nce", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shape", type=report.positive, nargs=3, default=SHAPE[device], metavar=("N", "M", "D"),
                        help="queries, candidates (at least as many), width (%(default)s)")  # fmt: skip
    parser.add_argument("--dtype", default=DTYPE[device], choices=report.DTYPES, help="of the operands (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.05, help="(%(default)s)")
    parser.add_argument("--workspace-mib", type=report.positive, help="budget of cosup (%(default)s)",
                        default=64 if device == "cpu" else default_workspace(torch.device(device)) >> 20)  # fmt: skip
    parser.add_argument("--symmetric", action="store_true", help="both directions")
    parser.add_argument("--rounds", type=report.positive, default=7, help="of which the quickest counts (%(default)s)")
    args = parser.parse_args(arguments)
    if args.shape[0] > args.shape[1]:
        parser.error(f"--shape: wanted at least as many candidates as queries, got {args.shape}")
    torch.manual_seed(0)
    query, candidates = random_operands(*args.shape, getattr(torch, args.dtype), device)
    record = compare(query, candidates, args.workspace_mib, args.rounds, temperature=args.temperature,
                     symmetric=args.symmetric)  # fmt: skip
    title = "info_nce" + "_symmetric" * args.symmetric
    report.show(title, record)
    return report.save(title, [record])


def compare(query: Tensor, candidates: Tensor, workspace_mib: int, rounds: int, *, temperature: float, symmetric: bool,
            others: dict[str, Loss] | None = None, until: float = math.inf) -> dict[str, Any]:  # fmt: skip
    """The record of one problem: cosup beside others (None: every peer that is installed), all in turn.

    Args:
        query, candidates: [N, D], [M, D] of unit length; candidate n is the positive of query n.
        until: As of ``measure``.
    """
    query, candidates = (t.requires_grad_() for t in (query, candidates))
    (n, d), m = query.shape, len(candidates)
    on_gpu, workspace = query.is_cuda, workspace_mib << 20
    target = torch.arange(n, device=query.device)

    def ours(q: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return info_nce(q, c, t, temperature=temperature, normalize=False, symmetric=symmetric,
                        workspace_bytes=workspace)  # fmt: skip

    known = peers.contrastive(temperature, symmetric)
    others, absent = peers.losses(known) if others is None else (others, {})
    if n != m:
        square = ("sentence-transformers", "the same, cached", "open_clip", "Inf-CL")
        absent |= {name: "takes one candidate to a query" for name in others if name in square}
        others = {name: loss for name, loss in others.items() if name not in absent}
    scale = 1 / temperature
    blocks, backend, _ = planned(query, candidates, n, workspace, scale=scale, skips=False, symmetric=symmetric)
    print(f"plan: {blocks}, {backend}")
    sweeps = 1 if blocks.strategy is Strategy.GRADS_IN_FORWARD else 2
    count = {1: "three", 2: "four"}[sweeps]
    products = {
        "three torch.mm": lambda: torch_mm(query, candidates, n if on_gpu else blocks.block_rows),
        f"{count} GEMMs": lambda: engine_gemms(query, candidates, blocks, backend, sweeps),
    }
    problem = Problem(query, candidates, target, known["plain"].make(), square=n == m)
    rows = measure(problem, products, {"cosup": ours, **others}, rounds, until)
    size = {"N": n, "M": m, "D": d, "dtype": str(query.dtype).removeprefix("torch."), "temperature": temperature,
            "symmetric": symmetric, "workspace_MiB": workspace_mib}  # fmt: skip
    return report.summarise(rows, size=size, products=(*products,), flop=2 * (2 + sweeps) * n * m * d, absent=absent,
                            gradient_bytes=(n + m) * d * query.element_size(),
                            stated_bytes=blocks.workspace_bytes)  # fmt: skip


def random_operands(n: int, m: int, d: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    query, candidates = (F.normalize(torch.randn(k, d, device=device)).to(dtype) for k in (n, m))
    return query, candidates


if __name__ == "__main__":
    run()
