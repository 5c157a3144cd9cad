"""Large contrastive batches in the memory of a small one: every micro-batch is encoded twice, the loss is taken once.

    first pass    v = [encode(b) for b in micro_batches]                   nothing is kept but the vectors
    loss          L(v), exact over all of them, and dL/dv
    second pass   encode(b) again, dropping out what it dropped before, and backward of <dL/dv_b, encode(b)>

So memory is that of one micro-batch and all vectors, for one more forward pass.

Source: Gao et al. 2021, arXiv:2101.06983 (GradCache).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Batch = TypeVar("Batch")


def cached_encode(encode: Callable[[Batch], Tensor], micro_batches: Iterable[Batch]) -> Tensor:
    """``torch.cat([encode(b) for b in micro_batches])`` [B, D], with the activations of one micro-batch at a time.

    Same vectors and gradients, dropout and autocast included; ``backward`` encodes each micro-batch once more, the
    last one first. For two encoders call it twice; one loss over all vectors joins them. Gradient checkpointing inside
    ``encode`` lowers the memory of a micro-batch further. Under ``DistributedDataParallel`` wrap a module whose
    ``forward`` calls this: the second pass must not go through the wrapper.

    Args:
        encode: A micro-batch, of any type, to its vectors [b, D]. It is called again in ``backward``: what it reads
            must not have changed by then.
        micro_batches: One after another; kept until ``backward``.

    Raises:
        ValueError: No micro-batch.

    Source: Gao et al. 2021, arXiv:2101.06983, on PyTorch's own non-reentrant checkpoints.
    """
    vectors = [checkpoint(encode, batch, use_reentrant=False) for batch in micro_batches]
    if not vectors:
        raise ValueError("micro_batches: wanted at least one, got none")
    return torch.cat(vectors)


class RandomState:
    """The generators of the CPU and of ``device`` as they are now, for a second pass that draws what a first drew."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cpu = torch.get_rng_state()
        self.cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw from there; afterwards the generators are as they were before."""
        with torch.random.fork_rng(devices=[] if self.cuda is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device)
            yield
