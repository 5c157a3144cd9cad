"""What each process of test_distributed.py runs: the loss over its part of the head, against the loss over it all."""

import itertools
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cosup import co_supervision_loss, gemm, info_nce, linear_cross_entropy, linear_log_prob, plan, sigmoid_loss, walk
from cosup.bench.measure import peak_bytes

N, D, V = 41, 7, 90
SPLITS = {2: [64, 26], 3: [70, 1, 19]}  # of the head's rows


def run(check, world, seconds=30):
    """Run ``check(rank, world)`` in so many processes, which wait so long at most; an error in any is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        given = check, world, f"{folder}/store", seconds
        mp.start_processes(_process, given, nprocs=world, start_method="forkserver")


def run_script(path, world, *arguments):
    """Run a script in its folder in so many processes, which are told what they are as torchrun does it."""
    given = str(path), world, _free_port(), arguments
    mp.start_processes(_script, given, nprocs=world, start_method="forkserver")


class Started:
    """So many processes, told what they are as torchrun does it, for one task after the other."""

    def __init__(self, world):
        context, port = multiprocessing.get_context("forkserver"), _free_port()
        self.ends, others = zip(*(context.Pipe() for _ in range(world)), strict=True)
        self.processes = [context.Process(target=_serve, args=(rank, world, port, end), daemon=True)
                          for rank, end in enumerate(others)]  # fmt: skip
        for process, end in zip(self.processes, others, strict=True):
            process.start()
            end.close()

    def run(self, task, *arguments, seconds=60):
        """``task(*arguments)`` in each; an error in any is raised here, and ends all."""
        for end in self.ends:
            end.send((task, arguments))
        for rank, end in enumerate(self.ends):
            error = "it has no end" if not end.poll(seconds) else end.recv()
            if error is not None:
                self.end()
                raise RuntimeError(f"rank {rank}: {error}")

    @property
    def is_alive(self):
        return all(process.is_alive() for process in self.processes)

    def end(self):
        for process in self.processes:
            process.kill()
            process.join()


def _free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _be_rank(rank, world, port):
    torch.set_num_threads(1)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, world, world, "localhost", port)), strict=True))


def _serve(rank, world, port, end):
    _be_rank(rank, world, port)
    environment = dict(os.environ)
    while True:
        task, arguments = end.recv()
        try:
            task(*arguments)
        except Exception:
            end.send(traceback.format_exc())
        else:
            end.send(None)
        os.environ.clear()  # a trainer that shards says so there, to all that come after
        os.environ.update(environment)


def _script(rank, path, world, port, arguments):
    _be_rank(rank, world, port)
    sys.argv = [path, *map(str, arguments)]
    os.chdir(Path(path).parent)
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


def _process(rank, check, world, path, seconds):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world,
                            timeout=timedelta(seconds=seconds))  # fmt: skip
    check(rank, world)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that unwinds


def problem(dtype=torch.float64):
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, dtype=dtype) for s in ((N, D), (V, D), (V,)))
    target = torch.randint(30, (N,))  # the last ranks hold no target
    target[:3] = torch.tensor([V - 1, 75, 70])
    target[1::4] = -100
    return x, w, b, target, torch.rand(V, dtype=dtype)


def vocabulary_parallel_equals_one_process(rank, world):
    x, w, b, target, weight = problem()
    part = torch.arange(V).split(SPLITS[world])[rank]
    features = [
        {},
        {"label_smoothing": 0.2, "z_loss": 0.1, "logit_softcap": 3.0},
        {"weight": weight, "label_smoothing": 0.1},
    ]
    plan.SLAB_HEIGHT, walk.LEAST_ROWS["cpu"] = 1, 8
    budgets = [None, 60_000, 20_000]  # all rows at once; blocks of them; slabs of columns: the least of all ranks
    for options, reduction, budget in itertools.product(features, ["mean", "sum", "none"], budgets):
        results = []
        for rows, group in ((slice(None), None), (part, dist.group.WORLD)):
            tensors = [t.clone().requires_grad_() for t in (x, w[rows], b[rows])]
            split = {k: v[rows] if k == "weight" else v for k, v in options.items()}
            loss, stats = linear_cross_entropy(tensors[0], tensors[1], target, linear_bias=tensors[2], **split,
                                               reduction=reduction, return_stats=True, process_group=group,
                                               workspace_bytes=budget and budget << rank)  # fmt: skip
            up = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
            dx, dw, db = torch.autograd.grad(loss, tensors, up)
            results.append((loss, *stats, dx, *((dw[part], db[part]) if group is None else (dw, db))))
        torch.testing.assert_close(*results)


def a_budget_that_nobody_gave_is_not_refused(rank, world):
    """However little memory is free on a rank; and one that was given is."""
    x, w, _, target, _ = problem()
    part = torch.arange(V).split(SPLITS[world])[rank]
    want = linear_cross_entropy(x, w, target)
    walk.set_default_workspace(x.device, 100 << rank)
    loss = linear_cross_entropy(x, w[part].requires_grad_(), target, process_group=dist.group.WORLD)
    torch.testing.assert_close(loss, want)
    try:
        linear_cross_entropy(x, w[part], target, process_group=dist.group.WORLD, workspace_bytes=100 if rank else None)
    except ValueError as error:
        assert "workspace_bytes must be at least" in str(error)
        return
    raise AssertionError("a budget that was given was exceeded")


def log_prob_over_ranks(rank, world):
    x, w, b, target, _ = problem()
    part = torch.arange(V).split(SPLITS[world])[rank]
    results = []
    for rows, group in ((slice(None), None), (part, dist.group.WORLD)):
        tensors = [t.clone().requires_grad_() for t in (x, w[rows])]
        low_rank = [torch.ones(2, D, dtype=x.dtype).requires_grad_(), w[rows, :2].clone().requires_grad_()]
        stats = linear_log_prob(*tensors, target, linear_bias=b[rows], temperature=0.7, lora=(*low_rank, 0.5),
                                process_group=group)  # fmt: skip
        loss = (stats.log_prob + stats.entropy.square()).sum()
        dx, dw, da, db = torch.autograd.grad(loss, (*tensors, *low_rank))
        results.append((*stats, dx, da, *((dw[part], db[part]) if group is None else (dw, db))))
    torch.testing.assert_close(*results)


def sixteen_bits_and_compile(rank, world):
    x, w, b, target, _ = problem(torch.bfloat16)
    part = torch.arange(V).split(SPLITS[world])[rank]
    x, w_part = x.requires_grad_(), w[part].requires_grad_()

    def loss(x, w):
        return linear_cross_entropy(x, w, target, label_smoothing=0.1, process_group=dist.group.WORLD)

    whole = linear_cross_entropy(x, w, target, label_smoothing=0.1)
    (want,) = torch.autograd.grad(whole, x)
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(x, w_part)
        torch.testing.assert_close(value, whole)
        torch.testing.assert_close(torch.autograd.grad(value, x)[0], want, rtol=0.02, atol=1e-4)


def bad_parts_are_refused(rank, world):
    x, w, _, target, _ = problem()
    part = torch.arange(V).split([V, 0])[rank]
    for table, labels, error, words in (
        (w[part], target, ValueError, "rows on every rank of process_group, got [90, 0]"),
        (w[:40], target + 80, IndexError, "target must be in [0, 80), got"),
        (distribute_tensor(w, init_device_mesh("cpu", (world,)), [Shard(0)]), target, ValueError, "got a DTensor"),
    ):
        try:
            linear_cross_entropy(x, table, labels, process_group=dist.group.WORLD, ignore_index=-20)
        except error as raised:
            assert words in str(raised), raised
        else:
            raise AssertionError(f"no {error.__name__}")


QUERIES = {1: [5], 2: [4, 3], 3: [4, 0, 3], 4: [3, 0, 2, 0]}  # of each rank: some have none
CANDIDATES = {1: [9], 2: [6, 3], 3: [6, 2, 3], 4: [5, 4, 2, 0]}  # and one has no candidate either


def contrastive_equals_one_process(rank, world):
    """gather="exact": loss, statistics and gradients of what is here are those of one process with the rows of all."""
    n, m = QUERIES[world], CANDIDATES[world]
    torch.manual_seed(0)
    q, c, h, b = (torch.randn(*s, dtype=torch.float64) for s in ((sum(n), 7), (sum(m), 7), (sum(n), 2, 7), (sum(m),)))
    temperature, weight, ids = torch.tensor(0.3, dtype=torch.float64), torch.rand(sum(n)), torch.randint(8, (sum(m),))
    target = torch.cat([torch.randperm(k)[:i] for i, k in zip(n, m, strict=True)])
    starts = torch.tensor([0, *m]).cumsum(0)[:-1].repeat_interleave(torch.tensor(n))
    mine = [slice(sum(k[:rank]), sum(k[: rank + 1])) for k in (n, m)]
    features = [{}, {"sample_weight": weight, "candidate_ids": ids, "candidate_bias": b, "label_smoothing": 0.1},
                {"hard_negatives": h, "margin": 0.1}, {"false_negative_margin": 0.1},
                {"candidate_ids": ids, "query_negatives": True, "candidate_negatives": True},
                {"candidate_ids": ids, "query_ids": torch.randint(10, (sum(n),)), "positives": "ids"}]  # fmt: skip
    of_query = {"sample_weight", "hard_negatives", "query_ids"}
    reductions, layouts = ["mean", "sum", "none"], ["all_gather", "ring"]
    for options, symmetric, reduction, layout in itertools.product(features, [False, True], reductions, layouts):
        if {"positives", "query_negatives"} & set(options) and (symmetric or layout == "ring"):
            continue
        results = []
        for here, group in (((slice(None), slice(None)), None), (mine, dist.group.WORLD)):
            parts = {k: v[here[k not in of_query]] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            names = [name for name, v in parts.items() if isinstance(v, torch.Tensor) and v.is_floating_point()]
            inputs = (q[here[0]], c[here[1]], *(parts[k] for k in names), temperature)
            tensors = [t.clone().requires_grad_() for t in inputs]
            given = parts | dict(zip(names, tensors[2:-1], strict=True))
            own = target + starts if group is None else target[mine[0]]
            loss, stats = info_nce(tensors[0], tensors[1], None if "positives" in options else own,
                                   temperature=tensors[-1], symmetric=symmetric, reduction=reduction, return_stats=True,
                                   process_group=group, layout=layout, **given)  # fmt: skip
            up = torch.linspace(0.5, 1.5, sum(n), dtype=loss.dtype)[here[0]] if reduction == "none" else None
            *grads, dt = torch.autograd.grad(loss, tensors, up)
            if group is None:
                of_rows = ["query", "candidates", *names]
                grads = [g[mine[k not in of_query | {"query"}]] for k, g in zip(of_rows, grads, strict=True)]
                stats, loss = [f[mine[0]] for f in stats], loss[mine[0]] if reduction == "none" else loss
            else:
                dist.all_reduce(dt)
            results.append((loss, *stats, *grads, dt))
        torch.testing.assert_close(*results)


def listed_positives_are_own_candidates(rank, world):
    """Their columns count from the rank's own first candidate."""
    torch.manual_seed(0)
    q, c = torch.randn(2 * world, 5, dtype=torch.float64), torch.randn(3 * world, 5, dtype=torch.float64)
    n, m = slice(2 * rank, 2 * rank + 2), slice(3 * rank, 3 * rank + 3)
    lists = torch.tensor([0, 2, 3]), torch.tensor([1, 2, 0])
    every = F.pad(torch.tensor([2, 1]).repeat(world).cumsum(0), (1, 0))
    columns = (lists[1] + 3 * torch.arange(world)[:, None]).reshape(-1)
    results = []
    everything = slice(None), slice(None), (every, columns), None
    for rows, part, given, group in (everything, (n, m, lists, dist.group.WORLD)):
        tensors = [q[rows].clone().requires_grad_(), c[part].clone().requires_grad_()]
        loss = info_nce(*tensors, positives=given, positives_pool="logsumexp", process_group=group, layout="ring",
                        label_smoothing=0.1)  # fmt: skip
        dq, dc = torch.autograd.grad(loss, tensors)
        results.append((loss, dq[n] if group is None else dq, dc[m] if group is None else dc))
    torch.testing.assert_close(*results)


def ring_in_slabs(rank, world):
    """Parts that are visited slab by slab."""
    torch.manual_seed(0)
    n, m = 9, 70
    q, c = torch.randn(n * world, 5, dtype=torch.float64), torch.randn(m * world, 5, dtype=torch.float64)
    ids = torch.randint(40, (m * world,))
    target = torch.cat([torch.randperm(m)[:n] for _ in range(world)])
    rows, columns = slice(n * rank, n * (rank + 1)), slice(m * rank, m * (rank + 1))
    plan.SLAB_HEIGHT, walk.LEAST_ROWS["cpu"] = 1, 8
    first = m * torch.arange(world).repeat_interleave(n)
    for options in ({"candidate_ids": ids}, {"false_negative_margin": 0.1}, {"symmetric": True}, {"normalize": False}):
        results = []
        for here, there, group in ((slice(None), slice(None), None), (rows, columns, dist.group.WORLD)):
            given = {k: v[there] if isinstance(v, torch.Tensor) else v for k, v in options.items()}
            tensors = [q[here].clone().requires_grad_(), c[there].T.clone().T.requires_grad_()]  # columns in memory
            loss, stats = info_nce(*tensors, target + first if group is None else target[rows], return_stats=True,
                                   process_group=group, layout="ring", workspace_bytes=None if group is None else 9000,
                                   **given)  # fmt: skip
            dq, dc = torch.autograd.grad(loss, tensors)
            results.append((loss, *(f[rows] for f in stats), dq[rows], dc[columns]) if group is None else
                           (loss, *stats, dq, dc))  # fmt: skip
        torch.testing.assert_close(*results)


def two_sweeps_have_the_same_logits(rank, world):
    """Bit by bit, in slabs: over candidates in a ring or gathered, and over a head in parts."""
    torch.manual_seed(0)
    gemm.ONEDNN = gemm.has_onednn()  # else blocks are as wide with gradients as without
    found, real = [], gemm.dots
    gemm.dots = lambda a, b, out, **options: found.append((real(a, b, out, **options), out.clone())[1])
    plan.SLAB_HEIGHT, walk.LEAST_ROWS["cpu"] = 1, 8
    q, c = torch.randn(90, 16, requires_grad=True), torch.randn(300 + 7 * rank, 16, requires_grad=True)
    target = torch.randint(600, (90,))
    dist.broadcast(q.data, 0)
    dist.broadcast(target, 0)
    options = {"process_group": dist.group.WORLD, "workspace_bytes": 40_000, "reduction": "none"}
    for loss in (
        lambda: info_nce(q, c, layout="ring", **options),
        lambda: info_nce(q, c, layout="ring", symmetric=True, **options),
        lambda: info_nce(q, c, symmetric=True, **options),
        lambda: linear_cross_entropy(q, c, target, **options),
    ):
        found.clear()
        loss().sum().backward()
        half = len(found) // 2
        assert half > 4 and len(found) == 2 * half, (half, len(found))
        assert all(torch.equal(one, other) for one, other in zip(found[:half], found[half:], strict=True))


def peak_memory(rank, world, layout, folder):
    """Leave in the folder how much the loss and its gradients take above what was there, with as many rows each."""
    torch.manual_seed(rank)
    tensors = [torch.randn(k, 64, requires_grad=True) for k in (200, 4000)]

    def step():
        loss = info_nce(*tensors, symmetric=True, normalize=False, workspace_bytes=1 << 20, layout=layout,
                        process_group=dist.group.WORLD)  # fmt: skip
        return torch.autograd.grad(loss, tensors)

    step()
    Path(folder, f"{layout}_{world}_{rank}").write_text(str(peak_bytes(step)))


def contrastive_of_own_gradients_and_own_candidates(rank, world):
    """gather="detached": gradients of the own candidates, by the own queries; "local": of all else nothing is seen."""
    counts = QUERIES[world]
    torch.manual_seed(0)
    q, c = (torch.randn(k, 5, dtype=torch.float64) for k in (sum(counts), 3 * world))
    some = torch.rand(sum(counts), dtype=torch.float64)
    none_here = some * (torch.arange(sum(counts)) < counts[0])
    together_0 = torch.tensor([1.0, 1.0, -1.0, 0.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    first = sum(counts[:rank])
    n, m = slice(first, first + counts[rank]), slice(3 * rank, 3 * rank + 3)
    target = torch.arange(counts[rank]) % 3
    for kind, weights in itertools.product(("detached", "local"), (None, some, none_here, together_0)):
        here, own, table = (t.clone().requires_grad_() for t in (q[n], c[m], c))
        weight = None if weights is None else weights[n].clone().requires_grad_()
        asked = [here, own] if weight is None else [here, own, weight]
        loss = info_nce(here, own, target, sample_weight=weight, process_group=dist.group.WORLD, gather=kind)
        got = loss, *torch.autograd.grad(loss, asked)
        candidates, start = (table, 3 * rank) if kind == "detached" else (table[m], 0)
        nll = info_nce(here, candidates, target + start, reduction="none")
        total = sum(counts) if weights is None else weights.sum()
        part = (nll if weight is None else weight * nll).sum() / (total or 1.0)
        want = part.detach().clone()
        dist.all_reduce(want)
        dq, dc = torch.autograd.grad(part, (here, table))
        of_weight = [] if weight is None else [(nll.detach() - want) / total if total else nll.detach()]
        torch.testing.assert_close(got, (want, dq, dc[m], *of_weight))


def an_infinite_loss_is_infinite_on_every_rank(rank, world):
    """Not NaN, as infinity less itself: the last rank has a target, or a positive, that is masked."""
    query, candidates = torch.randn(3, 4), torch.randn(5, 4)
    bias = torch.zeros(5)
    bias[0] = -float("inf") if rank == world - 1 else 0.0
    group = dist.group.WORLD
    loss = info_nce(query, candidates, candidate_bias=bias, process_group=group)
    assert loss == float("inf")
    hidden, labels = torch.randn(2, 4, 4), torch.zeros(2, 4, dtype=torch.int64)
    out = co_supervision_loss(hidden, torch.randn(5, 4), labels, query, candidates, linear_bias=bias,
                                    process_group=group)  # fmt: skip
    assert out.ntp_loss == float("inf") and out.nsp_loss.isfinite() and out.loss == float("inf")


def bad_contrastive_options_are_refused(rank, world):
    q, c = torch.randn(2, 5), torch.randn(3, 5)
    for options, error, message in [
        (dict(gather="all"), ValueError, "gather must be one of"),
        (dict(gather="detached", symmetric=True), ValueError, 'want gather "exact" or "local" where symmetric'),
        (dict(target=torch.tensor([0, 3])), IndexError, r"target must be in [0, 3), got 3 in row 1"),
    ]:
        try:
            info_nce(q, c, process_group=dist.group.WORLD, **options)
        except error as raised:
            assert message in str(raised)
        else:
            raise AssertionError(message)


def pairs_equal_one_process(rank, world):
    """The sigmoid loss, exact and of own candidates: loss and gradients are those of one process."""
    n, m = QUERIES[world], CANDIDATES[world]
    torch.manual_seed(0)
    q, c = (torch.randn(sum(k), 7, dtype=torch.float64) for k in (n, m))
    weight, ids = torch.rand(sum(n), dtype=torch.float64), torch.randint(8, (sum(m),))
    numbers = [torch.tensor(v, dtype=torch.float64) for v in (0.3, -2.0)]
    target = torch.cat([torch.randperm(k)[:i] for i, k in zip(n, m, strict=True)])
    first = torch.tensor([0, *m]).cumsum(0)[:-1].repeat_interleave(torch.tensor(n))
    rows, columns = (slice(sum(k[:rank]), sum(k[: rank + 1])) for k in (n, m))
    group = dist.group.WORLD
    for gather, reduction, more in itertools.product(["exact", "local", "detached"], ["mean", "sum", "none"], [0, 1]):
        tensors = [t.clone().requires_grad_() for t in (q[rows], c[columns], *numbers)]
        options = {"sample_weight": weight[rows], "candidate_ids": ids[columns]} if more else {}
        loss = sigmoid_loss(tensors[0], tensors[1], target[rows], temperature=tensors[2], bias=tensors[3],
                            reduction=reduction, process_group=group, gather=gather, **options)  # fmt: skip
        up = torch.linspace(0.5, 1.5, sum(n), dtype=loss.dtype) if reduction == "none" else None
        got = [loss, *torch.autograd.grad(loss, tensors, None if up is None else up[rows])]

        whole = [t.clone().requires_grad_() for t in (q, c, *numbers)]
        table = {"candidate_ids": ids} if more else {}
        losses = sigmoid_loss(whole[0], whole[1], target + first, temperature=whole[2], bias=whole[3],
                              reduction="none", **table)  # fmt: skip
        if gather == "local":
            parts = [sigmoid_loss(whole[0][a], whole[1][b], target[a], temperature=whole[2], bias=whole[3],
                                  reduction="none", **({"candidate_ids": ids[b]} if more else {}))
                     for a, b in _blocks(n, m)]  # fmt: skip
            losses = torch.cat(parts)
        weights = weight if more else torch.ones_like(weight)
        losses = weights * losses
        of_rows = losses / weights.sum() if reduction == "mean" else losses if up is None else losses * up
        dq, _, dt, db = torch.autograd.grad(of_rows[rows].sum(), whole, retain_graph=True)
        (dc,) = torch.autograd.grad((of_rows[rows] if gather == "detached" else of_rows).sum(), whole[1])
        want = losses[rows] if reduction == "none" else of_rows.sum()
        torch.testing.assert_close(got, [want, dq[rows], dc[columns], dt, db])


def _blocks(n, m):
    """Rows and columns of each rank."""
    return [[slice(sum(k[:r]), sum(k[: r + 1])) for k in (n, m)] for r in range(len(n))]
