"""The tensors of a linear layer's loss, checked under the names that the other library gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from cosup.checks import autocast, check_pair, check_vector


def check_tensors(names: tuple[str, str, str], input: Tensor, linear_weight: Tensor, target: Tensor,
                  bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """``input``, ``linear_weight`` and ``bias`` as autocast has them. ``names``: of the first three.

    Raises:
        ValueError: A wrong shape, dtype or device, named with what was wanted and what came.
    """
    for name, tensor in (*zip(names, (input, linear_weight, target), strict=True), ("bias", bias)):
        if not isinstance(tensor, Tensor) and not (name == "bias" and tensor is None):
            raise ValueError(f"{name} must be a tensor, got {tensor!r}")
    if not input.ndim:
        raise ValueError(f"{names[0]} must be [..., D], got a scalar")
    input, linear_weight, bias = autocast(input, linear_weight, bias)
    check_pair(names[0], input, names[1], linear_weight)
    check_vector(names[2], target, input.shape[:-1], input.device, torch.int64)
    if bias is not None:
        check_vector("bias", bias, linear_weight.shape[:1], input.device, None)
    return input, linear_weight, bias
