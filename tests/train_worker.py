"""A tiny training run with dropout, accumulation, shuffling; as a script it hangs amid a step, to be killed there.

python train_worker.py FOLDER STEP      trains into FOLDER, prints "hanging" halfway through step STEP + 1
"""

import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from cosup import walk
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.train import CoSupConfig, CoSupTrainer
from tiny import tiny_encoder, tiny_instances, tiny_passages, tiny_tokenizer

N = 22  # instances: 11 micro-batches, 6 steps an epoch, the last of one micro-batch


def make_trainer(folder: Path, callbacks: list[TrainerCallback] | None = None, config: type[CoSupConfig] = CoSupConfig,
                 **options: object) -> CoSupTrainer:  # fmt: skip
    """Always the same run, whichever process makes it."""
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=300, n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=0
    )
    model = GenCtxModel(
        GPT2LMHeadModel(gpt2),  # drops out 0.1, as the encoder does
        tiny_encoder(),
        tiny_tokenizer(),
        tiny_tokenizer(),
        GenCtxConfig(learn_temperature=True, max_length=128, max_passage_length=24),
    )
    settings = dict(learning_rate=1e-2, max_steps=24, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    settings |= dict(logging_steps=1, save_steps=4, use_cpu=True, disable_tqdm=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # negatives do not accumulate
        return CoSupTrainer(
            model,
            config(output_dir=str(folder), **settings | options),
            train_dataset=tiny_instances(N),
            passages=tiny_passages(N),
            callbacks=callbacks,
        )


def machine(free: int):
    """A context: a new process, on a machine with so many bytes free, where even the least budget follows them."""
    return mock.patch.multiple(walk, LEAST_WORKSPACE=0, _free_bytes=lambda device: free, _workspaces={})


class Hang(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args, state, control, **_):
        if state.global_step == self.step:
            print("hanging", flush=True)
            time.sleep(600)


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_trainer(Path(sys.argv[1]), [Hang(int(sys.argv[2]))]).train()
