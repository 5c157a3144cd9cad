"""The engine's products round little worse than torch.mm, however long their sums are."""

import pytest
import torch
import torch.nn.functional as F

from cosup import gemm, linear_cross_entropy


@pytest.fixture(params=["mm", pytest.param("onednn", marks=pytest.mark.skipif(not gemm.has_onednn(), reason="none"))])
def product(request, monkeypatch):
    """Each that a processor may take."""
    monkeypatch.setattr(gemm, "ONEDNN", request.param == "onednn")


@pytest.mark.parametrize("length", [1, 300, 1024, 8192])
def test_long_sums(length, product):
    a, b = torch.rand(64, length), torch.rand(96, length)
    out, more = torch.empty(64, 100)[:, :96], torch.ones(64, 96)
    gemm.dots(a, b, out)
    gemm.add(more, a, b.mT, first=False)
    truth = a.double() @ b.double().mT
    theirs = ((a @ b.mT).double() - truth).norm()
    assert (out.double() - truth).norm() <= 1.5 * theirs
    assert (more.double() - 1 - truth).norm() <= 1.5 * theirs + torch.finfo(torch.float32).eps * truth.norm()


def test_parts_of_any_layout(product):
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


def test_onednn_meets_few_shapes(monkeypatch):
    """It keeps half a megabyte or more for each, for good; numbers of rows and of columns differ from call to call."""
    monkeypatch.setattr(gemm, "ONEDNN", True)
    shapes = {"rows": set(), "columns": set()}

    def calls(kind: str, sizes: list[tuple[int, int]]) -> None:
        monkeypatch.setattr(gemm, "_onednn", lambda a, b: shapes[kind].add((a.shape, b.shape)) or a @ b)
        for n, m in sizes:
            x, w = torch.randn(n, 8, requires_grad=True), torch.randn(m, 8, requires_grad=True)
            linear_cross_entropy(x, w, torch.randint(m, (n,)), workspace_bytes=1 << 22).backward()

    calls("rows", [(n, 1000) for n in range(257, 513)])
    calls("columns", [(64, m) for m in range(257, 513)])
    # 17 round numbers, in three products of two widths of strip
    assert 17 <= len(shapes["columns"]) <= 3 * 17 and 17 <= len(shapes["rows"]) <= 7 * 17


@pytest.mark.parametrize("n, m, d", [(33, 47, 70), (300, 130, 33), (1, 1, 1), (70, 300, 600)], ids=str)
def test_round_numbers_of_rows_leave_nothing_out(n, m, d, monkeypatch, filthy_memory):
    """Rows that products take beyond a block's stay out of every gradient, whatever their memory held."""
    monkeypatch.setattr(gemm, "ONEDNN", True)
    monkeypatch.setattr(gemm, "_onednn", lambda a, b: a @ b)
    x, w, target = torch.randn(n, d), torch.randn(m, d), torch.randint(m, (n,))
    for rows in (n, max(1, n // 3)):
        target[rows:] = -100
        for asked in ((x, w), (x,), (w,)):
            for t in (x, w):
                t.requires_grad_(any(t is other for other in asked))
            for budget in (1 << 24, 1 << 17):
                plain = F.cross_entropy(x @ w.mT, target)
                ours = linear_cross_entropy(x, w, target, workspace_bytes=budget)
                torch.testing.assert_close(ours, plain)
                got, want = torch.autograd.grad(ours, asked), torch.autograd.grad(plain, asked)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
