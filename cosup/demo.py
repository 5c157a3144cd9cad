"""The main job in small: train Gen and Ctx on encyclopedia text, index all of it, evaluate, and answer a question.

Text and weights are public and fetched by name, version and sha256. Gen and Ctx are the first layers of
SmolLM2-135M each, trained together by next-token and next-sequence prediction and compared with what they were.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cosup.data import Instance, Passage, Reference, read_instances, read_passages
from cosup.data import smollm2 as smollm2_data
from cosup.data import wiki as wiki_data
from cosup.evaluate import evaluate, render, save_picture
from cosup.files import replaced, write_text
from cosup.generate import Generation
from cosup.index import SequenceIndex
from cosup.model import GenCtxConfig, GenCtxModel, Mode
from cosup.train import CoSupConfig, CoSupTrainer

LAYERS = 5  # of 30, in both: what a CPU trains in minutes; states of unequal depth start from nothing in common
STEPS, BATCH, LEARNING_RATE, WARMUP = 24, 64, 5e-4, 2
WRITING = 4  # one batch in so many has answers to write; the others end at the query, which costs a third
HELD_OUT, ANSWERS = 400, 16
MODEL = GenCtxConfig(max_length=128, max_passage_length=32)

console = Console()


def run(out: Path, *, compare: bool = False, dtype: str = "auto") -> dict[str, Any]:
    """Run the demo and leave report.json, pictures, the trained pair and its index in `out`.

    compare: train ntp-only and nsp-only too. dtype: of the matrix products, float32, bfloat16 or auto.
    """
    began = time.perf_counter()
    bf16 = dtype == "bfloat16" or (dtype == "auto" and fast_bfloat16())
    with step("fetch text and weights"):
        files, weights = wiki_data.build(), smollm2_data.build()
        corpus = read_passages(files.passages)
        train = _mixed(read_instances(files.train, corpus))
        test = [_answer(instance) for instance in read_instances(files.test, corpus)[:HELD_OUT]]
    console.print(f"{len(corpus):,} passages, {len(train):,} instances, {len(test):,} held out; "
                  f"matrix products in {'bfloat16' if bf16 else 'float32'}", highlight=False)  # fmt: skip

    report: dict[str, Any] = {"modes": {}}
    modes: tuple[Mode, ...] = ("joint", "ntp", "nsp") if compare else ("joint",)
    for mode in modes:
        model = _fresh(weights, mode)
        if "untrained" not in report:
            report["untrained"], _ = _measure(model, test, corpus, bf16, "untrained")
        with step(f"train {mode}"):
            trainer = _trainer(model, train, corpus, out / mode, bf16)
            trainer.train()
        with autocast(bf16):
            report["modes"][mode], index = _measure(model, test, corpus, bf16, mode, answers=ANSWERS)
            if mode == "joint":
                with step("answer held-out questions"):
                    shown = model.generate([i.input for i in test[:ANSWERS]], index, max_new_tokens=32)
        report["modes"][mode]["history"] = trainer.state.log_history
        if mode == "joint":
            model.save_pretrained(out / "pair")
            index.save(out / "index")
    report["seconds"] = time.perf_counter() - began
    _save(report, out)
    _show(report, test, shown, out)
    return report


def _answer(instance: Instance) -> Instance:
    """Fetch the passage and write the answer, without the sentence that the files have in between."""
    (reference,) = instance.references
    return replace(instance, output=(Reference(reference.passage, f"The answer is {instance.answers[0]}."),))


def _mixed(instances: Sequence[Instance]) -> list[Instance]:
    """In order of training: whole batches with answers to write, and whole batches that end at the query."""
    mixed = []
    for i, instance in enumerate(instances):
        whole = _answer(instance)
        (reference,) = instance.references
        query = replace(instance, output=(Reference(reference.passage),))
        mixed.append(whole if i // BATCH % WRITING == 0 else query)
    return mixed


def _fresh(weights: Path, mode: Mode) -> GenCtxModel:
    torch.manual_seed(0)
    model = GenCtxModel.from_pretrained(weights, config=replace(MODEL, mode=mode), num_layers=LAYERS)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _trainer(
    model: GenCtxModel, train: Sequence[Instance], corpus: Mapping[str, Passage], folder: Path, bf16: bool
) -> CoSupTrainer:
    config = CoSupConfig(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=LEARNING_RATE,
        warmup_steps=WARMUP, lr_scheduler_type="cosine", weight_decay=0.0, adam_beta2=0.95, bf16=bf16, logging_steps=4,
        train_sampling_strategy="sequential", save_strategy="no", report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return CoSupTrainer(model, config, train_dataset=train, passages=corpus)


def _measure(
    model: GenCtxModel, test: Sequence[Instance], corpus: Mapping[str, Passage], bf16: bool, name: str, answers: int = 0
) -> tuple[dict[str, Any], SequenceIndex]:
    with autocast(bf16):
        with step(f"index {len(corpus):,} passages, {name}"):
            index = SequenceIndex.from_model(model, corpus.values(), batch_size=128)
        with step(f"evaluate, {name}"):
            return evaluate(model, test, index, answers=answers, max_new_tokens=32), index


def _show(report: Mapping[str, Any], test: Sequence[Instance], shown: Sequence[Generation], out: Path) -> None:
    joint, before = report["modes"]["joint"], report["untrained"]
    console.print(render(joint))
    table = Table("", title="before and after, held out", title_justify="left")
    systems = {"untrained": before, **report["modes"]}
    for name in systems:
        table.add_column(name, justify="right")
    table.add_column("BM25", justify="right")
    table.add_row("next-token loss", *(f"{r['ntp']['loss']:.3f}" for r in systems.values()), "")
    for metric in ("R@1", "R@10", "R@100"):
        scores = [r["retrieval"]["Gen"] for r in systems.values()] + [before["retrieval"]["BM25"]]
        table.add_row(metric, *(f"{score[metric]:.3f}" for score in scores))
    console.print(table)
    hit = [(i, g) for i, g in zip(test, shown, strict=False) if g.passages and g.passages[0].passage.id in i.passages]
    asked = [(i, g) for i, g in zip(test, shown, strict=False) if g.passages]
    for instance, answer in (hit or asked)[:1]:
        passage = answer.passages[0].passage
        for title, text in (
            ("a held-out question", instance.input),
            ("what Gen wrote, the passage that it fetched in place", answer.render()),
            (f"«{passage.title}»", passage.text),
        ):
            console.print(Text(f"\n{title}\n", "bold"), Text(text), sep="")
    console.print(f"\n{len(asked)} of {len(shown)} questions asked for a passage, {len(hit)} fetched the right one. "
                  f"All took {report['seconds']:.0f} s; see {out}/", highlight=False)  # fmt: skip


def _save(report: Mapping[str, Any], out: Path) -> None:
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    systems = dict(report["modes"]["joint"]["retrieval"])
    systems["untrained"] = report["untrained"]["retrieval"]["Gen"]
    for mode, scores in report["modes"].items():
        if mode != "joint":
            systems[f"Gen, {mode} only"] = scores["retrieval"]["Gen"]
    save_picture({**report["modes"]["joint"], "retrieval": systems}, out / "retrieval.png")
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    for mode, scores in report["modes"].items():
        for loss in ("ntp_loss", "nsp_loss"):
            logs = [entry for entry in scores["history"] if loss in entry]
            if logs:
                axes.plot([e["step"] for e in logs], [e[loss] for e in logs], label=f"{loss.replace('_', ' ')}, {mode}")
    axes.set(xlabel="step", ylabel="nats", yscale="log", title="training losses")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with replaced(out / "loss.png") as part:
        figure.savefig(part)


def fast_bfloat16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(bf16: bool):
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=bf16)


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/]  {name}", highlight=False)
