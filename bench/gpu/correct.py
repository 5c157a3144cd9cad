"""Stages that ask whether it is right. They run side by side; their lines say ``wrong`` where it is not."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import cosup
from cosup import gemm, ops
from cosup.bench.gpu.recorder import ROUNDED, Found, Recorder, allowed, off, synchronize
from cosup.bench.linear_cross_entropy import random_operands
from cosup.bench.measure import Loss, gradients
from cosup.plan import Cost, Plan, Strategy, plan

HERE = Path(__file__).parent
SUITE = ("test_tiles.py", "test_counted.py", "test_gemm.py", "test_sigmoid.py", "test_positives.py", "test_losses.py")
PICKED = "not test_error_of_every_feature and not any_shape"  # the rest of them fits a minute
LOSS_ERROR = 1e-4  # of a head's loss, relative; a temperature multiplies the rounding of vectors and products


# ---- products


def products(stage: Recorder) -> None:
    """As the engine asks for them: into padded rows, over NaN, of one row, from 16-bit views of float32 rows."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for rows in (300, 1):
            stage.figure(f"{rows} rows, {dtype}", partial(_products, stage, rows, dtype))


def _products(stage: Recorder, rows: int, dtype: torch.dtype) -> Found:
    x, w, _ = _operands(stage, rows, 128, 1000, dtype)
    wide = torch.float32 if x.is_cuda else dtype
    room = torch.full((rows, 1008), float("nan"), dtype=wide, device=stage.device)
    gemm.dots(x, w, room[:, :1000])
    found = {"dots": off(room[:, :1000], x.double() @ w.double().mT)}
    untouched = bool(room[:, 1000:].isnan().all())
    coef = room.view(dtype)[:, :1000].copy_(torch.randn(rows, 1000, device=stage.device))
    for name, a, b in (("dx", coef, w), ("dw", coef.mT, x)):
        total = torch.full((len(a), 128), float("nan"), dtype=wide, device=stage.device)
        true = a.double() @ b.double()
        gemm.add(total, a, b, first=True)
        found[name] = off(total, true)
        gemm.add(total, a, b, first=False)
        found[f"{name} added"] = off(total, 2 * true)
    wrong = sum(error > allowed(wide, 0.0, 1000) for error in found.values()) + (not untouched)
    return found | {"wrong": wrong}


# ---- losses, against float64 and beside plain PyTorch


def losses(stage: Recorder, dtype_name: str, rows: str) -> None:
    """Every loss and feature, in both strategies."""
    dtype = getattr(torch, dtype_name)
    n, d, columns, m_step = (16, 32, (83,), 32) if stage.small else (512, 256, (5008, 5003), 1008)
    slabs = {"block_rows": n // 2 - 1, "block_cols": m_step, "strip_cols": m_step} if rows == "slabs" else {}
    for m in columns:
        for name, (ours, plain) in features(stage.device, n, m).items():
            labels = "nce" not in name and "sigmoid" not in name
            find = partial(_compared, stage, ours, plain, dtype, (n, d, m), slabs, labels)
            stage.figure(f"{name}, {m} columns", find, show=False)


def _compared(stage: Recorder, ours: Callable[..., Tensor], plain: Loss, dtype: torch.dtype,
              shape: tuple[int, int, int], slabs: dict[str, int], labels: bool) -> Found:  # fmt: skip
    """slabs: the tile to take in place of the planned one, where a sweep of statistics comes first."""
    torch.manual_seed(0)
    n, d, m = shape
    x, w, _ = _operands(stage, n, d, m, dtype)
    x = 4 * x  # rows that are not flat
    target = torch.randperm(m, device=stage.device)[:n]
    if labels:
        target[::7] = -100
    up = 1024.0 if dtype == torch.float16 else 1.0  # 16-bit coefficients of a mean would vanish
    backend = "triton" if stage.small and dtype != torch.bfloat16 else "auto"  # the interpreter is wrong for bfloat16

    def run(loss: Loss, *operands: Tensor) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in operands]
        value = loss(*leaves, target)
        return [value.detach(), *(g / up for g in torch.autograd.grad(up * value, leaves))]

    true = run(plain, x.double(), w.double())
    plans: list[Plan] = []

    def planned(n: int, m: int, cost: Cost, **options: Any) -> Plan:
        found = plan(n, m, cost, **options)
        if slabs and not cost.strips_alone:
            found = found._replace(strategy=Strategy.RECOMPUTE, **slabs)
        plans.append(found)
        return found

    with patch.object(ops, "plan", planned):
        found = run(partial(ours, workspace_bytes=64 << 20, backend=backend), x, w)
    theirs = [off(a, b) for a, b in zip(run(plain, x, w), true, strict=True)]
    mine = [off(a, b) for a, b in zip(found, true, strict=True)]
    wrong = sum(not a <= allowed(dtype, b, m) for a, b in zip(mine[1:], theirs[1:], strict=True))
    wrong += not mine[0] <= (max(2 * theirs[0], LOSS_ERROR) if labels else allowed(dtype, theirs[0], m))
    names = sorted({f"{p.strategy.name} {p.block_rows}x{p.block_cols}" for p in plans})
    return {"plans": names, "loss, dx, dw": mine, "plain": theirs, "wrong": int(wrong)}


def features(device: str, n: int, m: int) -> dict[str, tuple[Callable[..., Tensor], Loss]]:
    """name: the function of cosup, and the same in plain PyTorch of any dtype."""
    bias, ids = torch.randn(m, device=device), torch.randint(m // 3, (m,), device=device)
    weight, warm = torch.rand(n, device=device), torch.tensor(0.07, device=device)
    columns = torch.arange(m, device=device)

    def wide(z: Tensor) -> Tensor:
        return z if z.dtype == torch.float64 else z.float()

    def head(x, w, t, cap=None, bias=None, z_loss=0.0, **options):
        z = wide(x @ w.mT) if bias is None else wide(x @ w.mT) + bias
        z = cap * torch.tanh(z / cap) if cap else z
        return F.cross_entropy(z, t, **options) + z_loss * (z.logsumexp(1)[t >= 0] ** 2).mean()

    def each(x, w, t):
        return (weight * F.cross_entropy(wide(x @ w.mT), t, reduction="none")).sum()

    def policy(x, w, t):
        logp = wide(x @ w.mT).log_softmax(1)
        own = logp.gather(1, t.clamp(min=0)[:, None])[:, 0]
        return (weight * (t >= 0) * (own - 0.1 * (logp.exp() * logp).sum(1))).sum()

    def pool(x, w, t, temperature=0.05, symmetric=False, ids=None):
        z = wide(F.normalize(x, dim=1) @ F.normalize(w, dim=1).mT) / temperature
        if ids is not None:
            z = z.masked_fill((ids[t][:, None] == ids) & (t[:, None] != columns), float("-inf"))
        rows = F.cross_entropy(z, t)
        return (rows + F.cross_entropy(z.mT[t], torch.arange(len(x), device=device))) / 2 if symmetric else rows

    def pairs(x, w, t):
        z = wide(F.normalize(x, dim=1) @ F.normalize(w, dim=1).mT) / 0.1 - 10
        return -F.logsigmoid(torch.where(t[:, None] == columns, z, -z)).sum() / len(x)

    lce, nce = cosup.linear_cross_entropy, cosup.info_nce

    def our_policy(x, w, t, **options):
        found = cosup.linear_log_prob(x, w, t, **options)
        return (weight * (found.log_prob + 0.1 * found.entropy)).sum()

    return {
        "mean": (lce, head),
        "none": (lambda *a, **k: (weight * lce(*a, reduction="none", **k)).sum(), each),
        "softcap, bias": (partial(lce, logit_softcap=5.0, linear_bias=bias), partial(head, cap=5.0, bias=bias)),
        "smoothing, z-loss": (partial(lce, label_smoothing=0.1, z_loss=1e-3),
                              partial(head, label_smoothing=0.1, z_loss=1e-3)),
        "log_prob": (our_policy, policy),
        "info_nce": (nce, pool),
        "info_nce, ids": (partial(nce, candidate_ids=ids), partial(pool, ids=ids)),
        "info_nce, symmetric": (partial(nce, symmetric=True, temperature=warm),
                                partial(pool, symmetric=True, temperature=0.07)),
        "info_nce, symmetric, ids": (partial(nce, symmetric=True, candidate_ids=ids),
                                     partial(pool, symmetric=True, ids=ids)),
        "sigmoid": (partial(cosup.sigmoid_loss, temperature=0.1, bias=-10.0), pairs),
    }  # fmt: skip


# ---- the rest of what users do


def suite(stage: Recorder) -> None:
    """The part of cosup's own tests that takes the device there is, where the clone is at hand."""
    tests = [root / "tests" for root in (HERE.parents[1], HERE.parents[2]) if (root / "tests" / SUITE[0]).is_file()]
    if not tests:
        return stage.line("no clone", skipped="cosup is installed without its tests")
    files = [str(tests[0] / name) for name in (["test_gemm.py"] if stage.small else SUITE)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", "-k", PICKED, *files]
    if not stage.small and importlib.util.find_spec("xdist"):
        command += ["-n", str(max(1, (os.cpu_count() or 2) // 2))]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tests[0].parent)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|error)", found.stdout.splitlines()[-1])}
    for line in re.findall(r"^(?:FAILED|ERROR) (.*)", found.stdout, re.M):
        stage.line("test", wrong=1, says=line[-200:])
    stage.line("suite", **counts, wrong=int(found.returncode != 0))


def patched(stage: Recorder) -> None:
    """cosup.patch on a small Llama: loss and gradients as before."""
    from transformers import LlamaConfig, LlamaForCausalLM

    d, v, tokens = (64, 500, 33) if stage.small else (1024, 32000, 513)
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=d, intermediate_size=2 * d, vocab_size=v, num_hidden_layers=2,
                         num_attention_heads=8, num_key_value_heads=4)  # fmt: skip
    model = LlamaForCausalLM(config).to(stage.device)
    ids = torch.randint(v, (2, tokens), device=stage.device)
    labels = ids.masked_fill(torch.rand(ids.shape, device=stage.device) < 0.2, -100)

    def step(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model.to(dtype).train().zero_grad()
        outputs = model(input_ids=ids, labels=labels)
        outputs.loss.backward()
        return outputs, torch.cat([p.grad.double().flatten() for p in model.parameters()])

    def compared(dtype: torch.dtype) -> Found:
        before, theirs = step(dtype)
        cosup.patch(model)
        after, mine = step(dtype)
        cosup.unpatch(model)
        found = {"loss": abs(after.loss.item() / before.loss.item() - 1), "gradients": off(mine, theirs)}
        worst = 4 * ROUNDED[dtype] if dtype != torch.float32 else 1e-5
        wrong = sum(not error <= worst for error in found.values())
        return found | {"wrong": wrong + (after.logits is not None)}

    for dtype in (torch.float32, torch.bfloat16):
        stage.figure(f"patched, {dtype}", partial(compared, dtype))


def graph(stage: Recorder) -> None:
    """A CUDA graph of loss and gradients, replayed with other operands, is the call with them: bit for bit."""
    shape = stage.size(8192, 1024, 32000)
    for name, mib, ignored in (("slabs", 64, 0.0), ("whole rows", 1024, 0.0), ("counted rows", 2048, 0.7)):
        x, w, target = _operands(stage, *shape, torch.bfloat16, grad=True)
        target[torch.rand(len(target), device=stage.device) < ignored] = -100
        loss = partial(cosup.linear_cross_entropy, workspace_bytes=stage.mib(mib) << 20)
        run = partial(gradients, loss, x, w, target)

        def replayed(run=run, x=x, target=target) -> Found:
            kept = run()
            if not stage.small:
                side = torch.cuda.Stream()
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    run()
                torch.cuda.current_stream().wait_stream(side)
                captured = torch.cuda.CUDAGraph()
                with torch.cuda.graph(captured):
                    kept = run()
            with torch.no_grad():
                x.mul_(0.5)
                target.copy_(target.flip(0))
            if not stage.small:
                captured.replay()
                synchronize()
            else:
                kept = run()
            return {"wrong": sum(not torch.equal(a, b) for a, b in zip(kept, run(), strict=True))}

        stage.figure(name, replayed)


def compiled(stage: Recorder) -> None:
    """torch.compile(fullgraph=True) around the loss, and autocast: the eager call, bit for bit."""
    x, w, target = _operands(stage, *stage.size(2048, 1024, 32000), torch.float32, grad=True)
    plain = partial(cosup.linear_cross_entropy, workspace_bytes=stage.mib(256) << 20)

    def loss(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
        return 2 * plain(1.5 * x, w, target)

    def differ(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> Found:
        return {"wrong": sum(not torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted, strict=True))}

    def autocast() -> Found:
        with torch.autocast(x.device.type, torch.bfloat16):
            found = gradients(plain, x, w, target)
        bare = (t.detach().bfloat16().requires_grad_() for t in (x, w))
        return differ(found, gradients(plain, *bare, target))

    def fullgraph() -> Found:
        found = gradients(torch.compile(loss, fullgraph=True), x, w, target)
        errors = [off(a, b.double()) for a, b in zip(found, gradients(loss, x, w, target), strict=True)]
        return {"dx, dw": errors, "wrong": int(max(errors) > 1e-6)}  # Inductor may round 1.5 x otherwise

    stage.figure("autocast", autocast)
    stage.figure("torch.compile, fullgraph", fullgraph)


def full(stage: Recorder) -> None:
    """Whole calls of full size, in small blocks and in one tile, against samples of rows and of columns: a published
    shape, and one of more logits than 2^31."""
    for shape, budgets in (((8192, 4096, 128256), (256, 1024, 4096)), ((70000, 512, 50257), (256, 16384))):
        n, d, v = stage.size(*shape)
        x, w, target = _operands(stage, n, d, v, torch.bfloat16, grad=True)
        rows, columns = (torch.randint(k, (64,), device=stage.device) for k in (n, v))
        rows[0], columns[0] = n - 1, v - 1
        for mib in budgets:
            find = partial(_sampled, x, w, target, rows, columns, stage.mib(mib) << 20)
            stage.figure(f"{n} x {d} x {v}, {mib} MiB", find)


def _sampled(x: Tensor, w: Tensor, target: Tensor, rows: Tensor, columns: Tensor, budget: int) -> Found:
    w64, x64 = w.detach().double(), x.detach()[rows].double()
    loss, stats = cosup.linear_cross_entropy(x, w, target, reduction="sum", return_stats=True, workspace_bytes=budget)
    dx, dw = torch.autograd.grad(loss, (x, w))
    logp = (x64 @ w64.mT).log_softmax(1)
    p = logp.exp()
    p[torch.arange(len(rows), device=x.device), target[rows]] -= 1
    p_columns = (x.detach().float() @ w.detach()[columns].float().mT - stats.lse[:, None]).exp().double()
    p_columns -= (target[:, None] == columns).double()
    nll = (stats.nll[rows] + logp.gather(1, target[rows][:, None])[:, 0]).abs().max().item()
    found = {"dx": off(dx[rows], p @ w64), "dw": off(dw[columns], p_columns.mT @ x.detach().double())}
    wrong = sum(not error <= allowed(torch.bfloat16, 0.0, len(x)) for error in found.values())
    return {"nll": nll, **found, "wrong": wrong + (not nll <= 0.01)}


def ranks(stage: Recorder) -> None:
    """A class that is as likely as the target is not above it, whether a row is one tile or several."""
    n, d, v = stage.size(2048, 1024, 32000)
    w = torch.randint(2, (v, d), device=stage.device).mul_(2).sub_(1).bfloat16()  # sums are exact in any order
    half = v // 2
    w[half : 2 * half] = w[:half]
    target = torch.randint(half, (n,), device=stage.device)
    x = w[target]

    def counted(mib: int) -> Found:
        _, stats = cosup.linear_cross_entropy(x, w, target, return_stats=True, workspace_bytes=stage.mib(mib) << 20)
        return {"wrong": int((~stats.top1).sum())}

    for mib in (16, 1024):
        stage.figure(f"{mib} MiB", partial(counted, mib))


def quiet(stage: Recorder) -> None:
    """No word to the host in a step, also where labels are ignored."""
    x, w, target = _operands(stage, *stage.size(4096, 2048, 65536), torch.bfloat16, grad=True)
    few = target.masked_fill(torch.rand(len(target), device=stage.device) < 0.75, -100)
    steps: dict[str, tuple[Loss, Tensor | None]] = {
        "loss": (cosup.linear_cross_entropy, target),
        "75 % ignored": (cosup.linear_cross_entropy, few),
        "info_nce": (partial(cosup.info_nce, symmetric=True), None),
    }

    def silent(loss: Loss, target: Tensor | None) -> Found:
        gradients(loss, x, w, target)
        if not stage.small:
            torch.cuda.set_sync_debug_mode("error")
        try:
            gradients(loss, x, w, target)
        finally:
            if not stage.small:
                torch.cuda.set_sync_debug_mode("default")
        return {"wrong": 0}

    for name, step in steps.items():
        stage.figure(name, partial(silent, *step))


def generation(stage: Recorder) -> None:
    """A Gen/Ctx pair embeds, searches and writes; its loss has gradients in both."""
    from cosup.bench.gpu.pair import instances, passages, random_pair
    from cosup.index import SequenceIndex

    model = random_pair(stage.device, hidden=64, layers=2)
    index = SequenceIndex.from_model(model.eval(), passages(16).values())
    answers = model.generate(["Which?", "What?"], index, max_new_tokens=8)
    batch = model.train().collator(passages(16))(instances(8))
    batch = {name: t.to(stage.device) for name, t in batch.items()}
    labels, target, ids = (batch.pop(name) for name in ("labels", "query_target", "candidate_ids"))
    hidden, query, candidates = model(**batch)
    found = cosup.co_supervision_loss(hidden, model.lm_head[0], labels, query, candidates, target, candidate_ids=ids)
    found.loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    stage.line("pair", answers=len(answers), loss=found.loss.item(), wrong=len(missing) + (len(answers) != 2))


def devices(stage: Recorder) -> None:
    """Tensors of another GPU than the current one."""
    if stage.small or torch.cuda.device_count() < 2:
        return stage.line("cuda:1", skipped="one device")
    x, w, target = _operands(stage, 512, 256, 5003, torch.bfloat16, grad=True)
    here = gradients(cosup.linear_cross_entropy, x, w, target)
    other = (t.detach().to("cuda:1").requires_grad_(t.is_floating_point()) for t in (x, w, target))
    there = gradients(cosup.linear_cross_entropy, *other)
    stage.line("cuda:1", wrong=sum(not torch.equal(a, b.to(a.device)) for a, b in zip(here, there, strict=True)))


def sanitizer(stage: Recorder) -> None:
    """compute-sanitizer over small ragged calls of every kernel."""
    tool = shutil.which("compute-sanitizer")
    quiet = ["--tool", "memcheck", "--report-api-errors", "no"]  # what a library asks and is refused is no fault
    command = [tool, *quiet, "--launch-timeout", "100"] if tool and not stage.small else []
    call = f"import torch\nfrom {__name__} import ragged\nragged({stage.device!r})\nprint('all called')"
    found = subprocess.run([*command, sys.executable, "-c", call], capture_output=True, text=True)
    said = re.findall(r"ERROR SUMMARY: (\d+) error", found.stdout)
    if command and not said:
        return stage.line("memcheck", skipped=f"refused: {found.stdout.strip()[-160:]}")
    wrong = (int(said[0]) if said else 0) + ("all called" not in found.stdout)
    says = {"says": found.stderr[-160:]} if wrong else {}
    stage.line("memcheck" if command else "without compute-sanitizer", wrong=wrong, **says)


def ragged(device: str) -> None:
    """Every loss at shapes that no block divides."""
    n, m, d = 37, 203, 40
    for dtype in (torch.bfloat16, torch.float32):
        for place, (ours, _) in enumerate(features(device, n, m).values()):
            for budget in (1 << 20, 40 << 10)[: 1 + (place % 2 == 0)]:
                x, w = (torch.randn(k, d, device=device).to(dtype).requires_grad_() for k in (n, m))
                target = torch.randperm(m, device=device)[:n]
                gradients(partial(ours, workspace_bytes=budget), x, w, target)
    synchronize()


def bad_target(stage: Recorder) -> None:
    """What is read of a target out of range. Last: it takes the process's CUDA context down."""
    x, w, target = _operands(stage, *stage.size(1024, 1024, 32000), torch.bfloat16, grad=True)
    target[3] = len(w)
    try:
        gradients(cosup.linear_cross_entropy, x, w, target)
        synchronize()
    except Exception as error:
        return stage.line("target out of range", raised=type(error).__name__, says=" ".join(str(error).split())[:160])
    stage.line("target out of range", wrong=1, says="nothing raised")


def _operands(stage: Recorder, n: int, d: int, m: int, dtype: torch.dtype, *,
              grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    x, w, target = random_operands(n, d, m, dtype, stage.device)
    return x.requires_grad_(grad), w.requires_grad_(grad), target
