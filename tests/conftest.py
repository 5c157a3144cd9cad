"""Kernels run on the GPU where there is one, and through Triton's interpreter where there is none."""

import gc
import multiprocessing
import os

import pytest
import torch
from hypothesis import settings

HAS_GPU = torch.cuda.is_available()
os.environ.setdefault("TRITON_INTERPRET", str(int(not HAS_GPU)))  # before anything imports triton
if os.environ["TRITON_INTERPRET"] == "1":
    import interpreter

    interpreter.patch_once_a_launch()
# What tests do in several processes: these are forked from one that has imported it.
multiprocessing.set_forkserver_preload(["cosup.bench.gpu.preload", "torch.distributed.tensor", "transformers.trainer"])
settings.register_profile("quick", max_examples=60)
settings.register_profile("nightly", max_examples=500)
settings.load_profile("quick")  # pytest --hypothesis-profile nightly asks for the other


def pytest_addoption(parser):
    parser.addoption("--all-architectures", action="store_true", help="patch every causal language model: minutes")


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: each collection of the garbage would look through it all, 0.2 s of a test


@pytest.fixture
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
