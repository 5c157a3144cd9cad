"""info_nce, forward and backward: time and peak memory against plain PyTorch and its three GEMMs alone.

python bench/info_nce.py [--shape 8192 8192 256] [--dtype float32] [--temperature 0.05] [--workspace-mib 64]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from cosup import info_nce
from cosup.plan import plan
from cosup.walk import cost, resolve
from gemms import engine_gemms, torch_mm
from measure import compare, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[8192, 8192, 256], metavar=("N", "M", "D"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--workspace-mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    n, m, d = args.shape
    workspace = args.workspace_mib << 20
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    query, candidates = (F.normalize(torch.randn(k, d, device=device)).to(dtype).requires_grad_() for k in (n, m))
    target = torch.arange(n, device=device)

    def grads(loss):
        return torch.autograd.grad(loss, (query, candidates))

    def ours():
        return grads(
            info_nce(query, candidates, temperature=args.temperature, normalize=False, workspace_bytes=workspace)
        )

    blocks = plan(n, m, cost(query, resolve("auto", query), gathered=False), grads=True, weights_known=True,
                  workspace_bytes=workspace)  # fmt: skip
    methods = {
        "three torch.mm": lambda: torch_mm(query, candidates, blocks.block_rows),
        "three GEMMs": lambda: engine_gemms(query, candidates, blocks),
        "cosup": ours,
        "plain": lambda: grads(F.cross_entropy(query @ candidates.mT / args.temperature, target)),
    }
    print(f"plan: {blocks}")
    report("info_nce", compare(methods, args.rounds), baselines=("three torch.mm", "three GEMMs"), flop=6 * n * m * d,
           size={"N": n, "M": m, "D": d, "dtype": args.dtype, "temperature": args.temperature,
                 "workspace_MiB": args.workspace_mib}, gradient_bytes=(n + m) * d * query.element_size(),
           stated_bytes=blocks.workspace_bytes)  # fmt: skip


if __name__ == "__main__":
    main()
