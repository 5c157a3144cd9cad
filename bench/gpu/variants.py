"""Stages about the tile kernels, alone: those of cosup, others beside them, and a search of their sizes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product as combinations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from cosup.bench.gpu import prototypes
from cosup.bench.gpu.recorder import Found, Recorder, off
from cosup.files import write_text
from cosup.kernels import product, rows, scale, tile_grad, tile_stats
from cosup.kernels.reference import ColumnState, RowState
from cosup.kernels.target_dots import target_dots

SHAPE, SMALL = (8192, 4096, 128256), (16, 64, 256)  # rows, features, columns


class _Tile(NamedTuple):
    """A tile of logits, and what kernels ask of its rows."""

    x: Tensor
    w: Tensor
    z: Tensor
    target: Tensor
    one: Tensor
    weight: Tensor
    state: RowState


def _tile(stage: Recorder, dtype: torch.dtype) -> _Tile:
    """16-bit ones are float16 in the interpreter, which is wrong for bfloat16."""
    n, d, v = SMALL if stage.small else SHAPE
    narrow = torch.float16 if stage.small else torch.bfloat16
    dtype = dtype if dtype == torch.float32 else narrow
    torch.manual_seed(0)
    x, w = (torch.randn(k, d, device=stage.device).to(narrow) for k in (n, v))
    z = (2 * torch.randn(n, v, device=stage.device)).to(dtype)
    one = torch.ones((), device=stage.device)
    target = torch.randint(v, (n,), device=stage.device)
    t = _Tile(x, w, z, target, one, torch.full((n,), 1 / n, device=stage.device), RowState.empty(n, one))
    tile_stats.tile_stats(t.z, t.state, 0, t.target, t.one)
    return t


def _runs(t: _Tile) -> Iterator[tuple[str, Callable[[], object], int]]:
    """Name, call and bytes of cosup's kernels over a tile."""
    n, v = t.z.shape
    size = t.z.element_size()
    columns = ColumnState.empty(v, t.one)
    yield "statistics of rows", lambda: tile_stats.tile_stats(t.z, t.state, 0, t.target, t.one), n * v * size
    yield "statistics of columns", lambda: tile_stats.column_stats(t.z, columns, 0, t.target, t.one), n * v * size
    out = t.z.view(t.x.dtype)[:, :v]  # in place: from the second call on it reads what it wrote, in the same time
    shift = t.state.max
    yield ("coefficients", lambda: tile_grad.tile_grad(t.z, out, shift, t.weight, t.weight, 0, t.target, t.one),
           n * v * (size + 2))  # fmt: skip


def kernels(stage: Recorder) -> None:
    """Bytes a second of each: at a copy's rate it is as good as it gets."""
    for dtype in (torch.float32, torch.bfloat16):
        t = _tile(stage, dtype)
        for name, run, size in _runs(t):
            stage.figure(f"{name}, {dtype}", partial(_rate, stage, run, size))
    t = _tile(stage, torch.bfloat16)
    for number in (1.0, 0.5):
        factor = torch.tensor(number, device=stage.device)
        run = partial(scale.scale, t.w, factor)
        stage.figure(f"gradient times {number}", partial(_rate, stage, run, 4 * t.w.numel() * (number != 1)))
    skip = torch.rand(len(t.x), device=stage.device) < 0.5
    found, _, count = rows.order(skip, t.target)
    stage.figure("order", partial(_rate, stage, partial(rows.order, skip, t.target), 0))
    stage.figure("gather", partial(_rate, stage, partial(rows.gather, t.x, found, count), 2 * t.x.numel()))
    run = partial(target_dots, t.x, t.w, t.target, 0)
    stage.figure("targets' products", partial(_rate, stage, run, 4 * t.x.numel()))


def variants(stage: Recorder) -> None:
    """Each is checked before it is timed."""
    t = _tile(stage, torch.bfloat16)
    processors = 2 if stage.small else torch.cuda.get_device_properties(0).multi_processor_count
    for lanes, unroll in ((512, 4), (1024, 2), (256, 4)):
        run = partial(_row_loss_and_grad, stage, t, programs=processors, lanes=lanes, unroll=unroll)
        stage.figure(f"row_loss_and_grad, {lanes} lanes x {unroll}", run)
    z = torch.empty_like(t.z)
    bare = stage.figure("cuBLAS", lambda: stage.timed(lambda: torch.mm(t.x, t.w.mT, out=z)))
    for width, group in ((256, 8), (256, 16), (128, 8)):
        sizes = {"block_rows": 128, "block_cols": width, "group": group, "programs": processors}
        stage.figure(f"gemm_stats, {sizes}", partial(_gemm_stats, stage, t, z, bare, **sizes))


def _row_loss_and_grad(stage: Recorder, t: _Tile, **sizes: int) -> Found:
    z, lse = t.z.clone(), torch.empty(len(t.z), device=stage.device)
    run = partial(prototypes.row_loss_and_grad, z, lse, t.target, t.weight, t.one, **sizes)
    run()
    logits = t.z[:64].double()
    true = logits.softmax(1)
    true[torch.arange(len(true), device=stage.device), t.target[:64]] -= 1
    errors = [off(z[:64] * len(z), true), off(lse[:64], logits.logsumexp(1))]
    wrong = int(not (errors[0] < 4e-3 and errors[1] < 1e-6))
    return _rate(stage, run, 4 * z.numel()) | {"errors": errors, "wrong": wrong}


def _gemm_stats(stage: Recorder, t: _Tile, z: Tensor, bare: Found, **sizes: int) -> Found:
    run = partial(prototypes.gemm_stats, t.x, t.w, z, t.one, **sizes)
    lse = run()
    errors = [off(z[:64], t.x[:64].double() @ t.w.double().mT), off(lse[:64], z[:64].double().logsumexp(1))]
    found = stage.timed(run)
    wrong = int(not (errors[0] < 4e-3 and errors[1] < 1e-5))
    return found | {"of_cuBLAS": bare["ms"] / found["ms"], "errors": errors, "wrong": wrong}


def _rate(stage: Recorder, run: Callable[[], object], size: int) -> Found:
    found = stage.timed(run)
    return found | ({"TB_s": size / found["ms"] / 1e9} if size else {})


# ---- a search

GRIDS: dict[str, tuple[ModuleType, dict[str, tuple[Any, ...]]]] = {
    "rows": (tile_stats, {"LANES": (64, 128, 256), "UNROLL": (1, 2, 4)}),
    "gradient": (tile_grad, {"WARPS": (4, 8, 16), "UNROLL": (1, 2, 4)}),
    "columns": (tile_stats, {"GROUPS": (4, 8), "COLUMN_BYTES": (256, 512), "COLUMN_PROGRAMS": (528, 1056, 2112)}),
}
TILES = [product.Tile(128, width, deep, group, 8, stages)
         for width, deep, group, stages in combinations((128, 256), (64, 128), (4, 8, 16), (2, 3, 4))]  # fmt: skip


def tune(stage: Recorder, what: str) -> None:
    """Every size of a grid on both kinds of tile; the best of each into tuned.json, and nothing into the sources."""
    best = dict(_best_tiles(stage) if what == "product" else _best_sizes(stage, what))
    for name, sizes in best.items():
        stage.line(f"best, {name}", **sizes)
    path = Path(stage.path).with_name("tuned.json")
    known = json.loads(path.read_text()) if path.exists() else {}
    write_text(path, json.dumps(known | {what: best}, indent=1) + "\n")


def _best_sizes(stage: Recorder, what: str) -> Iterator[tuple[str, Found]]:
    module, grid = GRIDS[what]
    place = {"rows": 0, "columns": 1, "gradient": 2}[what]
    for dtype in (torch.float32, torch.bfloat16):
        t = _tile(stage, dtype)
        _, run, size = list(_runs(t))[place]
        found = []
        for values in list(combinations(*grid.values()))[:: 4 if stage.small else 1]:
            sizes = dict(zip(grid, values, strict=True))
            with patch.multiple(module, **sizes):
                rate = stage.figure(str(sizes), partial(_rate, stage, run, size), False, dtype=str(dtype))
            found.append(rate | sizes)
        yield str(dtype), min((f for f in found if "ms" in f), key=lambda f: f["ms"])


def _best_tiles(stage: Recorder) -> Iterator[tuple[str, Found]]:
    """Of the counted products, all rows counted."""
    n, d, v = SMALL if stage.small else SHAPE
    t = _tile(stage, torch.bfloat16)
    count = torch.tensor(n, dtype=torch.int32, device=stage.device)
    dx, dw = torch.empty_like(t.x), torch.empty_like(t.w)
    runs = {"z": partial(product.product, t.x, t.w.mT, t.z, count, of_rows=True),
            "dx": partial(product.product, t.z, t.w, dx, count, of_rows=True),
            "dw": partial(product.product, t.z.mT, t.x, dw, count, of_rows=False)}  # fmt: skip
    for name, run in runs.items():
        found = []
        for tile in TILES[:: 12 if stage.small else 1]:
            with patch.object(product, "tile_for", lambda *_, tile=tile: tile):
                ms = stage.figure(f"{name}, {tile}", lambda run=run: {"ms": stage.timed(run, 1)["ms"]}, False)
            found.append(ms | tile._asdict())
        yield name, min((f for f in found if "ms" in f), key=lambda f: f["ms"])
