"""Stages that measure time and memory of whole calls. Each runs alone; methods of a stage take turns in one process."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity

import cosup
from cosup.bench import info_nce, linear_cross_entropy, measure, patched_model, peers, report
from cosup.bench.gpu.pair import SMOLLM2, instances, passages, random_pair
from cosup.bench.gpu.recorder import Found, Recorder, synchronize
from cosup.bench.measure import Loss, gradients
from cosup.doctor import version
from cosup.gradcache import cached_encode
from cosup.nn import CandidateQueue
from cosup.walk import default_workspace

ROUNDS = 3
TEMPERATURE = 0.05


def machine(stage: Recorder) -> None:
    """Where this runs."""
    budget = default_workspace(torch.device(stage.device)) >> 20
    stage.line("software", **report.environment(), cpus=os.cpu_count(), default_MiB=budget,
               bf16_sums=torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)  # fmt: skip
    if stage.small:
        return
    found = torch.cuda.get_device_properties(0)
    asked = "clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
    state = subprocess.run(command, capture_output=True, text=True)
    stage.line("card", processors=found.multi_processor_count, GiB=found.total_memory / 2**30,
               L2_MiB=found.L2_cache_size / 2**20, state=state.stdout.strip())  # fmt: skip


def ceilings(stage: Recorder) -> None:
    """What the card gives: a copy, and each product alone, also as the engine may have to take it."""
    a = torch.randint(100, (1 << (16 if stage.small else 28),), dtype=torch.int32, device=stage.device)
    b = torch.empty_like(a)
    ms = stage.timed(lambda: b.copy_(a))["ms"]
    stage.line("copy", TB_s=8 * a.numel() / ms / 1e9)
    for shape in ((8192, 4096, 128256), (1024, 4096, 128256)):
        _products(stage, *stage.size(*shape))


def _products(stage: Recorder, n: int, d: int, v: int) -> None:
    x, w, _ = linear_cross_entropy.random_operands(n, d, v, torch.bfloat16, stage.device)
    z, dx, dw = torch.randn(n, v, device=stage.device).to(x.dtype), torch.empty_like(x), torch.empty_like(w)
    runs: dict[str, Callable[[], object]] = {
        "z": lambda: torch.mm(x, w.mT, out=z),
        "dx": lambda: torch.mm(z, w, out=dx),
        "dw": lambda: torch.mm(z.mT, x, out=dw),
    }
    if not stage.small:
        z32, dw32 = torch.empty(n, v, device=stage.device), torch.zeros(v, d, device=stage.device)
        runs["z into float32"] = lambda: torch.mm(x, w.mT, out_dtype=torch.float32, out=z32)
        runs["dw += float32"] = lambda: torch.addmm(dw32, z.mT, x, out_dtype=torch.float32, out=dw32)
    for name, run in runs.items():
        found = stage.timed(run)
        stage.line(f"{name}, {n} rows", ms=found["ms"], TFLOP_s=2e-9 * n * d * v / found["ms"])


# ---- the losses


def ahead(stage: Recorder, shape: tuple[int, int, int], met: bool) -> None:
    """Each method of a shape once, beside others of these stages: what they compile lies in caches from then on.

    Not of torch.compile: it would choose among kernels by times that it takes here, beside others.
    """
    x, w, target = linear_cross_entropy.random_operands(*stage.size(*shape), torch.bfloat16, stage.device)
    whole = partial(cosup.linear_cross_entropy, workspace_bytes=stage.mib(4096) << 20)  # alone on a card
    named = peers.losses()[0] if met and not stage.small else {}
    named = {name: loss for name, loss in named.items() if name not in ("plain", "torch.compile")}
    for name, loss in (_ours(stage) | {"cosup": whole} | named).items():
        _once(stage, name, loss, x, w, target)


def ahead_of_pools(stage: Recorder) -> None:
    """The same of info_nce, cosup's alone."""
    n, d = (128, 32) if stage.small else (65536, 1024)
    query, candidates = info_nce.random_operands(n, n, d, torch.bfloat16, stage.device)
    for symmetric in (False, True):
        loss = partial(cosup.info_nce, normalize=False, symmetric=symmetric, workspace_bytes=stage.mib(4096) << 20)
        _once(stage, f"symmetric {symmetric}", loss, query, candidates, torch.arange(n, device=stage.device))


def _once(stage: Recorder, name: str, loss: Loss, x: Tensor, w: Tensor, target: Tensor) -> None:
    """With all rows and with a few, with gradients and without."""

    def run() -> Found:
        loss(x, w, target)
        for rows in (len(x), measure.ERROR_ROWS):
            leaves = (t.detach().requires_grad_() for t in (x[:rows], w))
            gradients(loss, *leaves, target[:rows])
        return {"once": True}

    stage.figure(name, run, False, ours=False)  # what is wrong is told where it is measured


def _ours(stage: Recorder) -> dict[str, Loss]:
    def within(mib: int) -> Loss:
        return partial(cosup.linear_cross_entropy, workspace_bytes=stage.mib(mib) << 20)

    def each(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return cosup.linear_cross_entropy(x, w, target, reduction="none").mean()

    return {"cosup in 256 MiB": within(256), "cosup in 1024 MiB": within(1024), "cosup, none": each}


def losses(stage: Recorder, shape: tuple[int, int, int], met: bool) -> None:
    """A published shape by budget, beside plain PyTorch and the bare products; ``met``: beside every peer too."""
    others, absent = peers.losses() if met else ({"plain": peers.plain}, {})
    _compare_heads(stage, shape, _ours(stage) | others, absent)


def searching(stage: Recorder) -> None:
    """The peers that first search for the quickest sizes."""
    _compare_heads(stage, (8192, 4096, 128256), *peers.losses(peers.SEARCHING))


def ignored(stage: Recorder) -> None:
    """Three labels of four ignored, beside none."""
    _compare_heads(stage, (8192, 4096, 128256), {"plain": peers.plain}, {}, ignored=0.75)


def _compare_heads(stage: Recorder, shape: tuple[int, int, int], others: dict[str, Loss], absent: dict[str, str],
                   ignored: float = 0.0) -> None:  # fmt: skip
    torch.manual_seed(0)
    operands = linear_cross_entropy.random_operands(*stage.size(*shape), torch.bfloat16, stage.device)
    budget = default_workspace(torch.device(stage.device)) >> 20
    found = linear_cross_entropy.compare(*operands, budget, ROUNDS, others=others, ignored=ignored, until=stage.until)
    found["absent"] = absent
    stage.record("x".join(map(str, shape)), found)


def contrastive(stage: Recorder, symmetric: bool) -> None:
    """65,536 queries and candidates, beside whoever is installed and within other budgets."""
    n, d = (128, 32) if stage.small else (65536, 1024)
    torch.manual_seed(0)
    query, candidates = info_nce.random_operands(n, n, d, torch.bfloat16, stage.device)
    others, absent = peers.losses(peers.contrastive(TEMPERATURE, symmetric))
    for name in ("sentence-transformers", "the same, cached"):  # of float32 squares
        others.pop(name, None)
    ours = partial(cosup.info_nce, normalize=False, symmetric=symmetric)
    for mib in (256, 1024, 9216):
        within = partial(ours, workspace_bytes=stage.mib(mib) << 20)
        others[f"cosup in {mib} MiB"] = lambda q, c, t, loss=within: loss(q, c, t, temperature=TEMPERATURE)
    warm = torch.tensor(TEMPERATURE, device=stage.device)
    others["cosup, a tensor's temperature"] = lambda q, c, t: ours(q, c, t, temperature=warm)
    budget = default_workspace(torch.device(stage.device)) >> 20
    found = info_nce.compare(query, candidates, budget, ROUNDS, temperature=TEMPERATURE, symmetric=symmetric,
                             others=others, until=stage.until)  # fmt: skip
    found["absent"] = absent
    stage.record(f"{n}x{n}x{d}", found)


def million(stage: Recorder) -> None:
    """2^20 queries and candidates within 8 GB, once."""
    n, d = (256, 32) if stage.small else (1 << 20, 1024)
    query, candidates = info_nce.random_operands(n, n, d, torch.bfloat16, stage.device)
    loss = partial(cosup.info_nce, normalize=False, workspace_bytes=8_000_000_000 >> (10 if stage.small else 0))
    leaves = query.requires_grad_(), candidates.requires_grad_()
    size = 4 * n * d / 2**20

    def once() -> Found:
        start = time.perf_counter()
        peak = measure.peak_bytes(lambda: gradients(loss, *leaves, None))
        return {"s": time.perf_counter() - start, "MiB": peak / 2**20 - size}  # peak_bytes waits for the device

    stage.figure(f"info_nce {n}x{n}x{d}", once)


def pool(stage: Recorder) -> None:
    """A pool of a million candidates: a batch encoded in micro-batches, the others from a queue."""
    batch, micro, queued, d = (64, 16, 256, 32) if stage.small else (8192, 1024, 1 << 20, 1024)
    torch.manual_seed(0)
    dtype = torch.bfloat16
    encoders = [torch.nn.Sequential(torch.nn.Linear(d, 4 * d), torch.nn.GELU(), torch.nn.Linear(4 * d, d))
                .to(stage.device, dtype) for _ in range(2)]  # fmt: skip
    parameters = [p for encoder in encoders for p in encoder.parameters()]
    texts = torch.randn(2, batch, d, device=stage.device).to(dtype)
    queue = CandidateQueue(queued, d, device=stage.device, dtype=dtype)
    for part in range(0, queued, batch):
        queue.enqueue(torch.randn(batch, d, device=stage.device), torch.arange(part, part + batch, device=stage.device))
    ids = torch.arange(queued, queued + batch, device=stage.device)

    def step():
        query, own = (cached_encode(e, t.split(micro)) for e, t in zip(encoders, texts, strict=True))
        past, past_ids = queue.candidates()
        loss = cosup.info_nce(query, torch.cat([own, past]), candidate_ids=torch.cat([ids, past_ids]))
        return torch.autograd.grad(loss, parameters)

    stage.figure(f"{batch} queries, {batch + queued} candidates, width {d}", lambda: stage.timed(step))


# ---- whole models


def pair(stage: Recorder) -> None:
    """A training step of Gen and Ctx at SmolLM2-135M's size, with cosup's losses and with plain ones."""
    cosups, plains = _steps(stage, {"cosup": (None, _our_loss), "plain": (None, _plain_loss)})
    stage.line("losses", wrong=int(not abs(cosups / plains - 1) < 0.01))


def patched(stage: Recorder) -> None:
    """A step of a whole model, patched and not."""
    small = "--vocabulary 300 --batch 2 8 --layers 1 --width 64 --steps 2".split()
    stage.record("step", patched_model.compare(small if stage.small else []))


def attention(stage: Recorder) -> None:
    """The same step with each attention that can be had."""
    known = {"sdpa": "torch", "flash_attention_2": "flash-attn", "flash_attention_4": "flash-attn-4"}
    there = [name for name, package in known.items() if version(package) and (name == "sdpa" or not stage.small)]
    _steps(stage, {name: (name, _our_loss) for name in ["eager", *there]})


def _steps(stage: Recorder, methods: dict[str, tuple[str | None, Callable[..., Tensor]]]) -> list[float]:
    """The loss of each method's first step; NaN where it raised."""
    found_losses = []
    size: dict[str, Any] = {"hidden": 64, "layers": 2} if stage.small else SMOLLM2
    rows, words = (4, 6) if stage.small else (32, 96)
    for name, (kind, loss) in methods.items():

        def found(kind: str | None = kind, loss: Callable[..., Tensor] = loss) -> Found:
            dtype = torch.float32 if stage.small else torch.bfloat16
            model = random_pair(stage.device, attention=kind, dtype=dtype, **size)
            batch = model.collator(passages(rows, words))(instances(rows, words))
            batch = {key: t.to(stage.device) for key, t in batch.items()}
            rest = {key: batch.pop(key) for key in ("labels", "query_target", "candidate_ids")}
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=not stage.small)

            def step() -> None:
                optimizer.zero_grad()
                value = loss(model, *model(**batch), *rest.values())
                value.backward()
                optimizer.step()
                values.append(value.detach())

            values: list[Tensor] = []
            timed = stage.timed(step)
            tokens = list(batch["input_ids"].shape)
            return timed | {"loss": values[0].item(), "Gen": tokens, "Ctx": list(batch["passage_input_ids"].shape)}

        line = stage.figure(name, found, ours="flash" not in name)
        found_losses.append(line.get("loss", float("nan")))
    return found_losses


def _our_loss(model, hidden, query, candidates, labels, target, ids) -> Tensor:
    head = model.lm_head[0]
    return cosup.co_supervision_loss(hidden, head, labels, query, candidates, target, candidate_ids=ids).loss


def _plain_loss(model, hidden, query, candidates, labels, target, ids) -> Tensor:
    """The same by logits: of passages that come once in a batch."""
    z = (hidden[:, :-1] @ model.lm_head[0].mT).float()
    tokens = F.cross_entropy(z.flatten(0, 1), labels[:, 1:].flatten())
    similar = F.normalize(query, dim=1) @ F.normalize(candidates, dim=1).mT
    return tokens + F.cross_entropy(similar.float() / TEMPERATURE, target)


# ---- where a call's time goes


def profile(stage: Recorder) -> None:
    """The largest kernels of one call of each loss."""
    x, w, target = linear_cross_entropy.random_operands(*stage.size(8192, 4096, 128256), torch.bfloat16, stage.device)
    few = target.masked_fill(torch.rand(len(target), device=stage.device) < 0.75, -100)
    head = x.requires_grad_(), w.requires_grad_()
    n, d = (128, 32) if stage.small else (65536, 1024)
    square = [t.requires_grad_() for t in info_nce.random_operands(n, n, d, torch.bfloat16, stage.device)]
    symmetric = partial(cosup.info_nce, normalize=False, symmetric=True)
    calls = {
        "linear_cross_entropy": partial(gradients, cosup.linear_cross_entropy, *head, target),
        "75 % ignored": partial(gradients, cosup.linear_cross_entropy, *head, few),
        "info_nce, symmetric": partial(gradients, symmetric, *square, None),
    }
    for name, call in calls.items():
        stage.figure(name, partial(_kernels_of, stage, name, call))


def _kernels_of(stage: Recorder, name: str, call: Callable[[], object]) -> Found:
    call()
    synchronize()
    kinds = [ProfilerActivity.CPU] if stage.small else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as found:
        call()
        synchronize()
    key = "self_cpu_time_total" if stage.small else "self_device_time_total"
    events = [e for e in found.key_averages() if getattr(e, key)]
    events = [e for e in events if stage.small or "cuda" in str(e.device_type).lower()]
    for place, e in enumerate(sorted(events, key=lambda e: -getattr(e, key))[:25]):
        stage.line(f"{name}: {e.key[:70]}", place < 6, calls=e.count, ms=getattr(e, key) / 1e3)
    return {"ms": sum(getattr(e, key) for e in events) / 1e3, "launches": sum(e.count for e in events)}
