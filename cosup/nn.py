"""The losses as modules: the same arguments, options at construction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cosup.losses import CoSupervisionOutput, co_supervision_loss, info_nce, linear_cross_entropy


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

    def forward(self, query: Tensor, candidates: Tensor, target: Tensor | None = None, *,
                query_ids: Tensor | None = None, candidate_ids: Tensor | None = None):  # fmt: skip
        return info_nce(query, candidates, target, temperature=self.temperature, query_ids=query_ids,
                        candidate_ids=candidate_ids, **self.options)  # fmt: skip


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
