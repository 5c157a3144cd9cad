"""Matrix products by the vendor's libraries, into memory that the engine owns. Operands are never widened.

On CUDA: cuBLAS, 16-bit operands into float32. On a CPU: oneDNN for 16-bit operands, which torch cannot multiply into
float32, and for float32 ones where AVX-512 runs, which MKL uses on one vendor's processors only; else torch.mm.
"""

from __future__ import annotations

import torch
from torch import Tensor


def returns_product(x: Tensor) -> bool:
    """Whether products of tensors like x come in new memory, before they are copied or added to where they belong."""
    return x.device.type == "cpu" and (x.element_size() < 4 or _by_onednn(x))


def dots(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b.T; ``out`` may be wider than the operands."""
    if out.is_cuda and out.dtype != a.dtype:
        torch.mm(a, b.mT, out_dtype=out.dtype, out=out)
    elif returns_product(a):
        out.copy_(_product(a, b))
    else:
        torch.mm(a, b.mT, out=out)


def add(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total = a @ b if ``first``, else total += a @ b; partial sums in the dtype of ``total``."""
    if returns_product(a):
        product = _product(a, b.mT)
        total.copy_(product) if first else total.add_(product)
    elif total.dtype != a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out_dtype=total.dtype, out=total)
    else:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T"""
    if _by_onednn(a):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return a @ b.mT


def _by_onednn(x: Tensor) -> bool:
    return ONEDNN and x.dtype == torch.float32 and x.shape[1] > 0 and bool(torch.backends.mkldnn.enabled)


def _has_onednn() -> bool:
    """The operator is private to torch: it must be there and give what it should."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        a = torch.arange(6.0).view(2, 3)
        return torch.equal(torch.ops.mkldnn._linear_pointwise(a, a, None, "none", [], ""), a @ a.mT)
    except (AttributeError, RuntimeError):
        return False


ONEDNN = _has_onednn()
