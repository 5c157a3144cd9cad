"""What of cosup is active on this machine, and what to do about what is not."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from typing import NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cosup import gemm
from cosup.kernels import native
from cosup.walk import LEAST_CAPABILITY, default_workspace, runs_triton

PACKAGES = ("torch", "triton", "transformers", "accelerate", "numpy")


class Finding(NamedTuple):
    name: str
    state: str
    advice: str = ""


def examine() -> list[Finding]:
    found = [_package("cosup"), Finding("python", platform.python_version())]
    found += [_package(name) for name in PACKAGES]
    found += [
        _native(),
        _gpu(),
        _triton(),
        _workspace(),
        _flash_attention("flash-attn-4", 9),
        _flash_attention("flash-attn", 8),
        _optional("faiss-cpu", "indexes are exact, by torch", "pip install 'cosup[faiss]'"),
        _optional("bm25s", "`cosup eval` and `cosup demo` need it", "pip install 'cosup[bm25]'"),
        _optional("gguf", "`cosup data smollm2` needs it", "pip install gguf"),
    ]
    return found


def show() -> None:
    table = Table(title="cosup doctor")
    for column in ("what", "state", "what to do"):
        table.add_column(column)
    for finding in examine():
        table.add_row(*(escape(text) for text in finding))
    Console().print(table)


def as_json() -> str:
    """The table as one object: {what: {"state": ..., "advice": ...}}; the advice is "" where nothing is to be done."""
    return json.dumps({name: {"state": state, "advice": advice} for name, state, advice in examine()}, indent=2)


def _package(name: str) -> Finding:
    found = version(name)
    return Finding(name, found) if found else Finding(name, "missing", f"pip install {name}")


def _optional(name: str, without: str, advice: str) -> Finding:
    found = version(name)
    return Finding(name, found) if found else Finding(name, f"not installed: {without}", advice)


def _native() -> Finding:
    if native.AVAILABLE:
        products = "oneDNN" if gemm.ONEDNN else "torch.mm"
        found = f"native, {native.AVAILABLE[-1]}, {torch.get_num_threads()} threads, float32 products by {products}"
        return Finding("CPU kernels", found)
    if native.LIBRARY is not None:
        return Finding("CPU kernels", "PyTorch path: the library runs nothing on this processor", "please report it")
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    advice = (
        "pip install --force-reinstall --no-deps . (in the clone)"
        if compiler
        else "install a C++ compiler, then reinstall cosup"
    )
    return Finding("CPU kernels", "PyTorch path: the native library is not built", advice)


def _gpu() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", "none: everything runs on the CPU", "install a torch build for your GPU, if there is one")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("GPU", ", ".join(names))


def _triton() -> Finding:
    if version("triton") is None:
        return Finding("GPU kernels", "PyTorch path: Triton is missing", "pip install triton (Linux)")
    if torch.cuda.is_available() and not runs_triton(_device()):
        least, has = (f"{major}.{minor}" for major, minor in (LEAST_CAPABILITY, torch.cuda.get_device_capability()))
        return Finding("GPU kernels", f"PyTorch path: Triton needs compute capability {least}, this GPU has {has}")
    return Finding("GPU kernels", "Triton" if torch.cuda.is_available() else "Triton, idle without a GPU")


def _workspace() -> Finding:
    device = _device()
    return Finding("workspace", f"{default_workspace(device) >> 20} MiB on {device}, if no workspace_bytes= is given")


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _flash_attention(name: str, least: int) -> Finding:
    """``least``: the major compute capability that it needs."""
    fits = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= least
    found = version(name)
    if found and not fits:
        return Finding(name, f"{found}, idle: it needs a GPU of compute capability {least}.0")
    return _optional(name, "attention is another one, or SDPA", f"pip install {name}" if fits else "")


def version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
