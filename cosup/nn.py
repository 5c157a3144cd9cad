"""The losses as modules: the same arguments, options at construction; and a queue of candidates for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cosup.agreement import agreed, settle
from cosup.contrastive import info_nce, sigmoid_loss
from cosup.losses import CoSupervisionOutput, co_supervision_loss, linear_cross_entropy

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LinearCrossEntropyLoss(nn.Module):
    """:func:`cosup.linear_cross_entropy` over a head of its own; ``linear.weight`` may be tied to an embedding.

    Args:
        in_features: D.
        num_classes: V.
        bias: Whether the head has a bias.
        weight: [V], a weight for each class; a buffer, so that it moves with the module.
        **options: Options of :func:`cosup.linear_cross_entropy`.
    """

    weight: Tensor | None

    def __init__(self, in_features: int, num_classes: int, *, bias: bool = False, weight: Tensor | None = None,
                 device=None, dtype=None, **options: Any):  # fmt: skip
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options = options

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None):
        return linear_cross_entropy(input, self.linear.weight, target, linear_bias=self.linear.bias,
                                    weight=self.weight, token_weight=token_weight, **self.options)  # fmt: skip


class InfoNCELoss(nn.Module):
    """:func:`cosup.info_nce` with a fixed or learned temperature.

    Args:
        temperature: Positive divisor of the similarities, or its start.
        learn_temperature: Learn its logarithm, which keeps it positive.
        **options: Options of :func:`cosup.info_nce`.
    """

    def __init__(self, temperature: float = 0.05, *, learn_temperature: bool = False, **options: Any):
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        log_temperature = torch.tensor(float(temperature)).log()
        self.log_temperature = nn.Parameter(log_temperature) if learn_temperature else None
        self.fixed_temperature = temperature
        self.options = options

    @property
    def temperature(self) -> float | Tensor:
        return self.fixed_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, query: Tensor, candidates: Tensor, target: Tensor | None = None, **inputs: Any):
        """``inputs``: what changes from call to call of :func:`cosup.info_nce`, as ``candidate_ids``."""
        return info_nce(query, candidates, target, temperature=self.temperature, **self.options, **inputs)


class MatryoshkaLoss(nn.Module):
    """A loss of prefixes of the vectors, so that each is a vector by itself: sum_d weights[d] loss(q[:, :d], c[:, :d]).

    Args:
        loss: An :class:`InfoNCELoss` or :class:`SigmoidLoss`, whose value is one tensor.
        dims: Lengths of the prefixes.
        weights: Of each prefix's loss; None: 1 for all.

    Raises:
        ValueError: No prefixes, one longer than the vectors or without a number, not as many weights, or all 0.

    Source: Kusupati et al. 2022, arXiv:2205.13147.
    """

    def __init__(self, loss: InfoNCELoss | SigmoidLoss, dims: Sequence[int], weights: Sequence[float] | None = None):
        super().__init__()
        dims = tuple(dims)
        if not dims or not all(isinstance(d, int) and d >= 1 for d in dims):
            raise ValueError(f"dims must be lengths of at least 1, got {dims!r}")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"weights must be as many as dims, {len(dims)}, got {len(weights)}")
        if weights is not None and not any(weights):
            raise ValueError(f"weights must not all be 0, got {weights!r}")
        if not isinstance(loss, InfoNCELoss | SigmoidLoss) or {"return_stats", "hard_negatives"} & set(loss.options):
            raise ValueError("loss must be an InfoNCELoss without return_stats and hard_negatives, or a SigmoidLoss")
        self.loss, self.dims = loss, dims
        self.weights = [1.0] * len(dims) if weights is None else [*weights]

    def forward(self, query: Tensor, candidates: Tensor, target: Tensor | None = None, **inputs: Any) -> Tensor:
        group = {**getattr(self.loss, "options", {}), **inputs}.get("process_group")
        if group is None or torch.compiler.is_compiling():
            return self._sum(query, candidates, target, **inputs)
        with agreed(group, "MatryoshkaLoss", {"dims": self.dims, "weights": self.weights}):
            return self._sum(query, candidates, target, **inputs)

    def _sum(self, query: Tensor, candidates: Tensor, target: Tensor | None, **inputs: Any) -> Tensor:
        if query.shape[-1] != candidates.shape[-1] or max(self.dims) > query.shape[-1]:
            lengths = f"{query.shape[-1]} and {candidates.shape[-1]}"
            raise ValueError(f"want vectors of one length, at least {max(self.dims)} of dims, got {lengths}")
        if "return_stats" in inputs:
            raise ValueError("want no return_stats, got one: the losses of the prefixes are added")
        hard, losses = inputs.pop("hard_negatives", None), []
        for d, weight in zip(self.dims, self.weights, strict=True):
            more = inputs if hard is None else {**inputs, "hard_negatives": hard[..., :d]}
            if weight:
                losses.append(weight * self.loss(query[..., :d], candidates[..., :d], target, **more))
        return torch.stack(losses).sum(0)


class SigmoidLoss(nn.Module):
    """:func:`cosup.sigmoid_loss` with a learned temperature and bias.

    Args:
        temperature: Start of the positive divisor; its logarithm is learned, which keeps it positive.
        bias: Start of the bias.
        **options: Options of :func:`cosup.sigmoid_loss`.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, **options: Any):
        super().__init__()
        if not 0 < temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite, got {temperature}")
        self.log_temperature = nn.Parameter(torch.tensor(float(temperature)).log())
        self.bias = nn.Parameter(torch.tensor(float(bias)))
        self.options = options

    @property
    def temperature(self) -> Tensor:
        return self.log_temperature.exp()

    def forward(self, query: Tensor, candidates: Tensor, target: Tensor | None = None, *,
                query_ids: Tensor | None = None, candidate_ids: Tensor | None = None,
                sample_weight: Tensor | None = None):  # fmt: skip
        return sigmoid_loss(query, candidates, target, temperature=self.temperature, bias=self.bias,
                            query_ids=query_ids, candidate_ids=candidate_ids, sample_weight=sample_weight,
                            **self.options)  # fmt: skip


class CoSupervisionLoss(nn.Module):
    """:func:`cosup.co_supervision_loss` with its options fixed at construction."""

    def __init__(self, **options: Any):
        super().__init__()
        self.options = options

    def forward(self, hidden: Tensor, linear_weight: Tensor, labels: Tensor, query: Tensor, candidates: Tensor,
                target: Tensor | None = None, *, linear_bias: Tensor | None = None,
                candidate_ids: Tensor | None = None) -> CoSupervisionOutput:  # fmt: skip
        return co_supervision_loss(hidden, linear_weight, labels, query, candidates, target, linear_bias=linear_bias,
                                   candidate_ids=candidate_ids, **self.options)  # fmt: skip


class CandidateQueue(nn.Module):
    """The last ``size`` candidate vectors and their ids, first in, first out: negatives that cost no encoding.

        past, past_ids = queue.candidates()
        loss = info_nce(query, torch.cat([passages, past]), target, candidate_ids=torch.cat([ids, past_ids]))
        queue.enqueue(passages, ids)

    They are of earlier weights and have no gradient. Vectors, ids and the place of the next are in ``state_dict``.

    Args:
        size: Most vectors held.
        width: D.
        process_group: Each ``enqueue`` takes in the vectors of all ranks, in rank order, as many as each has: the
            queue is the same on every rank. All ranks make the same calls.
        device, dtype: Of the vectors held.

    Raises:
        ValueError: A size or width below 1.

    Source: Wang et al. 2020, arXiv:1912.06798 (cross-batch memory).
    """

    vectors: Tensor  # [size, D], those of ids -1 are empty
    ids: Tensor  # [size] int64

    def __init__(self, size: int, width: int, *, process_group: ProcessGroup | None = None, device=None, dtype=None):
        super().__init__()
        for name, value in (("size", size), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.register_buffer("vectors", torch.zeros(size, width, device=device, dtype=dtype))
        self.register_buffer("ids", torch.full((size,), -1, device=device))
        self.process_group = process_group
        self.enqueued = 0  # ever; vector number i is in row i % size

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Vectors [K, D] and ids [K] of those held, K <= size. They are views, which the next ``enqueue`` changes."""
        held = min(self.enqueued, len(self.ids))
        return self.vectors[:held], self.ids[:held]

    @torch.no_grad()
    def enqueue(self, vectors: Tensor, ids: Tensor) -> None:
        """Take in vectors [n, D] and their ids [n] int64 in place of the oldest; of more than size the last stay.

        Raises:
            ValueError: Another shape, dtype or device, named with what was wanted and what came.
        """
        size, width = self.vectors.shape
        queue = f"{self.vectors.dtype} [{size}, {width}] after {self.enqueued}"
        with agreed(self.process_group, "enqueue", {"queue": queue}):
            self._check(vectors, ids)
            counts = settle(self.process_group, len(ids))
        vectors = vectors.to(self.vectors.dtype)
        if self.process_group is not None:
            vectors, ids = (_of_all_ranks(self.process_group, t, counts[0]) for t in (vectors, ids))
        self.enqueued += len(ids)
        vectors, ids = vectors[-size:], ids[-size:]
        rows = torch.arange(self.enqueued - len(ids), self.enqueued, device=ids.device) % size
        self.vectors[rows], self.ids[rows] = vectors, ids

    def _check(self, vectors: Tensor, ids: Tensor) -> None:
        width = self.vectors.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != width or not vectors.is_floating_point():
            raise ValueError(f"vectors must be floating [n, {width}], got {vectors.dtype} {[*vectors.shape]}")
        if ids.shape != vectors.shape[:1] or ids.dtype != torch.int64:
            raise ValueError(f"ids must be int64 [{len(vectors)}], got {ids.dtype} {[*ids.shape]}")
        if {vectors.device, ids.device} != {self.ids.device}:
            raise ValueError(f"want vectors and ids on {self.ids.device}, got {vectors.device} and {ids.device}")

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.enqueued)

    def set_extra_state(self, state: Tensor) -> None:
        self.enqueued = int(state)


def _of_all_ranks(group: ProcessGroup, tensor: Tensor, counts: list[int]) -> Tensor:
    """The rows of all ranks, in rank order, so many of each."""
    padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
