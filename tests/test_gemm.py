"""The engine's products round little worse than torch.mm, however long their sums are."""

import pytest
import torch

from cosup import gemm


@pytest.mark.parametrize("length", [1, 300, 1024, 8192])
def test_long_sums(length):
    a, b = torch.rand(64, length), torch.rand(96, length)
    out, more = torch.empty(64, 100)[:, :96], torch.ones(64, 96)
    gemm.dots(a, b, out)
    gemm.add(more, a, b.mT, first=False)
    truth = a.double() @ b.double().mT
    theirs = ((a @ b.mT).double() - truth).norm()
    assert (out.double() - truth).norm() <= 1.5 * theirs
    assert (more.double() - 1 - truth).norm() <= 1.5 * theirs + torch.finfo(torch.float32).eps * truth.norm()


def test_parts_of_any_layout():
    """Rows and columns of larger matrices, transposed or not, and more of them than one product takes at once."""
    x, w = torch.randn(50, 1400)[:, 3:703], torch.randn(1400, 90).mT[:, 1::2]
    total = torch.zeros(50, 90)
    gemm.add(total, x, w.mT, first=True)
    torch.testing.assert_close(total, x @ w.mT, rtol=1e-4, atol=1e-4)


def test_onednn_is_for_cpus(monkeypatch):
    """Tensors of another device take that device's products, also where the processor has AVX-512."""
    monkeypatch.setattr(gemm, "ONEDNN", True)
    called = []
    monkeypatch.setattr(gemm, "_onednn", lambda a, b: called.append(a.device.type) or a @ b)
    for device in ("meta", "cpu"):
        a, b, out = (torch.zeros(2, n, device=device) for n in (3, 3, 2))
        gemm.dots(a, b, out)
        gemm.add(out, a, b.mT, first=False)
    assert set(called) == {"cpu"}
    assert not gemm.returns_product(torch.empty(2, 3, device="meta"))
