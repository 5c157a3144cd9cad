"""Offsets beyond 2^31 elements: rows, or features, so far apart give the same bits as side by side.

Little memory is touched. Triton's kernels run in the interpreter, whose integers wrap as those of a GPU do.
"""

import mmap

import pytest
import torch

from cosup.kernels import native, product_stats
from cosup.kernels import tile_grad as triton_grad
from cosup.kernels import tile_sigmoid as triton_sigmoid
from cosup.kernels import tile_stats as triton_stats
from cosup.kernels.product import product
from cosup.kernels.reference import ColumnState, RowState
from cosup.kernels.rows import gather, put
from cosup.kernels.target_dots import target_dots

APART = (1 << 30) + 64  # elements from one row to the next: the third is further than 32 bits can count
MAP_NORESERVE = 0x4000  # Linux's; Python names it from 3.13 on
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="memory that is not there, of a CPU")


def near(t):
    return t.clone()


def far(t, apart=APART):
    """t with its rows far apart; as much lies before them, where an offset that wraps would fall."""
    before = 1 << 31
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, (before + len(t) * apart) * t.element_size(), flags)
    return torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, (apart, 1), before).copy_(t)


def unaligned(t):
    """No descriptor can say where its rows are."""
    return far(t, APART + 1)


def features_apart(t):
    return far(t.mT).mT


TARGET, SCALE = torch.tensor([5, 7, 60]), torch.tensor(0.7)


def row_statistics(place, kernel, **options):
    state = RowState.empty(3, SCALE)
    kernel(place(torch.randn(3, 50)), state, 0, TARGET, SCALE, **options)
    return state


def column_statistics(place, kernel, **options):
    state = ColumnState.empty(50, SCALE)
    kernel(place(torch.randn(3, 50)), state, 0, TARGET, SCALE, **options)
    return state


def gradients(place, kernel, **options):
    dot, (shift, a, b) = place(torch.randn(3, 50)), torch.rand(3, 3)
    kernel(dot, dot, shift, a, b, 0, TARGET, SCALE, **options)
    return [dot]


def dots_of_targets(place):
    x, w = (place(torch.randn(3, 3).half()) for _ in range(2))
    return [target_dots(x, w, torch.tensor([2, 0, 1]), 0), target_dots(x, w, TARGET - 5, 0, torch.tensor([2, 1, 0]))]


def gathered(place):
    rows, count = torch.tensor([2, 0, 1]), torch.tensor(3, dtype=torch.int32)
    return [gather(place(torch.randn(3, 3).half()), rows, count)]


def put_back(place):
    out = torch.empty(3, 3)
    put(place(torch.randn(3, 3)), torch.tensor([2, 0, 1]), torch.tensor(3, dtype=torch.int32), out)
    return [out]


def merged_products(place):
    state, x, w = RowState.empty(3, SCALE), *(place(torch.randn(3, 3).half()) for _ in range(2))
    room = torch.empty(2 * 3 * product_stats.FIELDS)
    product_stats.product_stats(x, w, state, room, False, 0, TARGET - 5, SCALE)
    return state


def parts_of_statistics(place):
    """Each field of theirs far from the next, as in a room of many gigabytes."""
    state, part = RowState.empty(3, SCALE), place(torch.rand(product_stats.FIELDS, 2 * 3))
    product_stats._merge_kernel[(1,)](part, part.stride(0), 3, state.max, state.sum, state.dot, state.soft, state.above,
                                      3, 2, HAS_RANK=True, HAS_SOFT=True, BLOCK_R=4, BLOCK_T=2)  # fmt: skip
    return state


def counted_product(place):
    out = place(torch.zeros(3, 256))
    a, b = (place(torch.randn(3, width).half()) for width in (64, 256))
    product(a, torch.randn(64, 256).half(), out, torch.tensor(3, dtype=torch.int32), of_rows=True)
    sums = torch.zeros(64, 256)
    product(a.mT, b, sums, torch.tensor(3, dtype=torch.int32), of_rows=False)
    return [out, sums]


TILES = {
    "row statistics": (row_statistics, "tile_stats"), "column statistics": (column_statistics, "column_stats"),
    "gradients": (gradients, "tile_grad"), "sigmoid statistics": (row_statistics, "sigmoid_stats"),
    "sigmoid gradients": (gradients, "sigmoid_grad"),
}  # fmt: skip
TRITON = (triton_stats, triton_grad, triton_sigmoid)


def assert_same_bits(run, place, *arguments, **options):
    results = []
    for each in (near, place):
        torch.manual_seed(0)
        results.append([t.clone() for t in run(each, *arguments, **options)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert any(t.abs().sum() > 0 for t in results[0])


@pytest.mark.parametrize("name", TILES)
def test_tiles_in_triton(name):
    run, kernel = TILES[name]
    assert_same_bits(run, far, next(getattr(module, kernel) for module in TRITON if hasattr(module, kernel)))


@pytest.mark.parametrize("name", TILES)
@pytest.mark.parametrize("isa", native.AVAILABLE)
def test_tiles_in_native_code(name, isa):
    run, kernel = TILES[name]
    assert_same_bits(run, far, getattr(native, kernel), instruction_set=isa)


@pytest.mark.parametrize("place", [far, unaligned, features_apart])
@pytest.mark.parametrize("run", [dots_of_targets, gathered, put_back, merged_products])
def test_operands(run, place):
    assert_same_bits(run, place)


@pytest.mark.parametrize("run", [parts_of_statistics, counted_product])
def test_dense_rows(run):
    assert_same_bits(run, far)
