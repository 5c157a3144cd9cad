"""cosup.patch on a whole model: seconds and memory of a training step, patched and not.

python bench/patched_model.py [--vocabulary 49152] [--batch 8 512] [--layers 2] [--width 576] [--steps 5]

A step is forward, backward and AdamW, on a GPU in bfloat16. Each model has a process of its own, and they take their
steps in turn, so that the machine is alike to both.

    resident_bytes    the most that the process held in a step: libraries, weights, optimizer, and what the step takes;
                      on a GPU the most that was allocated there
    step_bytes        the same above what it had to hold before the step: activations, gradients and the loss

The memory is of one more step, not timed, before which what glibc keeps of freed memory was given back: a step must not
find its room there, and look smaller than it is.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cosup
from cosup.bench import report

MODELS = ("plain", "patched")
SIZES = {"cpu": {"vocabulary": 49152, "batch": [8, 512], "layers": 2, "width": 576},
         "cuda": {"vocabulary": 128256, "batch": [8, 1024], "layers": 4, "width": 2048}}  # fmt: skip


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("cosup bench patched-model", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--vocabulary", type=report.positive, help="(%(default)s)")
    parser.add_argument("--batch", type=report.positive, nargs=2, metavar=("ROWS", "TOKENS"), help="(%(default)s)")
    parser.add_argument("--layers", type=report.positive, help="(%(default)s)")
    parser.add_argument("--width", type=report.positive, help="a multiple of 64 (%(default)s)")
    parser.add_argument("--steps", type=report.positive, default=5, help="of which the quickest counts (%(default)s)")
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)  # a process of one model
    parser.set_defaults(**SIZES[_device()])
    args = parser.parse_args(arguments)
    if args.width % 64:
        parser.error(f"--width: wanted a multiple of 64, got {args.width}")
    return args


def run(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    record = compare(sys.argv[1:] if arguments is None else arguments)
    report.show("patched_model", record)
    return report.save("patched_model", [record])


def compare(arguments: Sequence[str]) -> dict[str, Any]:
    """The record of both models' steps."""
    args = options(arguments)
    command = [sys.executable, __file__, *arguments, "--model"]
    processes = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in MODELS
    }
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in MODELS}
    for line in ["time\n"] * args.steps + ["memory\n"]:
        for name, process in processes.items():
            assert process.stdin and process.stdout
            with suppress(BrokenPipeError):  # it is gone: told below
                process.stdin.write(line)
                process.stdin.flush()
                steps[name] += [json.loads(told) for told in [process.stdout.readline()] if told]
    rows = [_row(name, steps[name], args.steps + 1) for name in MODELS]
    for process in processes.values():
        with suppress(BrokenPipeError):
            process.communicate()
    plain, patched = rows
    if not plain["failed"] and not patched["failed"]:
        patched["plain_ratio"] = min(patched["step_seconds"]) / min(plain["step_seconds"])
    size = {name: getattr(args, name) for name in ("vocabulary", "batch", "layers", "width")}
    return {"size": size, "rows": rows, "absent": {}}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _row(name: str, steps: list[dict[str, Any]], wanted: int) -> dict[str, Any]:
    row: dict[str, Any] = {"method": name, "failed": None, "step_seconds": [step["seconds"] for step in steps[:-1]]}
    if len(steps) < wanted:
        return row | {"failed": f"its process ended in step {len(steps) + 1}", "step_seconds": []}
    last = steps[-1]
    return row | {"step_bytes": last["resident_bytes"] - last["before_bytes"], "resident_bytes": last["resident_bytes"],
                  "loss": [step["loss"] for step in steps]}  # fmt: skip


def take_steps(args: argparse.Namespace) -> None:
    """A step for each line that comes in; what it took goes out."""
    torch.manual_seed(0)
    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    )  # fmt: skip
    device = _device()
    model = LlamaForCausalLM(config).train().to(device, torch.bfloat16 if device == "cuda" else torch.float32)
    if args.model == "patched":
        cosup.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(args.vocabulary, tuple(args.batch), device=device)
    for line in sys.stdin:
        optimizer.zero_grad()
        if line == "memory\n":
            _forget()
        before = _held()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        loss = loss.item()  # waits for the device
        seconds = time.perf_counter() - start
        row = {"seconds": seconds, "before_bytes": before, "resident_bytes": _most(), "loss": loss}
        print(json.dumps(row), flush=True)


def _held() -> int:
    return torch.cuda.memory_allocated() if _device() == "cuda" else psutil.Process().memory_info().rss


def _most() -> int:
    if _device() == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget() -> None:
    """Give freed memory, which glibc keeps, back to the system; take what is held now for the most that was."""
    if _device() == "cuda":
        return torch.cuda.reset_peak_memory_stats()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    alone = options(sys.argv[1:])
    if alone.model:
        take_steps(alone)
    else:
        run()
