"""The upstream gradient's factor, on the device: exact, and nothing at all where it is 1."""

import math

import pytest
import torch

from cosup.kernels import reference
from cosup.kernels import scale as module
from cosup.kernels.scale import BLOCK, UNROLL, scale


@pytest.mark.parametrize("size", [0, 1, 5000, BLOCK * UNROLL, 5 * BLOCK * UNROLL + 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_each_element_is_multiplied_once(size, dtype, device, monkeypatch):
    monkeypatch.setattr(module, "PROGRAMS", 2)  # which then take several parts each
    wide = torch.promote_types(dtype, torch.float32)
    grad, factor = torch.randn(size, dtype=dtype, device=device), torch.tensor(1 / 3, dtype=wide, device=device)
    room = torch.full((size + 8,), 7.0, dtype=dtype, device=device)
    room[:size] = grad
    scale(room[:size], factor)
    assert torch.equal(room[:size], (grad.to(wide) * factor).to(dtype))  # the factor is not rounded to 16 bits
    assert (room[size:] == 7).all()


@pytest.mark.parametrize("scale", [scale, reference.scale])
@pytest.mark.parametrize("grad, factor", [(0.0, math.inf), (0.0, math.nan), (math.inf, 0.0), (math.nan, 0.0)])
def test_nothing_times_anything_is_nothing(grad, factor, scale, device):
    tensor = torch.tensor([grad, 1.0], dtype=torch.float16, device=device)
    scale(tensor, torch.tensor(factor, device=device))
    assert tensor[0] == 0 and (not tensor[1].isfinite() if grad == 0 else tensor[1] == 0)


def test_a_factor_of_one_changes_no_bit(device):
    grad = torch.randn(5000, device=device).half()
    grad[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    grad.view(torch.int16)[3] = 0x7D01  # a NaN that any arithmetic would change
    before = grad.view(torch.int16).clone()
    scale(grad, torch.ones((), device=device))
    assert torch.equal(grad.view(torch.int16), before)
