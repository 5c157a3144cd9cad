"""What each process of test_agreement.py trains: one of them fails, at each place of a step and around it."""

import os
import re
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from train_ranks import instances, trainer_of
from transformers import TrainerCallback

from cosup import files
from cosup.model import GenCtxModel
from cosup.train import CoSupTrainer

SECONDS = 5  # after one has failed, all have raised
KINDS = "tqdqqtqd" * 3


def fail(*_, **__):
    raise OSError(f"planted at {time.time()}")


class Rows(list):
    """Instances of which the last cannot be read."""

    def __init__(self, rows, bad):
        super().__init__(rows)
        self.bad = bad

    def __getitem__(self, row):
        return fail() if row >= self.bad else super().__getitem__(row)


class Fails(TrainerCallback):
    """At the so-manieth call of an event."""

    def __init__(self, event, count=1):
        self.left = count
        setattr(self, event, self.called)

    def called(self, args, state, control, **_):
        self.left -= 1
        if not self.left:
            fail()


def later(function, count):
    """The function, which fails when it is called for the so-manieth time."""
    calls = iter(range(1, 1 << 30))
    return lambda *args, **kwargs: fail() if next(calls) == count else function(*args, **kwargs)


def reads(trainer, culprit, folder):
    if culprit:
        trainer.train_dataset = Rows(trainer.train_dataset, 8)
    trainer.train()


def collates(trainer, culprit, folder):
    if culprit:
        trainer.data_collator = later(trainer.data_collator, 2)
    trainer.train()


def goes_forward(trainer, culprit, folder, count=2):
    if culprit:
        trainer.model.forward = later(trainer.model.forward, count)
    trainer.train()


def goes_forward_again(trainer, culprit, folder):
    goes_forward(trainer, culprit, folder, count=6)


def called(event, count=1, task=CoSupTrainer.train):
    def run(trainer, culprit, folder):
        if culprit:
            trainer.add_callback(Fails(event, count))
        task(trainer)

    return run


def sets_up(name):
    def run(trainer, culprit, folder):
        if culprit:
            setattr(trainer, name, fail)
        trainer.train()

    return run


def steps(trainer, culprit, folder):
    if culprit:
        trainer.create_optimizer()
        trainer.optimizer.step = fail
    trainer.train()


def draws(trainer, culprit, folder):
    if culprit:
        trainer.collator.candidates = fail
    trainer.train()


def saves(name):
    def run(trainer, culprit, folder):
        with mock.patch.object(*name, fail) if culprit else mock.MagicMock():
            trainer.train()

    return run


def resumes(trainer, culprit, folder):
    trainer.train()
    again = make(folder, "resumes again", output=trainer.args.output_dir, max_steps=5)
    with mock.patch.object(CoSupTrainer, "_load_rng_state", fail) if culprit else mock.MagicMock():
        again.train(resume_from_checkpoint=True)


def finds_no_checkpoint(trainer, culprit, folder):
    trainer.train()
    with mock.patch("cosup.train.last_checkpoint", fail) if culprit else mock.MagicMock():
        trainer.train(resume_from_checkpoint=True)


def begins(trainer, culprit, folder):
    with mock.patch.object(GenCtxModel, "collator", fail) if culprit else mock.MagicMock():
        make(folder, "begins again")


SAVED = dict(save_strategy="steps", save_steps=2, logging_steps=9)
EVALUATED = dict(eval_dataset=instances("qqqqqq"), eval_strategy="steps", eval_steps=2, logging_steps=9)
EVALUATED |= dict(per_device_eval_batch_size=1)
ALL = {
    "data": (reads, {}),
    "data, accumulated": (reads, dict(gradient_accumulation_steps=2)),
    "collator": (collates, {}),
    "forward": (goes_forward, {}),
    "forward, first": (lambda *given: goes_forward(*given, count=1), dict(mode="ntp")),
    "forward, accumulated": (goes_forward, dict(gradient_accumulation_steps=2)),
    "forward, of micro-batches": (goes_forward, dict(micro_batch_size=1)),
    "forward again, of micro-batches": (goes_forward_again, dict(micro_batch_size=1)),
    "forward, of candidates of this rank": (goes_forward, dict(gather="local")),
    "optimizer": (steps, {}),
    "drawn passages": (draws, dict(extra_passages=3)),
    "on_train_begin": (called("on_train_begin"), {}),
    "on_step_begin": (called("on_step_begin"), {}),
    "on_step_begin, second": (called("on_step_begin", 2), {}),
    "on_step_end": (called("on_step_end", 2), {}),
    "on_log": (called("on_log", 2), {}),
    "on_epoch_end": (called("on_epoch_end"), {}),
    "on_train_end": (called("on_train_end"), {}),
    "on_evaluate": (called("on_evaluate"), EVALUATED),
    "on_prediction_step": (called("on_prediction_step"), EVALUATED),
    "on_evaluate, alone": (called("on_evaluate", task=CoSupTrainer.evaluate), EVALUATED),
    "the data loader": (sets_up("get_train_dataloader"), {}),
    "the optimizer": (sets_up("create_optimizer"), {}),
    "on_save": (called("on_save"), SAVED),
    "a checkpoint's folder": (saves((files, "updated")), SAVED),
    "a checkpoint's optimizer": (saves((torch, "save")), SAVED),
    "a checkpoint's random state": (saves((CoSupTrainer, "_save_rng_state")), SAVED),
    "a resumed random state": (resumes, SAVED),
    "a checkpoint to resume": (finds_no_checkpoint, SAVED),
    "a trainer": (begins, {}),
}  # fmt: skip


# Of one rank, of the others.
DIFFER = {
    "train_dataset": (dict(kinds=KINDS), dict(kinds=KINDS[:16])),
    "queue_size": (dict(queue_size=9), {}),
    "gather": (dict(gather="local"), {}),
    "logging_steps": (dict(logging_steps=2), {}),
    "config": (dict(mode="ntp"), {}),
    "eval_dataset": (dict(eval_dataset=instances("qqq")), dict(eval_dataset=instances("qqqq"))),
}


def make(folder, name, output=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        place = Path(output or folder / re.sub("[^a-z]", "_", name))
        return trainer_of(place, instances(KINDS), dist.get_world_size(), **options)


def one_fails(folder: Path, world: int) -> None:
    """All raise its reason at once; the next trainer trains."""
    rank = int(os.environ["RANK"])
    for number, (name, (run, options)) in enumerate(ALL.items()):
        trainer = trainer_of(folder / f"{number}", instances(KINDS), world, ddp_timeout=9, **options)
        culprit = number % world
        if "checkpoint's" in name and "random" not in name:
            culprit = 0  # who writes it
        try:
            run(trainer, rank == culprit, folder)
        except RuntimeError as error:
            found = re.fullmatch(rf"rank {culprit}: OSError: planted at ([\d.]+)", str(error))
            assert found, (name, str(error))
            assert time.time() - float(found[1]) < SECONDS, name
        else:
            raise AssertionError(f"{name}: nothing was raised")
    trainer_of(folder / "last", instances(KINDS), world).train()


def one_differs(folder: Path, world: int) -> None:
    rank = int(os.environ["RANK"])
    for number, (name, both) in enumerate(DIFFER.items()):
        options = dict(both[rank != number % world])
        try:
            trainer = trainer_of(
                folder / f"{number}", instances(options.pop("kinds", KINDS)), world, ddp_timeout=9, **options
            )
            trainer.evaluate()
        except ValueError as error:
            assert str(error).startswith(f"{name}: wanted the same on all ranks"), (name, str(error))
        else:
            raise AssertionError(f"{name}: nothing was raised")
    trainer_of(folder / "last", instances(KINDS), world).train()
