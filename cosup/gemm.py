"""Matrix products by the vendor's libraries, into memory that the engine owns. Operands are never widened.

On CUDA: cuBLAS, 16-bit operands into float32; Triton where the device alone knows how many rows count. On a CPU:
oneDNN for 16-bit operands, which torch cannot multiply into float32, and for float32 ones where AVX-512 runs, which MKL
uses on one vendor's processors only; else torch.mm.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosup.plan import round_step

CHAIN = 256  # features that oneDNN adds up one after the other: rounding grows with the root of a chain's length


def returns_product(x: Tensor) -> bool:
    """Whether products of tensors like x come in new memory, before they are copied or added to where they belong."""
    return x.device.type == "cpu" and (x.element_size() < 4 or _by_onednn(x))


def round_rows(x: Tensor, rows: int) -> int:
    """So many rows of x, or some more, for products that are quicker so: those beyond are zero, and left out."""
    step = round_step(rows) if _by_onednn(x) else 1
    return -(-rows // step) * step


def dots(a: Tensor, b: Tensor, out: Tensor, *, count: Tensor | None = None) -> None:
    """out = a @ b.T; ``out`` may be wider than the operands. ``count``: of a's rows, see ``kernels.product``. Rows of a
    beyond those of ``out``, see ``round_rows``, are left out."""
    if count is not None:
        _counted(a, b.mT, out, count, of_rows=True)
    elif _by_onednn(a):
        _add_onednn(out, a, b.mT, first=True)
    elif returns_product(a):
        out.copy_(a @ b.mT)
    elif out.dtype != a.dtype:
        torch.mm(a, b.mT, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b.mT, out=out)


def add(total: Tensor, a: Tensor, b: Tensor, *, first: bool, count: Tensor | None = None,
        of_rows: bool = False) -> None:  # fmt: skip
    """total = a @ b if ``first``, else total += a @ b; partial sums in the dtype of ``total``. ``count``: of a's rows,
    or of summands, see ``kernels.product``. Rows of a beyond those of ``total`` are left out."""
    if count is not None:
        _counted(a, b, total, count, of_rows=of_rows, add=not first)
    elif _by_onednn(a):
        _add_onednn(total, a, b, first=first)
    elif returns_product(a):
        total.copy_(a @ b) if first else total.add_(a @ b)
    elif total.dtype != a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:
        _add_mm(total, a, b, first=first)


def _counted(a: Tensor, b: Tensor, out: Tensor, count: Tensor, **options: bool) -> None:
    from cosup.kernels.product import product  # Triton: absent on some platforms

    product(a, b, out, count, **options)


def _add_onednn(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """As ``add``; of a product with more rows than ``total`` these are left out. oneDNN keeps half a megabyte or more
    for every shape that it meets, for good. The numbers of vectors that a and b hold differ from call to call, that of
    their features does not: so oneDNN takes round numbers of vectors, and MKL, which keeps nothing, those left."""
    n, length = a.shape
    rows, in_columns = _rounded(n), b.stride(0) < b.stride(1)
    cols, whole = (_rounded(b.shape[1]), length) if in_columns else (b.shape[1], _rounded(length))
    bulk = total[:rows, :cols]
    for k in range(0, whole, CHAIN):
        part = slice(k, min(k + CHAIN, whole))
        merge = bulk.copy_ if first and k == 0 else bulk.add_
        merge(_onednn(a[:rows, part], b[part, :cols])[: len(bulk)])  # unnamed: freed before the next
    if whole < length:
        bulk.addmm_(a[: len(bulk), whole:], b[whole:])
    if cols < b.shape[1]:
        _add_mm(total[:rows, cols:], a[: len(bulk)], b[:, cols:], first=first)
    if rows < n:
        _add_mm(total[rows:], a[rows : len(total)], b, first=first)


def _add_mm(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    torch.mm(a, b, out=total) if first else total.addmm_(a, b)


def _rounded(count: int) -> int:
    step = round_step(count)
    return count // step * step


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, with b dense in rows or columns: else oneDNN takes a very slow path."""
    b = b.mT if b.is_contiguous() or b.mT.is_contiguous() else b.contiguous().mT
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def _by_onednn(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu"
    return on_cpu and ONEDNN and x.dtype == torch.float32 and x.shape[1] > 0 and bool(torch.backends.mkldnn.enabled)


def has_onednn() -> bool:
    """The operator is private to torch: it must be there and give what it should."""
    try:
        a = torch.arange(6.0).view(2, 3)
        return torch.backends.mkldnn.is_available() and torch.equal(_onednn(a, a.mT), a @ a.mT)
    except (AttributeError, RuntimeError):
        return False


ONEDNN = torch.backends.cpu.get_cpu_capability() == "AVX512" and has_onednn()
