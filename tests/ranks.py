"""What each process of test_distributed.py runs: the loss over its part of the head, against the loss over it all."""

import itertools
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from cosup import linear_cross_entropy, linear_log_prob, plan, walk

N, D, V = 41, 7, 90
SPLITS = {2: [64, 26], 3: [70, 1, 19]}  # of the head's rows


def run(check, world):
    """Run ``check(rank, world)`` in so many processes; an error in any is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (check, world, f"{folder}/store"), nprocs=world)


def _process(rank, check, world, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
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
    for function in (loss, torch.compile(loss, fullgraph=True)):
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
