"""info_nce over processes: the time of a step, measured and by the cost model of docs/info_nce.md, in both layouts.

python bench/ranks.py [--ranks 1 2 4] [--rows 2048 8192 256] [--symmetric]

Every rank has as many queries and candidates. Two rates are measured in the same run, by as many processes at once:

    F   FLOP per second of a rank, by the engine's products alone in the blocks of its plan
    E   logits per second of a rank, by the tile kernels alone
    B   bytes per second that come in at a rank, by the collectives of the layout alone

and the model says: seconds = FLOP / F + logits / E + bytes / B, with nothing overlapped.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from cosup import info_nce
from cosup.agreement import settle
from cosup.bench import report
from cosup.bench.gemms import engine_gemms
from cosup.bench.measure import peak_bytes
from cosup.distributed import Peers, gather
from cosup.kernels.reference import ColumnState, RowState
from cosup.plan import Plan, plan
from cosup.walk import cost, default_workspace, resolve, tile_kernels


def model(n: int, m: int, d: int, world: int, item: int, layout: str, symmetric: bool) -> tuple[float, float]:
    """FLOP, and bytes that come in, of a rank's step with n queries and m candidates of its own."""
    sweeps = 4 if layout == "ring" or (symmetric and world > 1) else 3
    flop = sweeps * 2.0 * n * m * world * d
    others = world - 1
    if layout == "all_gather":  # candidates, their gradients; statistics by all-reduce: twice around
        return flop, 2.0 * others * m * d * item + symmetric * 4.0 * 8 * others * m
    return flop, others * (3.0 * m * d * item + symmetric * 4.0 * 6 * m)  # candidates in both sweeps


def run(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser("cosup bench ranks", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--ranks", type=report.positive, nargs="+", default=[1, 2, 4],
                        help="numbers of processes (%(default)s)")  # fmt: skip
    parser.add_argument("--rows", type=report.positive, nargs=3, default=[2048, 8192, 256], metavar=("N", "M", "D"),
                        help="queries, candidates (at least as many), width, of all ranks (%(default)s)")  # fmt: skip
    parser.add_argument("--symmetric", action="store_true", help="both directions")
    parser.add_argument("--rounds", type=report.positive, default=5, help="of which the quickest counts (%(default)s)")
    args = parser.parse_args(arguments)
    if args.rows[0] > args.rows[1]:
        parser.error(f"--rows: wanted at least as many candidates as queries, got {args.rows}")
    title, saved = "ranks" + "_symmetric" * args.symmetric, {}
    records: list[dict[str, Any]] = []
    for world in args.ranks:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        results = mp.get_context("forkserver").SimpleQueue()
        mp.start_processes(_rank, (world, port, vars(args), results), nprocs=world, start_method="forkserver")
        size = {"ranks": world, **dict(zip("NMD", args.rows, strict=True)), "symmetric": args.symmetric}
        rows = [results.get() for _ in range(2 if world > 1 else 1)]
        records.append({"size": size, "rows": rows, "absent": {}})
        report.show(title, records[-1], "cpu")
        saved = report.save(title, records, "cpu")
    return saved


def _rank(rank: int, world: int, port: int, args: dict[str, Any], results: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    (n, m, d), symmetric = args["rows"], args["symmetric"]
    q, c = (F.normalize(torch.randn(k, d)).requires_grad_() for k in (n, m))
    for layout in ["all_gather", "ring"] if world > 1 else ["all_gather"]:
        def step(layout: str = layout) -> tuple[torch.Tensor, ...]:
            loss = info_nce(q, c, normalize=False, symmetric=symmetric, process_group=dist.group.WORLD, layout=layout)
            return torch.autograd.grad(loss, (q, c))

        flop, wire = model(n, m, d, world, q.element_size(), layout, symmetric)
        table = c.detach() if layout == "ring" else c.detach().repeat(world, 1)
        budget = default_workspace(q.device)
        backend = resolve("auto", q)
        blocks = plan(n, len(table), cost(q, backend, gathered=False, symmetric=symmetric), grads=True,
                      weights_known=layout == "all_gather", workspace_bytes=budget)  # fmt: skip
        sweeps = round(flop / (2.0 * n * m * world * d)) - 2
        products = world if layout == "ring" else 1

        of_products: tuple[Any, ...] = (q.detach(), table, blocks, backend, sweeps)

        def multiply(times: int = products, arguments: tuple[Any, ...] = of_products) -> None:
            for _ in range(times):
                engine_gemms(*arguments)

        passes: dict[str, Callable[[], object]] = {
            "step": step,
            "products": multiply,
            "tiles": partial(_visit_tiles, n, len(table), blocks, symmetric, products),
            "wire": partial(_wire, c.detach(), layout, world),
        }
        times: dict[str, list[float]] = {name: [] for name in passes}
        for _ in range(1 + args["rounds"]):
            for name, run in passes.items():
                dist.barrier()
                start = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - start)
        seconds = {name: statistics.median(found[1:]) for name, found in times.items()}
        memory = torch.tensor(float(peak_bytes(step)))
        dist.all_reduce(memory, dist.ReduceOp.MAX)
        found = [None] * world
        dist.all_gather_object(found, seconds)
        if rank == 0:
            mean = {name: statistics.mean(s[name] for s in found) for name in seconds}  # type: ignore[index]
            results.put({
                "method": layout, "failed": None, "step_seconds": [mean["step"]],
                "model_seconds": mean["products"] + mean["tiles"] + (mean["wire"] if wire else 0.0),
                "step_bytes": int(memory), "FLOP": flop, "wire_bytes": wire, "FLOP_per_second": flop / mean["products"],
                "logits_per_second": n * m * world / mean["tiles"],
                "bytes_per_second": wire / mean["wire"] if wire else None,
            })  # fmt: skip
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that unwinds


def _visit_tiles(n: int, m: int, blocks: Plan, symmetric: bool, times: int) -> None:
    """What the tile kernels do in a step, without its products."""
    x = torch.empty(0, 1)
    kernels, scale = tile_kernels(resolve("auto", x), x), torch.ones(())
    tile = torch.zeros(blocks.block_rows, blocks.strip_cols)
    target, weight = torch.zeros(blocks.block_rows, dtype=torch.int64), torch.ones(blocks.block_rows)
    rows = RowState.empty(blocks.block_rows, scale)
    columns = ColumnState.empty(blocks.strip_cols, scale)
    columns.max.zero_()
    rows.max.zero_()
    of_columns = (None, 0.0, None, None, None, columns.max, columns.sum) if symmetric else ()
    for _ in range(times * n * m // tile.numel()):
        kernels.tile_stats(tile, rows, 0, target, scale)
        if symmetric:
            kernels.column_stats(tile, columns, 0, target, scale)
        kernels.tile_grad(tile, tile, rows.max, weight, weight, 0, target, scale, None, None, None, 0.0, *of_columns)


def _wire(c: torch.Tensor, layout: str, world: int) -> None:
    """What a step sends, without what it computes."""
    group = dist.group.WORLD
    assert group is not None
    if layout == "all_gather":
        everyone = gather(c, [len(c)] * world, group)
        parts = torch.empty(world * len(c), c.shape[1])
        dist.all_to_all_single(parts, everyone, [len(c)] * world, [len(c)] * world, group=group)
        return
    peers = Peers(group.group_name, settle(group, len(c))[0])
    for _ in range(2):
        for _ in range(world - 1):
            peers.swap([c], (peers.rank + 1) % world, [torch.empty_like(c)], (peers.rank - 1) % world).wait()
    for step in range(1, world):
        peers.swap([c], (peers.rank - step) % world, [torch.empty_like(c)], (peers.rank + step) % world).wait()


if __name__ == "__main__":
    run()
