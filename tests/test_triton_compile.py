"""The Triton kernels compile for GPUs that are absent, and spill no register on any of them."""

import os
import subprocess
import sys

import pytest

TARGETS = ["cuda:80", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942", "hip:gfx950"]
PROGRAM = r"""
import re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cosup.kernels import tile_grad, tile_stats

kind, arch = sys.argv[1].split(":")
target = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
TYPES = {"stride_R": "i64", "out_stride_R": "i64", "above_ptr": "*i32", "target_ptr": "*i64", "row_id_ptr": "*i64",
         "col_id_ptr": "*i64", "col0": "i32", "S": "i32", "softcap": "fp32"}
CASES = [(tile_stats._stats_kernel, "*fp32"), (tile_grad._grad_kernel, "*fp32"), (tile_grad._grad_kernel, "*bf16"),
         (tile_grad._grad_kernel, "*fp16")]
for kernel, out in CASES:
    for on in (False, True):
        constants = {n: on for n in kernel.arg_names if n.startswith("HAS_")} | {"BLOCK_S": tile_stats.BLOCK_S}
        signature = {n: "constexpr" if n in constants else out if n == "out_ptr" else TYPES.get(n, "*fp32")
                     for n in kernel.arg_names}
        source = ASTSource(kernel, signature, constants, {(0,): [["tt.divisibility", 16]]})
        compiled = triton.compile(source, target=target, options={"num_warps": tile_stats.WARPS})
        if kind == "hip":
            spills = [int(n) for n in re.findall(r"[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])]
        else:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                Path(file.name).write_bytes(compiled.asm["cubin"])
                tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
                command = [tool, "--dump-resource-usage", file.name]
                usage = subprocess.run(command, capture_output=True, text=True, check=True)
            spills = [int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage.stdout)]
        assert spills, "no resource usage was reported"
        assert not any(spills), f"{kernel.__name__} {out} features={on}: spills {spills}"
        print(kernel.__name__, out, on, "no spills")
"""


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", PROGRAM, target], env=environment, capture_output=True, text=True,
                         cwd=tmp_path)  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("no spills") == 8
