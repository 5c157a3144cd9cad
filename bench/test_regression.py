"""Both losses and plain PyTorch, forward and backward, at a shape that the device is busy with: one machine's times
against its earlier ones. On a GPU in bfloat16.

pytest bench --benchmark-autosave        # keep these times
pytest bench --benchmark-compare         # against the last kept; --benchmark-compare-fail=min:10% fails on a loss
"""

import pytest
import torch
import torch.nn.functional as F

from cosup import info_nce, linear_cross_entropy
from cosup.bench import peers
from cosup.bench.measure import gradients


def plain_info_nce(query, candidates, target):
    return F.cross_entropy(query @ candidates.mT / 0.05, target)


def fused_info_nce(query, candidates, target):
    return info_nce(query, candidates, target, temperature=0.05, normalize=False)


HEAD, POOL = ((4096, 128256, 4096), (16384, 16384, 1024)) if torch.cuda.is_available() else (
    (256, 16384, 256), (1024, 2048, 128))  # N, M, D  # fmt: skip


@pytest.mark.parametrize(
    "loss, shape",
    [
        pytest.param(linear_cross_entropy, HEAD, id="linear_cross_entropy"),
        pytest.param(peers.plain, HEAD, id="linear_cross_entropy plain"),
        pytest.param(fused_info_nce, POOL, id="info_nce"),
        pytest.param(plain_info_nce, POOL, id="info_nce plain"),
    ],
)
def test_forward_and_backward(benchmark, loss, shape):
    torch.manual_seed(0)
    (n, m, d), device = shape, "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x, w = (F.normalize(torch.randn(k, d, device=device)).to(dtype).requires_grad_() for k in (n, m))
    target = torch.arange(n, device=device)

    def run():
        found = gradients(loss, x, w, target)
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    assert all(gradient.isfinite().all() for gradient in benchmark(run))
