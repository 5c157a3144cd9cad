"""info_nce with a pool that fills the memory: seconds, and the most memory that the process ever held.

python bench/large_pool.py [--shape 1024 1048576 256] [--workspace-mib 256] [--normalize] [--symmetric]
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from cosup import info_nce
from cosup.bench import report


def run(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser("cosup bench large-pool", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", type=report.positive, nargs=3, default=[1024, 1 << 20, 256], metavar=("N", "M", "D"),
                        help="queries, candidates (at least as many), width (%(default)s)")  # fmt: skip
    parser.add_argument("--workspace-mib", type=report.positive, default=256, help="budget of cosup (%(default)s)")
    parser.add_argument("--normalize", action="store_true", help="vectors are not of unit length yet")
    parser.add_argument("--symmetric", action="store_true", help="both directions")
    args = parser.parse_args(arguments)
    if args.shape[0] > args.shape[1]:
        parser.error(f"--shape: wanted at least as many candidates as queries, got {args.shape}")
    n, m, d = args.shape
    torch.manual_seed(0)
    length = 1.0 if args.normalize else d**-0.5  # about that of a unit
    query, candidates = torch.randn(n, d) * length, torch.empty(m, d)
    for part in candidates.split(1 << 16):
        part.normal_(std=length)
    start = time.perf_counter()
    loss = info_nce(query.requires_grad_(), candidates.requires_grad_(), normalize=args.normalize,
                    symmetric=args.symmetric, workspace_bytes=args.workspace_mib << 20)  # fmt: skip
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    seconds = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    size = {
        "N": n, "M": m, "D": d, "workspace_MiB": args.workspace_mib, "normalize": args.normalize,
        "symmetric": args.symmetric, "candidates_and_gradient_GB": round(2 * candidates.nbytes / 1e9, 2),
    }  # fmt: skip
    row = {"method": "cosup", "failed": None, "seconds": [seconds], "resident_bytes": resident, "loss": loss.item()}
    record = {"size": size, "rows": [row], "absent": {}}
    report.show("large_pool", record, "cpu")
    return report.save("large_pool", [record], "cpu")


if __name__ == "__main__":
    run()
