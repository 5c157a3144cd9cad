"""cosup.patch on a whole model: seconds and memory of a training step, patched and not.

python bench/patched_model.py [--vocabulary 49152] [--batch 8 512] [--layers 2] [--width 576] [--steps 5]

A step is forward, backward and AdamW. Each model has a process of its own, and they take their steps in turn, so that
the machine is alike to both.

    resident_MB    the most that the process ever held: libraries, weights, optimizer, and a step
    step_MB        the same above what it held before the last step: activations, gradients and the loss
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cosup
from cosup.bench import report

MODELS = ("plain", "patched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--batch", type=int, nargs=2, default=[8, 512], metavar=("ROWS", "TOKENS"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=576, help="a multiple of 64")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--model", choices=MODELS, help=argparse.SUPPRESS)  # a process of one model
    args = parser.parse_args()
    if args.model:
        take_steps(args)
        return
    command = [sys.executable, __file__, *sys.argv[1:], "--model"]
    processes = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name in MODELS
    }
    rows: dict[str, list[dict]] = {name: [] for name in MODELS}
    for _ in range(args.steps):
        for name, process in processes.items():
            assert process.stdin and process.stdout
            process.stdin.write("step\n")
            process.stdin.flush()
            rows[name].append(json.loads(process.stdout.readline()))
    for process in processes.values():
        process.communicate()
    record: dict = {
        name: {"seconds": [row["seconds"] for row in of], "resident_MB": of[-1]["resident_MB"],
               "step_MB": of[-1]["resident_MB"] - of[-1]["before_MB"], "loss": [row["loss"] for row in of]}
        for name, of in rows.items()
    }  # fmt: skip
    plain, patched = (record[name] for name in MODELS)
    for what in ("resident_MB", "step_MB"):
        record[f"{what}_ratio"] = round(patched[what] / plain[what], 3)
    record["seconds_ratio"] = round(min(patched["seconds"]) / min(plain["seconds"]), 3)
    print(json.dumps({**report.environment(), **vars(args), **record}))


def take_steps(args: argparse.Namespace) -> None:
    """A step for each line that comes in; what it took goes out."""
    torch.manual_seed(0)
    heads = args.width // 64
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.width, intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train()
    if args.model == "patched":
        cosup.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(args.vocabulary, tuple(args.batch))
    for _ in sys.stdin:
        optimizer.zero_grad()
        before = psutil.Process().memory_info().rss
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        row = {"seconds": round(seconds, 3), "before_MB": round(before / 1e6), "resident_MB": round(resident / 1e6),
               "loss": round(loss.item(), 5)}  # fmt: skip
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
