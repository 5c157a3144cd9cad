"""What more candidates a query do, and what they cost: Gen and Ctx trained on the demo's text, once for each setting.

    batch              every candidate is a passage of the batch, with gradient; encoded in micro-batches
    batch and queue    those of the batch, and vectors of earlier batches
    batch and extra    those of the batch, and passages drawn for it, encoded without gradient

All go on from one pair, trained with batches of 64, and see the same queries in the same order at the same learning
rate. Held out: the share of questions whose passage is among the first 10 of all 10,033. Each runs in a process of its
own, whose most resident memory (on a GPU: allocated) is its peak.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.table import Table
from transformers.trainer_callback import PrinterCallback

from cosup.data import Instance, Reference, read_instances, read_passages
from cosup.data import smollm2 as smollm2_data
from cosup.data import wiki as wiki_data
from cosup.demo import autocast, console, fast_bfloat16, step
from cosup.evaluate import evaluate
from cosup.files import write_text
from cosup.index import SequenceIndex
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.train import CoSupConfig, CoSupTrainer

LAYERS = 2  # of 30, in both: all settings in minutes on two cores
FIRST, FIRST_RATE = 4096, 1e-3  # queries and learning rate of the common start: from weights that never retrieved
QUERIES, RATE = 8192, 5e-4  # of each setting; two batches of 4,096
MICRO_BATCH = 64
HELD_OUT = 400
MODEL = GenCtxConfig(mode="nsp", max_length=64, max_passage_length=16)


@dataclass
class Setting:
    batch: int
    queue: int = 0
    extra: int = 0

    @property
    def pool(self) -> int:
        """Candidates a query, where no passage comes twice and the queue is full."""
        return self.batch + self.queue + self.extra


SETTINGS = (
    Setting(64),
    Setting(512),
    Setting(64, queue=448),
    Setting(64, extra=448),
    Setting(4096),
    Setting(64, queue=4032),
    Setting(512, extra=3584),  # beside batches of 64 it would be eight times as many passages to encode
)


def run(out: Path, *, queries: int = QUERIES, dtype: str = "auto") -> list[dict[str, Any]]:
    """Train and measure each setting; print a table, leave pools.json in `out`. queries: seen in each training."""
    began = time.perf_counter()
    bf16 = dtype == "bfloat16" or (dtype == "auto" and fast_bfloat16())
    start = out / "start"
    with step("fetch text and weights"):
        wiki_data.build()
        smollm2_data.build()
    with step(f"train the common start with {FIRST:,} queries"):
        rows = [_alone(_start, start, bf16)]
    for setting in SETTINGS:
        with step(f"train and evaluate {setting}"):
            rows.append(_alone(_go_on, start, setting, queries, bf16))
    _show(rows, queries, bf16, time.perf_counter() - began)
    write_text(out / "pools.json", json.dumps(rows, indent=2) + "\n")
    return rows


def _alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """In a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def _start(start: Path, bf16: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    model = GenCtxModel.from_pretrained(smollm2_data.build(), config=MODEL, num_layers=LAYERS)
    row = _measure(model, Setting(64), FIRST, FIRST_RATE, bf16, start)
    model.save_pretrained(start)
    return row


def _go_on(start: Path, setting: Setting, queries: int, bf16: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    return _measure(GenCtxModel.from_pretrained(start), setting, queries, RATE, bf16, start)


def _measure(
    model: GenCtxModel, setting: Setting, queries: int, rate: float, bf16: bool, folder: Path
) -> dict[str, Any]:
    """Train as the setting says, and evaluate. folder: the trainer wants one; nothing is written."""
    files = wiki_data.build()
    corpus = read_passages(files.passages)
    train = [_query(instance) for instance in read_instances(files.train, corpus)]
    test = [_query(instance) for instance in read_instances(files.test, corpus)[:HELD_OUT]]
    seen = (train * -(-queries // len(train)))[:queries]
    config = CoSupConfig(
        output_dir=str(folder), num_train_epochs=1, train_sampling_strategy="sequential", save_strategy="no",
        per_device_train_batch_size=setting.batch, queue_size=setting.queue, extra_passages=setting.extra,
        micro_batch_size=MICRO_BATCH if setting.batch > MICRO_BATCH else None, learning_rate=rate, weight_decay=0.0,
        adam_beta2=0.95, bf16=bf16, logging_steps=1, report_to="none", disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = CoSupTrainer(model, config, train_dataset=seen, passages=corpus)
    trainer.remove_callback(PrinterCallback)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    logs = [log for log in trainer.state.log_history if "nsp_loss" in log]
    late = logs[len(logs) // 2 :]
    with autocast(bf16):
        index = SequenceIndex.from_model(model, corpus.values(), batch_size=128)
        recall = evaluate(model, test, index, bm25=False)["retrieval"]["Gen"]
    return {
        "pool": setting.pool, **asdict(setting), "steps": len(logs), "R@10": recall["R@10"], "R@100": recall["R@100"],
        "nsp_loss": sum(log["nsp_loss"] for log in late) / len(late), "seconds": seconds,
        "peak_memory_MB": logs[-1]["peak_memory_MB"],
    }  # fmt: skip


def _query(instance: Instance) -> Instance:
    """The question and its passage, with nothing to write."""
    (reference,) = instance.references
    return replace(instance, output=(Reference(reference.passage),))


def _show(rows: list[dict[str, Any]], queries: int, bf16: bool, seconds: float) -> None:
    table = Table(
        title=f"first the start, then {queries:,} queries from there; {HELD_OUT} held out", title_justify="left"
    )
    for name in ("pool", "batch", "queue", "extra", "steps", "R@10", "R@100", "loss", "s", "MB"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        numbers = (f"{row[name]:,}" for name in ("pool", "batch", "queue", "extra", "steps"))
        shares = (f"{row[name]:.3f}" for name in ("R@10", "R@100", "nsp_loss"))
        table.add_row(*numbers, *shares, f"{row['seconds']:.0f}", f"{row['peak_memory_MB']:,.0f}")
    console.print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    console.print(
        f"loss: of the second half of the queries, among their pool; s: of training; MB: most resident. {device}, "
        f"{'bfloat16' if bf16 else 'float32'} products, Python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}; {seconds:.0f} s in all",
        highlight=False,
    )
