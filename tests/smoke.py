"""What an installed cosup must do without its clone: python tests/smoke.py, by the Python that it is installed for.

It needs tiny.py beside it, and nothing else: models, tokenizer and data are made here, in a temporary folder. Its last
line is one JSON object: where cosup lies, and what `cosup doctor` says of its kernels.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

import cosup
from cosup.data import write_jsonl
from cosup.model import GenCtxModel
from tiny import tiny_encoder, tiny_folder, tiny_gen, tiny_instances, tiny_passages

COMMAND = Path(sys.executable).with_name("cosup")


def run(*arguments: object) -> str:
    return subprocess.run([COMMAND, *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True).stdout


def loss_and_gradients() -> None:
    """By the native library, against plain PyTorch."""
    torch.manual_seed(0)
    x, w = torch.randn(7, 16, requires_grad=True), torch.randn(33, 16, requires_grad=True)
    target = torch.randint(33, (7,))
    ours = cosup.linear_cross_entropy(x, w, target, backend="native")
    plain = F.cross_entropy(x @ w.mT, target)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, w)), torch.autograd.grad(plain, (x, w)))


def training(folder: Path) -> None:
    """Two steps of a tiny pair, and the pair it leaves."""
    write_jsonl(folder / "passages.jsonl", tiny_passages(8).values())
    write_jsonl(folder / "instances.jsonl", tiny_instances(8))
    gen, ctx = tiny_folder(folder / "gen", tiny_gen()), tiny_folder(folder / "ctx", tiny_encoder())
    run("train", "--gen", gen, "--ctx", ctx, "--instances", folder / "instances.jsonl", "--passages",
        folder / "passages.jsonl", "--output_dir", folder / "pair", "--max_steps", 2, "--logging_steps", 1,
        "--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu", "true")  # fmt: skip
    figures = GenCtxModel.from_pretrained(folder / "pair").training_figures
    assert figures["steps"] == 2 and figures["ntp_loss"] > 0 and figures["nsp_loss"] > 0, figures


if __name__ == "__main__":
    doctor = json.loads(run("doctor", "--json"))
    loss_and_gradients()
    with tempfile.TemporaryDirectory() as folder:
        training(Path(folder))
    print(json.dumps({"cosup": str(Path(cosup.__file__)), "kernels": doctor["CPU kernels"]["state"]}))
