"""What each process of test_agreement.py runs: calls in which one rank fails, or differs from the others."""

import time
from functools import partial as of
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

import cosup.ops
from cosup import co_supervision_loss, info_nce, linear_cross_entropy, linear_log_prob, sigmoid_loss
from cosup.compat.cut_cross_entropy import VocabParallelOptions
from cosup.compat.cut_cross_entropy import linear_cross_entropy as cut
from cosup.kernels import native
from cosup.nn import CandidateQueue

SECONDS = 5  # after a call in which one rank fails, all have raised
D = 5


def contrastive(loss=info_nce, rows=(3, 4), width=D, dtype=torch.float32, frozen=(), **options):
    torch.manual_seed(dist.get_rank())
    tensors = [torch.randn(n, width, dtype=dtype, requires_grad=k not in frozen) for k, n in enumerate(rows)]
    out = loss(*tensors, process_group=dist.group.WORLD, **options)
    out.sum().backward()
    return out


def head(loss=linear_cross_entropy, n=6, width=D, rows=7, frozen=(), target=None, **options):
    torch.manual_seed(0)
    x = torch.randn(n, width, requires_grad="x" not in frozen)
    w = torch.randn(rows, width, requires_grad="w" not in frozen)
    target = torch.arange(n) if target is None else target
    out = loss(x, w, target, process_group=dist.group.WORLD, **options)
    out = out if isinstance(out, torch.Tensor) else out.nll
    out.sum().backward()
    return out


def both(labels=0, width=D, ndim=3, length=4, **options):
    torch.manual_seed(dist.get_rank())
    hidden = torch.randn(*(2, length, D)[-ndim:], requires_grad=True)
    tensors = torch.randn(9, D), torch.full((2, length), labels), torch.randn(2, width, requires_grad=True)
    out = co_supervision_loss(hidden, *tensors, torch.randn(3, D), process_group=dist.group.WORLD, **options)
    out.loss.backward()
    return out.loss


def enqueue(size=8, width=D, ids=3):
    queue = CandidateQueue(size, D, process_group=dist.group.WORLD)
    queue.enqueue(torch.zeros(3, width), torch.arange(ids))
    return queue.ids


def parallel_head(shift=0, width=7, reduce_e_grad=True, start=None, **options):
    first = width * dist.get_rank() if start is None else start
    part = VocabParallelOptions(first, width * (dist.get_rank() + 1), None, reduce_e_grad)
    tensors = torch.ones(6, D), torch.ones(7, D), torch.arange(6)
    return cut(*tensors, shift=shift, vocab_parallel_options=part, **options)


def without_gradients(call):
    with torch.no_grad():
        return call()


def in_sixteen_bits(**options):
    with torch.autocast("cpu", torch.bfloat16):
        return contrastive(**options)


def fails_with(error, call, **options):
    """The engine's walk fails."""
    with mock.patch.object(cosup.ops, "walk", mock.Mock(side_effect=error)):
        return call(**options)


class Silent(UnicodeError):
    def __str__(self):
        return None


BIAS = {"candidate_bias": torch.zeros(4)}
IDS = {"candidate_ids": torch.arange(4)}
SOME = {"workspace_bytes": 1 << 20}
FEW = {"workspace_bytes": 9}
# What most ranks do, what one does, what all raise.
FAIL = {
    "a target": (of(contrastive), of(contrastive, target=torch.tensor([0, 9, 1])), IndexError, "[0, 4), got 9 in row"),
    "a listed positive": (
        of(contrastive, positives=(torch.tensor([0, 1, 1, 2]), torch.tensor([3, 0]))),
        of(contrastive, positives=(torch.tensor([0, 1, 1, 2]), torch.tensor([4, 0]))), IndexError, "positives[1]",
    ),
    "a temperature": (of(contrastive), of(contrastive, temperature=-1.0), ValueError, "temperature"),
    "hard negatives": (of(contrastive), of(contrastive, hard_negatives=torch.zeros(3, 2, 4)), ValueError, "hard_neg"),
    "no tensor": (of(contrastive), of(contrastive, hard_negatives=[0]), RuntimeError, "AttributeError"),
    "a budget": (of(contrastive, **SOME), of(contrastive, **FEW), ValueError, "workspace_bytes must be at least"),
    "a budget of a ring": (of(contrastive, layout="ring", **SOME), of(contrastive, layout="ring", **FEW), ValueError,
                           "workspace_bytes must be at least"),
    "a budget for another part of a ring": (
        of(contrastive, rows=(3, 4000), layout="ring", symmetric=True, **SOME),
        of(contrastive, layout="ring", symmetric=True, workspace_bytes=60_000), ValueError,
        "workspace_bytes must be at least",
    ),
    "a budget where symmetric": (of(contrastive, symmetric=True, **SOME), of(contrastive, symmetric=True, **FEW),
                                 ValueError, "workspace_bytes must be at least"),
    "a budget of further negatives": (
        of(contrastive, query_negatives=True, **SOME), of(contrastive, query_negatives=True, **FEW), ValueError,
        "workspace_bytes must be at least",
    ),
    "a budget, no sum": (of(contrastive, reduction="none", **SOME), of(contrastive, reduction="none", **FEW),
                         ValueError, "workspace_bytes must be at least"),
    "a budget, own candidates": (
        of(contrastive, gather="local", symmetric=True, **SOME),
        of(contrastive, gather="local", symmetric=True, **FEW), ValueError, "workspace_bytes must be at least",
    ),
    "no budget": (of(contrastive, layout="ring", **SOME), of(contrastive, layout="ring", workspace_bytes="9"),
                  ValueError, "workspace_bytes"),
    "a huge budget": (of(contrastive, **SOME), of(contrastive, workspace_bytes=1 << 63), ValueError, "of 64 bits"),
    "a target, nothing exchanged": (
        of(contrastive, gather="local", reduction="none", symmetric=True),
        of(contrastive, gather="local", reduction="none", symmetric=True, target=torch.tensor([0, 9, 1])),
        IndexError, "got 9 in row 1",
    ),
    "no candidates": (
        of(contrastive, rows=(3, 0), positives=(torch.zeros(4, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))),
        of(contrastive, rows=(0, 0), positives=(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))),
        ValueError, "candidates must have rows",
    ),
    "an error of a user's": (of(contrastive), of(fails_with, Silent, contrastive), ValueError, "cannot say why"),
    "an end of something": (of(contrastive), of(fails_with, StopIteration, contrastive), RuntimeError, "StopIter"),
    "memory": (of(contrastive), of(fails_with, MemoryError, contrastive), RuntimeError, "MemoryError"),
    "memory, own candidates": (
        of(contrastive, gather="local"), of(fails_with, MemoryError, contrastive, gather="local"), RuntimeError,
        "MemoryError",
    ),
    "memory, a sum": (
        of(contrastive, gather="local", reduction="sum"),
        of(fails_with, MemoryError, contrastive, gather="local", reduction="sum"), RuntimeError, "MemoryError",
    ),
    "sigmoid: a target": (of(contrastive, loss=sigmoid_loss),
                          of(contrastive, loss=sigmoid_loss, target=torch.tensor([0, -1, 1])), IndexError, "got -1"),
    "sigmoid: weights": (
        of(contrastive, loss=sigmoid_loss, sample_weight=torch.ones(3)),
        of(contrastive, loss=sigmoid_loss, sample_weight=torch.ones(2)), ValueError, "sample_weight must be [3]",
    ),
    "sigmoid: memory": (of(contrastive, loss=sigmoid_loss), of(fails_with, MemoryError, contrastive, loss=sigmoid_loss),
                        RuntimeError, "MemoryError"),
    "head: smoothing": (of(head), of(head, label_smoothing=2.0), ValueError, "label_smoothing must be in [0, 1]"),
    "head: no rows": (of(head), of(head, rows=0), ValueError, "must have rows on every rank"),
    "head: a budget": (of(head, **SOME), of(head, **FEW), ValueError, "workspace_bytes must be at least"),
    "log_prob: temperature": (of(head, loss=linear_log_prob), of(head, loss=linear_log_prob, temperature=0.0),
                              ValueError, "temperature"),
    "both: a label": (of(both), of(both, labels=9), IndexError, "target must be in [0, 9), got 9"),
    "both: a label, counted": (
        of(both, ntp_normalizer=3, nsp_normalizer=2), of(both, ntp_normalizer=3, nsp_normalizer=2, labels=9),
        IndexError, "target must be in [0, 9), got 9",
    ),
    "both: a label, no query": (of(both, mode="ntp"), of(both, mode="ntp", labels=-1), IndexError, "got -1"),
    "both: states": (of(both), of(both, ndim=2), ValueError, "want hidden [B, T, D]"),
    "queue: vectors": (of(enqueue), of(enqueue, width=4), ValueError, "vectors must be floating [n, 5]"),
    "queue: ids": (of(enqueue), of(enqueue, ids=2), ValueError, "ids must be int64 [3]"),
    "cut: a shift": (of(parallel_head), of(parallel_head, shift=6), ValueError, "shift must be an integer"),
    "cut: a range": (of(parallel_head), of(parallel_head, start="a"), ValueError, "start must be an integer"),
    "cut: ranges": (of(parallel_head), of(parallel_head, width=8), ValueError, "ranges in rank order"),
}  # fmt: skip
# Once they know the sizes of the others.
FOUND_BY_ALL = {"no candidates", "head: no rows", "head: a budget", "cut: ranges"}
DIFFER = {
    "dtype": (of(contrastive), of(contrastive, dtype=torch.float64), "query"),
    "width": (of(contrastive), of(contrastive, width=4), "query"),
    "autocast": (of(contrastive), of(in_sixteen_bits), "dtype"),
    "temperature": (of(contrastive), of(contrastive, temperature=0.06), "temperature"),
    "a temperature that is learned": (
        of(contrastive, temperature=torch.tensor(0.05)), of(contrastive, temperature=torch.tensor(0.06)), "temperature",
    ),
    "a temperature of one row": (
        of(contrastive, temperature=torch.tensor([0.05])), of(contrastive, temperature=torch.tensor([0.06])),
        "temperature",
    ),
    "numpy's numbers": (of(contrastive, label_smoothing=np.float32(0.1)),
                        of(contrastive, label_smoothing=np.float32(0.2)), "label_smoothing"),
    "reduction": (of(contrastive), of(contrastive, reduction="none"), "reduction"),
    "gather": (of(contrastive), of(contrastive, gather="local"), "gather"),
    "layout": (of(contrastive), of(contrastive, layout="ring"), "layout"),
    "symmetric": (of(contrastive), of(contrastive, symmetric=True), "symmetric"),
    "statistics": (of(contrastive), of(contrastive, label_smoothing=0.1), "label_smoothing"),
    "ids": (of(contrastive), of(contrastive, **IDS), "candidate_ids"),
    "bias": (of(contrastive, **BIAS), of(contrastive), "candidate_bias"),
    "frozen candidates": (of(contrastive), of(contrastive, frozen=[1]), "candidates"),
    "no gradients": (of(contrastive), of(without_gradients, of(contrastive)), "query"),
    "further negatives": (of(contrastive), of(contrastive, query_negatives=True), "query_negatives"),
    "a budget, or none": (of(contrastive, layout="ring"), of(contrastive, layout="ring", **SOME), "workspace_bytes"),
    "another loss": (of(contrastive), of(contrastive, loss=sigmoid_loss), "call"),
    "a head": (of(contrastive), of(head), "call"),
    "a queue": (of(contrastive), of(enqueue), "call"),
    "head: targets": (of(head), of(head, target=torch.zeros(6, dtype=torch.int64)), "target"),
    "head: a target": (of(head), of(head, target=torch.full((6,), 99)), "target"),
    "head: rows of input": (of(head), of(head, n=7), "input"),
    "head: ignore_index": (of(head), of(head, ignore_index=0), "ignore_index"),
    "head: z-loss": (of(head), of(head, z_loss=0.1), "z_loss"),
    "head: class weights": (of(head), of(head, weight=torch.ones(7)), "weight"),
    "head: a frozen input": (of(head), of(head, frozen="x"), "input"),
    "head: a frozen part alone": (of(head, frozen="x"), of(head, frozen="xw"), "gradients"),
    "head: weights": (of(head, token_weight=torch.ones(6)), of(head, token_weight=torch.zeros(6)), "token_weight"),
    "head: backend": (of(head, backend="native"), of(head, backend="reference"), "backend"),
    "head: invariant": (of(head), of(head, batch_invariant=True), "batch_invariant"),
    "log_prob, or its loss": (of(head), of(head, loss=linear_log_prob), "call"),
    "both: mode": (of(both), of(both, mode="ntp"), "mode"),
    "both: queries": (of(both), of(both, width=4), "query"),
    "both: nsp_weight": (of(both), of(both, nsp_weight=0.5), "nsp_weight"),
    "both: normalizer": (of(both), of(both, ntp_normalizer=torch.tensor(3)), "ntp_normalizer"),
    "queue: size": (of(enqueue), of(enqueue, size=9), "queue"),
    "cut: gradients": (of(parallel_head), of(parallel_head, reduce_e_grad=False), "reduce_e_grad"),
}  # fmt: skip


UNEVEN = [2, 7, 4, 5]
# What ranks may have of their own.
ALLOWED = [
    lambda rank: contrastive(rows=(rank, 4 + rank), hard_negatives=torch.randn(rank, 1 + rank, D)),
    lambda rank: contrastive(temperature=np.float64(0.07) if rank else 0.07, label_smoothing=0 if rank else 0.0),
    lambda rank: contrastive(**{"backend": "native"} if rank and native.AVAILABLE else {}),
    lambda rank: contrastive(workspace_bytes=1 << 20 + rank, normalize=True),
    lambda rank: head(rows=UNEVEN[rank], frozen="w" if rank else ""),
    lambda rank: head(rows=UNEVEN[rank], lora=(torch.ones(2, D, requires_grad=True), torch.ones(UNEVEN[rank], 2), 0.5)),
    lambda rank: head(rows=UNEVEN[rank], lora=(torch.ones(6, 2, requires_grad=True),
                                               torch.ones(UNEVEN[rank], 2, requires_grad=bool(rank)))),
    lambda rank: head(**{"ignore_index": np.int64(-100)} if rank else {}, workspace_bytes=1 << 20 if rank else None),
    lambda rank: head(loss=linear_log_prob, **{"temperature": 1} if rank else {}),
    lambda rank: both(length=4 + rank),
    lambda rank: enqueue(),
]  # fmt: skip


def what_may_differ(rank, world):
    for call in ALLOWED:
        call(rank)


def one_fails(rank, world):
    """All raise the same, naming the rank and its reason, at once; and what all do next is right."""
    for number, (name, (call, bad, kind, words)) in enumerate(FAIL.items()):
        culprit = number % world
        said = _raised(bad if rank == culprit else call, kind, name)
        assert f"rank {culprit}: " in said or name in FOUND_BY_ALL, (name, said)
        assert words in said, (name, said)
        _all_the_same(said, name)
        _what_comes_next_is_right(name)


def one_differs(rank, world):
    for number, (name, (call, other, words)) in enumerate(DIFFER.items()):
        culprit = number % world
        said = _raised(other if rank == culprit else call, ValueError, name)
        assert said.startswith(f"{words}: wanted the same on all ranks, got ") and "on rank 0" in said, (name, said)
        assert f"on rank {culprit or 1}" in said, (name, said)
        _all_the_same(said, name)
        _what_comes_next_is_right(name)


def one_message_a_call(rank, world):
    """Where sizes are exchanged, and where the loss is; none where nothing is, in a backward pass, or on one rank."""
    one = [dist.new_group([k]) for k in range(world)][rank]
    sent, real = [], dist.all_to_all_single

    def counting(to, *args, **kwargs):
        if to.dtype == torch.int64:  # else gradients
            sent.append(to)
        return real(to, *args, **kwargs)

    dist.all_to_all_single = counting
    for messages, call in {
        2: [of(contrastive), of(contrastive, loss=sigmoid_loss)],
        1: [of(contrastive, gather="local"), of(contrastive, loss=sigmoid_loss, gather="local"),
            of(contrastive, layout="ring"), of(contrastive, symmetric=True), of(contrastive, reduction="none"),
            of(contrastive, gather="local", reduction="sum"), of(head), of(head, label_smoothing=0.1),
            of(head, loss=linear_log_prob), of(contrastive, gather="local", reduction="none"),
            of(both, mode="ntp", ntp_normalizer=3, nsp_normalizer=1), of(enqueue)],
        3: [of(both)],
    }.items():  # fmt: skip
        for made in call:
            sent.clear()
            made()
            assert len(sent) == messages, (made, len(sent))
    sent.clear()
    info_nce(torch.randn(3, D), torch.randn(4, D), process_group=one)
    assert not sent
    dist.all_to_all_single = real


def _raised(call, kind, name):
    start = time.monotonic()
    try:
        got = call()
    except Exception as error:
        assert type(error) is kind, (name, error)
        assert time.monotonic() - start < SECONDS, name
        return str(error)
    raise AssertionError(f"{name}: nothing was raised, but returned {got}")


def _all_the_same(said, name):
    everything = [None] * dist.get_world_size()
    dist.all_gather_object(everything, said)
    assert len(set(everything)) == 1, (name, everything)


def _what_comes_next_is_right(name):
    torch.manual_seed(0)
    q, c = torch.randn(dist.get_world_size(), 3, D), torch.randn(dist.get_world_size(), 4, D)
    target = torch.arange(len(q))[:, None] * 4 + torch.arange(3)
    want = info_nce(q.flatten(0, 1), c.flatten(0, 1), target.flatten())
    got = info_nce(q[dist.get_rank()], c[dist.get_rank()], process_group=dist.group.WORLD)
    torch.testing.assert_close(got, want, msg=lambda text: f"after {name}: {text}")
