"""linear_cross_entropy, forward and backward: time and peak memory against plain PyTorch and its three GEMMs alone.

python bench/linear_cross_entropy.py [--shape 2048 768 50257] [--dtype float32] [--workspace-mib 256]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F

from cosup import linear_cross_entropy
from cosup.plan import plan
from cosup.walk import cost, resolve
from gemms import engine_gemms, torch_mm
from measure import compare, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[2048, 768, 50257], metavar=("N", "D", "V"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workspace-mib", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    n, d, v = args.shape
    workspace = args.workspace_mib << 20
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    x = (0.5 * torch.randn(n, d, device=device)).to(dtype).requires_grad_()
    w = (0.05 * torch.randn(v, d, device=device)).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), device=device)

    def grads(loss):
        return torch.autograd.grad(loss, (x, w))

    blocks = plan(n, v, cost(x, resolve("auto", x), gathered=False), grads=True, weights_known=True,
                  workspace_bytes=workspace)  # fmt: skip
    methods = {
        "three torch.mm": lambda: torch_mm(x, w, blocks.block_rows),
        "three GEMMs": lambda: engine_gemms(x, w, blocks),
        "cosup": lambda: grads(linear_cross_entropy(x, w, target, workspace_bytes=workspace)),
        "plain": lambda: grads(F.cross_entropy(x @ w.mT, target)),
    }
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch >= 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        methods["torch chunked"] = lambda: grads(F.linear_cross_entropy(x, w, target, options=options))
    print(f"plan: {blocks}")
    report("linear_cross_entropy", compare(methods, args.rounds), baselines=("three torch.mm", "three GEMMs"),
           flop=6 * n * d * v, size={"N": n, "D": d, "V": v, "dtype": args.dtype, "workspace_MiB": args.workspace_mib},
           gradient_bytes=(n + v) * d * x.element_size(), stated_bytes=blocks.workspace_bytes)  # fmt: skip


if __name__ == "__main__":
    main()
