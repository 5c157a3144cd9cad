"""Linear cross entropy by others, each as loss(x, w, target) = mean over targets that are not -100.

plain, torch.compile, torch's own chunked (three of its options), Liger-Kernel, cut-cross-entropy (CCE), QuACK. They are
measured where they can be imported, never required.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup.bench.measure import Loss


class Peer(NamedTuple):
    make: Callable[[], Loss]  # imports what it needs; ImportError: not installed
    needs_cuda: bool = False


def losses() -> tuple[dict[str, Loss], dict[str, str]]:
    """Every peer that can run here, fresh, and for each of the others why it cannot."""
    found: dict[str, Loss] = {}
    absent: dict[str, str] = {}
    for name, peer in PEERS.items():
        if peer.needs_cuda and not torch.cuda.is_available():
            absent[name] = "needs CUDA"
            continue
        try:
            found[name] = peer.make()
        except ImportError as error:
            absent[name] = f"not installed ({error})"
        except Exception as error:  # its package is there but broken: a result, as when it fails later
            found[name] = _raising(error)
    return found, absent


def plain(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x @ w.mT, target)


def compiled() -> Loss:
    torch.compiler.reset()  # shapes compiled for earlier problems count against its limit, past which it runs eagerly
    return torch.compile(plain, dynamic=False)


def torch_chunked(**options) -> Loss:
    try:
        chosen = torch.nn.LinearCrossEntropyOptions(**options)
    except AttributeError as error:
        raise ImportError("torch >= 2.13 has it") from error
    return lambda x, w, target: F.linear_cross_entropy(x, w, target, options=chosen)


def liger(*, one_chunk: bool) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        # a chunk's logits may have chunk_mem_const * N * D elements; the default is 1
        budget = {"chunk_mem_const": -(-len(w) // x.shape[1])} if one_chunk else {}
        return liger_fused_linear_cross_entropy(x, w, target, **budget)

    return loss


def cut_cross_entropy(impl: str) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, w, target: linear_cross_entropy(x, w, target, impl=impl)


def quack(*, scaled_exp: bool) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda x, w, target: chunked_linear_cross_entropy(x, w, target, use_scaled_exp=scaled_exp)


def _raising(error: Exception) -> Loss:
    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        raise error

    return loss


PEERS = {
    "plain": Peer(lambda: plain),
    "torch.compile": Peer(compiled),
    "torch chunked": Peer(torch_chunked),
    "torch accurate": Peer(lambda: torch_chunked(acc_policy="accurate")),
    "torch one chunk": Peer(lambda: torch_chunked(chunking_method=None)),
    "Liger": Peer(lambda: liger(one_chunk=False), needs_cuda=True),
    "Liger one chunk": Peer(lambda: liger(one_chunk=True), needs_cuda=True),
    "CCE": Peer(lambda: cut_cross_entropy("cce"), needs_cuda=True),
    "CCE exact": Peer(lambda: cut_cross_entropy("cce_exact"), needs_cuda=True),
    "QuACK base": Peer(lambda: quack(scaled_exp=False), needs_cuda=True),
    "QuACK scaled-exp": Peer(lambda: quack(scaled_exp=True), needs_cuda=True),
}
