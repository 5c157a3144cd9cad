"""The Triton kernels compile for GPUs that are absent, spill no tile on any, and multiply on their matrix units."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

pytestmark = pytest.mark.release
TARGETS = {  # the instructions that a fused product must have
    "cuda:80": ["HMMA"],
    "cuda:90": ["HGMMA", "UTMALDG"],
    "cuda:100": ["UTCHMMA", "UTMALDG"],
    "cuda:120": ["HMMA", "UTMALDG"],
    "hip:gfx942": ["v_mfma"],
    "hip:gfx950": ["v_mfma"],
}
PROGRAM = r"""
import re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cosup.kernels import (
    product, product_stats, row_values, rows, scale, target_dots, tile_grad, tile_sigmoid, tile_stats
)

kind, arch = sys.argv[1].split(":")
target = GPUTarget("cuda", int(arch), 32) if kind == "cuda" else GPUTarget("hip", arch, 64)
INTEGERS = {**dict.fromkeys("above_ptr above_out count_ptr".split(), "*i32"),
            **dict.fromkeys("target_ptr row_id_ptr col_id_ptr rows_ptr".split(), "*i64"),
            **dict.fromkeys("softcap margin".split(), "fp32"),
            **dict.fromkeys("col0 R S D M N K ignore columns parts tiles size step_x step_w step_from".split(), "i32")}


def waits_in_loops(text):
    # instructions by which a thread waits for others, between a backward branch and where it leads
    lines = [(int(a, 16), body) for a, body in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", text)]
    found = set()
    for end, body in lines:
        start = re.search(r"BRA[^;]*0x([0-9a-f]+)", body)
        if start and int(start[1], 16) < end:
            inside = [b for a, b in lines if int(start[1], 16) <= a <= end]
            found |= {i for i in ("BAR", "SHFL", "STS") for b in inside if re.search(rf"\b{i}\b", b)}
    return found


def check(kernel, constants, types, num_warps, num_stages=3, instructions=(), alone=False):
    # alone: threads must not wait for each other in a loop, as they would for a tile of another layout
    signature = {}
    for name in kernel.arg_names:
        stride = "i64" if name.startswith("stride") or name == "out_stride_R" else "*fp32"
        signature[name] = "constexpr" if name in constants else types.get(name) or INTEGERS.get(name) or stride
    even = "x w dot_ptr out_ptr stride_x stride_w stride_R out_stride_R D".split()  # multiples of 16: tiles are padded
    aligned = [i for i, n in enumerate(kernel.arg_names) if n in even and not signature[n].startswith("tensordesc")]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})
    if kind == "hip":
        text = compiled.asm["amdgcn"]
        # memory beside registers; scalar registers are parked in lanes of vector ones
        spills = [int(n) for n in re.findall(r"(?:private_segment_fixed_size|vgpr_spill_count):\s*(\d+)", text)]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            Path(file.name).write_bytes(compiled.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
            command = [tool, "--dump-sass", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        # instructions that write or read a thread's own memory
        spills = [len(re.findall(rf"\b{i}\b", text)) for i in ("STL", "LDL")] if "EXIT" in text else []
        if alone:
            found = waits_in_loops(text)
            assert not found, f"{kernel.__name__} {constants}: {found} in a loop"
    assert spills, "no resource usage was reported"
    parked = 0 if kind == "hip" else 2  # an address that ptxas keeps there, once for a program's thousands of numbers
    if arch == "120" and product_stats.SPILLS_WIDE and spills[1] == 0:
        parked = 6  # words that Triton before 3.7 writes there and never reads
    assert max(spills) <= parked, f"{kernel.__name__} {constants}: spills {spills}"
    missing = [i for i in instructions if not re.search(rf"\b{i}", text)]
    assert not missing, f"{kernel.__name__} {constants}: no {missing}"
    print(kernel.__name__, constants, types, f"spills {spills}", *instructions)


# what a loss can ask together: nothing, linear_cross_entropy, linear_log_prob, info_nce with smoothing or a limit
TOGETHER = ("", "BIAS CAP SOFT", "BIAS CAP H", "BIAS ID SOFT COLUMNS", "BIAS ID LIMIT COLUMNS")
LANES = {"LANES": tile_stats.LANES, "UNROLL": tile_stats.UNROLL}


def having(kernel, features):
    return {n: n[4:] in features.split() for n in kernel.arg_names if n.startswith("HAS_")}


ROUNDED = (*TOGETHER[:2], TOGETHER[3])  # those that tiles of 16 bits are taken for
for features in TOGETHER:
    kinds = [("*fp32", "*fp32"), ("*fp32", "*bf16")] + [("*bf16", "*bf16")] * (features in ROUNDED)
    for dot, out in kinds + [("*fp32", "*fp16")] * (features == TOGETHER[3]):
        own, item = (" OWN", 2) if dot == "*bf16" else ("", 4)
        kernel, block = tile_grad._grad_kernel, 32 * tile_grad.WARPS * tile_grad.BLOCK_BYTES // item
        counted = " COUNT" if features == TOGETHER[0] else ""
        blocks = {"BLOCK": block, "UNROLL": tile_grad.UNROLL, "ROWS_AT_ONCE": product.ROWS_AT_ONCE}
        check(kernel, having(kernel, features + own + counted) | blocks, {"dot_ptr": dot, "out_ptr": out},
              tile_grad.WARPS)
        if dot == out:
            kernel = tile_stats._stats_kernel
            check(kernel, having(kernel, features + own + counted) | LANES | {"VEC": 16 // item}, {"dot_ptr": dot},
                  tile_stats.LANES // 32, alone=True)
    if "SOFT" not in features or features == TOGETHER[1]:
        for kernel, out in ((tile_sigmoid._sigmoid_stats_kernel, None), (tile_sigmoid._sigmoid_grad_kernel, "*fp32"),
                            (tile_sigmoid._sigmoid_grad_kernel, "*bf16"), (tile_sigmoid._sigmoid_grad_kernel, "*fp16")):
            block = {"BLOCK_S": tile_stats.BLOCK_S}
            check(kernel, having(kernel, features) | block, {"out_ptr": out}, tile_stats.WARPS)
for dot, features in (("*fp32", ""), ("*fp32", "BIAS ID CAP LIMIT"), ("*bf16", "OWN"),
                      ("*bf16", "OWN BIAS ID CAP LIMIT")):
    kernel, columns = tile_stats._column_kernel, tile_stats.COLUMN_BYTES // (4 if dot == "*fp32" else 2)
    blocks = {"GROUPS": tile_stats.GROUPS, "COLUMNS": columns}
    check(kernel, having(kernel, features) | blocks, {"dot_ptr": dot}, num_warps=tile_stats.GROUPS, alone=True)
check(tile_stats._column_merge_kernel, {"COLUMNS": 256}, {}, num_warps=4)
for skip in (False, True):
    kernel, types = row_values._row_values_kernel, {"skip_ptr": "*u8"}
    check(kernel, {"HAS_SKIP": skip, "HAS_ROWS": not skip, "BLOCK": row_values.BLOCK}, types, num_warps=4)
check(rows._targets_kernel, {"BLOCK_N": rows.BLOCK_N}, {"out_ptr": "*i64", "skip_ptr": "*u8", "good_ptr": "*u8"},
      num_warps=8)
check(rows._order_kernel, {"BLOCK_N": rows.BLOCK_N}, {"skip_ptr": "*u8", "moved_ptr": "*i64"}, num_warps=8)
for gathers, item in ((True, "*bf16"), (False, "*bf16"), (False, "*fp32")):
    blocks = {"GATHER": gathers, "ROWS_AT_ONCE": product.ROWS_AT_ONCE, "BLOCK_D": rows.BLOCK_D, "step_from": 1}
    check(rows._move_kernel, blocks, {"from_ptr": item, "to_ptr": "*bf16"}, num_warps=4)
for item in ("*fp32", "*bf16"):
    check(scale._scale_kernel, {"BLOCK": scale.BLOCK, "UNROLL": scale.UNROLL}, {"grad_ptr": item}, num_warps=4)
types = {"x_ptr": "*bf16", "w_ptr": "*bf16"}
for on in (False, True):
    check(target_dots._target_dots_kernel, {"HAS_ROWS": on, "BLOCK_D": target_dots.BLOCK_D}, types, num_warps=4)
by_descriptor = product_stats.has_descriptors(target)
cases = [("bf16", False, by_descriptor), ("bf16", True, by_descriptor), ("fp16", False, by_descriptor)]
for item, on, descriptors in cases + ([("bf16", True, False)] if by_descriptor else []):
    kernel, tile = product_stats._product_stats_kernel, product_stats.tile_for(target, on)
    blocks = tile._asdict() | {"COLS": product_stats.COLUMNS}
    options = {n: blocks.pop(n) for n in ("num_warps", "num_stages")}
    flags = {n: on for n in kernel.arg_names if n.startswith("HAS_")}
    rows = {"x": tile.BLOCK_R, "w": tile.BLOCK_S}
    operands = {n: f"tensordesc<{item}[{rows[n]},{tile.BLOCK_D}]>" if descriptors else f"*{item}" for n in rows}
    check(kernel, {**flags, **blocks, "TMA": descriptors, "step_x": 1, "step_w": 1}, operands, **options,
          instructions=[i for i in sys.argv[2:] if descriptors or i != "UTMALDG"])
if kind == "cuda" and int(arch) == 90:  # the one that counts rows: logits, gradients of rows and of columns, sums
    for of_rows, a_in_columns, b_in_columns, out, add in (
        (True, False, True, "bf16", False), (True, False, True, "fp32", False), (True, False, False, "bf16", False),
        (True, False, False, "fp32", True), (False, True, False, "bf16", False), (False, True, False, "fp32", True),
    ):
        for tile in (product.WIDE, product.NARROW):
            blocks = tile._asdict()
            options = {n: blocks.pop(n) for n in ("num_warps", "num_stages")}
            flags = {"OF_ROWS": of_rows, "A_IN_COLUMNS": a_in_columns, "B_IN_COLUMNS": b_in_columns, "ADD": add,
                     "REDUCE": True}
            a, b = [tile.BLOCK_M, tile.BLOCK_K], [tile.BLOCK_K, tile.BLOCK_N]
            a, b = a[::-1] if a_in_columns else a, b[::-1] if b_in_columns else b
            operands = {"a": f"tensordesc<bf16{a}>", "b": f"tensordesc<bf16{b}>",
                        "out": f"tensordesc<{out}{[tile.BLOCK_M, tile.BLOCK_N // 2]}>"}
            check(product._product_kernel, flags | blocks, {n: t.replace(" ", "") for n, t in operands.items()},
                  **options, instructions=["HGMMA", "UTMALDG", "UTMAREDG" if add else "UTMASTG"])
blocks = {"BLOCK_R": product_stats.MERGED_ROWS, "BLOCK_T": product_stats.MERGED_TILES}
for on in (False, True):
    check(product_stats._merge_kernel, {"HAS_RANK": on, "HAS_SOFT": on, **blocks}, {}, num_warps=4)
"""


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    """The program's runs for all targets that are asked, as many at once as there are processors."""
    asked = [item.callspec.params["target"] for item in request.session.items if item.module is request.module]

    def run(target):
        folder = tmp_path_factory.mktemp(target.replace(":", ""))
        environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
        command = [sys.executable, "-c", PROGRAM, target, *TARGETS[target]]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(asked, pool.map(run, asked), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, runs):
    run = runs[target]
    assert run.returncode == 0, run.stderr[-3000:]
    products = {"cuda:90": 13, "cuda:80": 0, "hip:gfx942": 0, "hip:gfx950": 0}.get(target, 1)  # by descriptor
    assert run.stdout.count("spills [") == 59 + products
    assert run.stdout.count(TARGETS[target][0]) >= 3
