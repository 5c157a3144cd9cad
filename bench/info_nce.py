"""info_nce against plain PyTorch and the bare three matrix products: time, memory and gradient error.

python bench/info_nce.py [--shape 8192 8192 256] [--dtype float32] [--temperature 0.05] [--workspace-mib 64]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup import info_nce
from cosup.bench import report
from cosup.bench.gemms import engine_gemms, torch_mm
from cosup.bench.measure import Problem, measure
from cosup.plan import plan
from cosup.walk import cost, resolve


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("cosup bench info_nce", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--shape", type=int, nargs=3, default=[8192, 8192, 256], metavar=("N", "M", "D"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--workspace-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args(arguments)
    n, m, d = args.shape
    workspace = args.workspace_mib << 20
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    query, candidates = (F.normalize(torch.randn(k, d, device=device)).to(dtype).requires_grad_() for k in (n, m))
    target = torch.arange(n, device=device)

    def ours(q: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return info_nce(q, c, t, temperature=args.temperature, normalize=False, workspace_bytes=workspace)

    def plain(q: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(q @ c.mT / args.temperature, t)

    blocks = plan(n, m, cost(query, resolve("auto", query), gathered=False), grads=True,
                  weights_known=dtype != torch.float16, workspace_bytes=workspace)  # fmt: skip
    print(f"plan: {blocks}")
    products = {
        "three torch.mm": lambda: torch_mm(query, candidates, blocks.block_rows),
        "three GEMMs": lambda: engine_gemms(query, candidates, blocks),
    }
    problem = Problem(query, candidates, target, plain)
    rows = measure(problem, products, {"cosup": ours, "plain": plain}, args.rounds)
    size = {"N": n, "M": m, "D": d, "dtype": args.dtype, "temperature": args.temperature,
            "workspace_MiB": args.workspace_mib}  # fmt: skip
    record = report.summarise(rows, size=size, products=(*products,), flop=6 * n * m * d, absent={},
                              gradient_bytes=(n + m) * d * query.element_size(),
                              stated_bytes=blocks.workspace_bytes)  # fmt: skip
    report.show("info_nce", record)
    print(json.dumps(report.save("info_nce", [record])))


if __name__ == "__main__":
    main()
