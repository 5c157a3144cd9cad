"""Kernels run on the GPU where there is one, and through Triton's interpreter where there is none."""

import os

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
os.environ.setdefault("TRITON_INTERPRET", str(int(not HAS_GPU)))  # before anything imports triton
settings.register_profile("quick", max_examples=60)
settings.register_profile("nightly", max_examples=500)
settings.load_profile("quick")  # pytest --hypothesis-profile nightly asks for the other


def pytest_addoption(parser):
    parser.addoption("--all-architectures", action="store_true", help="patch every causal language model: minutes")


@pytest.fixture
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
