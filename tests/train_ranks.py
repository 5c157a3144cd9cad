"""What test_train_ranks.py trains: in one process by a call, in several as a script, which writes down what came out.

torchrun --nproc-per-node 2 tests/train_ranks.py FOLDER NAME      FOLDER/NAME.RANK, of one of the runs below
"""

import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from fsdp_on_cpus import FSDPOnCPUs
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import SequentialSampler
from train_worker import machine, make_trainer

from cosup.data.schema import Instance, Reference
from cosup.losses import co_supervision_loss
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.train import CoSupConfig, CoSupTrainer
from tiny import tiny_encoder, tiny_gen, tiny_passages, tiny_tokenizer

BATCH = 8  # instances of a step, of all ranks
PASSAGES = tiny_passages(96)

# torch.load of torch 2.11 knows no "cpu:0", where transformers wants the optimizer's state of a process of a CPU
torch.serialization.register_package(
    50, lambda storage: None, lambda storage, location: storage if location.startswith("cpu:") else None
)


def instances(kinds: str, negatives: bool = True) -> list[Instance]:
    """One to a letter: "t" text alone, "q" a query and a hard negative, "d" two queries. No two name one passage."""
    made = []
    for i, kind in enumerate(kinds):
        first, second = (PASSAGES[f"p{2 * i + k}"] for k in range(2))
        parts = [Reference(passage.id, passage.text.split(". ")[0] + ".") for passage in (first, second)]
        output, named, hard = {
            "t": (("Nothing. " * (i % 5 + 1),), (), ()),
            "q": (("See: ", parts[0], " Done."), (first.id,), (second.id,) if negatives else ()),
            "d": ((parts[0], " And ", parts[1]), (first.id, second.id), ()),
        }[kind]
        made.append(Instance(f"i{i}", f"Which is {i}?", output, named, hard))
    return made


class Sharded(FSDPOnCPUs, CoSupConfig):
    pass


class Recorder(CoSupTrainer):
    """Takes the instances in their order, and keeps the sums behind each log."""

    rows: list[list[float]]

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            self.rows = [*getattr(self, "rows", []), [*self._sums.tolist(), logs["loss"], logs["grad_norm"]]]
        super().log(logs, start_time)


def trainer_of(
    folder: Path, data: list[Instance], world: int, batch: int = BATCH, shard: bool = False, **options
) -> Recorder:
    choices = {name: options.pop(name) for name in ("mode", "unique_passages") if name in options}
    torch.manual_seed(0)
    config = GenCtxConfig(learn_temperature=True, temperature=0.3, nsp_weight=0.7, max_length=160, **choices)
    model = GenCtxModel(tiny_gen(), tiny_encoder(), tiny_tokenizer(), tiny_tokenizer(), config).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    settings = dict(max_steps=3, learning_rate=0.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0)
    settings |= dict(logging_steps=1, save_strategy="no", use_cpu=True, disable_tqdm=True, ddp_timeout=30)
    eval_dataset = options.pop("eval_dataset", None)
    config = Sharded if shard and world > 1 else CoSupConfig
    args = config(str(folder), per_device_train_batch_size=batch // world, **settings | options)
    return Recorder(model, args, train_dataset=data, passages=PASSAGES, eval_dataset=eval_dataset)


def whole(tensors):
    """Names and tensors, of which shards are put together."""
    return ((name, t.full_tensor() if hasattr(t, "full_tensor") else t) for name, t in tensors)


def training(kinds: str, negatives: bool = True, shard: bool = False, **options):
    """A run of a few steps: what it did to the weights, and the sums behind its logs."""

    def run(folder: Path, world: int) -> dict:
        trainer = trainer_of(folder, instances(kinds, negatives), world, shard=shard, **options)
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        result = trainer.train()
        after = dict(whole(trainer.model.named_parameters()))
        parts = {
            part: torch.cat(
                [(after[name] - before[name]).flatten() for name in before if name.startswith(part)]
            ).detach()
            for part in ("gen", "ctx", "projection", "log_temperature")
        }
        queue = () if trainer.queue is None else trainer.queue.candidates()
        units = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
        return {
            "moved": parts,
            "rows": trainer.rows,
            "train_loss": result.training_loss,
            "queue": queue,
            "units": units,
        }

    return run


def loss(folder: Path, world: int) -> tuple:
    """co_supervision_loss of rows that are split unevenly, without normalisers: losses, and gradients of all rows."""
    torch.manual_seed(0)
    shapes = ((5, 6, 4), (9, 4), (4, 4), (7, 4))
    hidden, head, query, passages = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    labels, target = torch.randint(9, (5, 6)), torch.tensor([1, 4, 2, 6])
    labels[:, :3], labels[0] = -100, -100
    group = None
    if world > 1:
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        group, first = dist.group.WORLD, dist.get_rank() == 0
        cuts = (slice(3), slice(1), slice(2)) if first else (slice(3, 5), slice(1, 4), slice(2, 7))
        hidden, labels, query, target, passages = (
            t[cuts[i]] for t, i in ((hidden, 0), (labels, 0), (query, 1), (target, 1), (passages, 2))
        )
        target = target - (0 if first else 2)
    parts = [part.clone().requires_grad_() for part in (hidden, query, passages, head)]
    total = co_supervision_loss(parts[0], parts[3], labels, parts[1], parts[2], target, nsp_weight=0.7,
                                process_group=group)  # fmt: skip
    counts = [int(total.ntp_count), total.nsp_count]
    return [each.detach() for each in total[:3]], torch.autograd.grad(total.loss, parts), counts


def given(gather: str):
    """Ids of the further candidates that a rank gives: of a queue that was given 3 by each, and of 5 extra passages."""

    def run(folder: Path, world: int) -> dict:
        trainer = trainer_of(folder, instances("qqqq"), world, gather=gather, queue_size=9, extra_passages=5)
        rank = trainer.args.process_index
        trainer.queue.enqueue(torch.randn(3, 32), -1 - torch.arange(3 * rank, 3 * rank + 3))
        batch = trainer.collator(instances("qqqq")[2 * rank : 2 * rank + 2])
        (batch,), _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        ids = trainer._further(batch)[1].tolist()
        return {"queue": {id for id in ids if id < 0}, "extra": [id for id in ids if id >= 0]}

    return run


def evaluation(count: int, **options):
    """Batches of 2; of 5 instances the last has one, and a rank has a batch less; of 1 a rank has none."""

    def run(folder: Path, world: int) -> dict:
        options.update(max_steps=1, eval_dataset=instances("tqdqq")[-count:], per_device_eval_batch_size=2)
        trainer = trainer_of(folder, instances("qdtqqdqt"), world, **options)
        trainer.train()
        return trainer.evaluate()

    return run


def refused_shards(folder: Path, world: int) -> list[str]:
    """What is said of options that sharded weights cannot have."""
    told = []
    for options in ({"extra_passages": 2}, {"fsdp_config": {"cpu_ram_efficient_loading": True}}):
        try:
            make_trainer(folder, config=Sharded, ddp_timeout=30, **options)
        except ValueError as error:
            told.append(str(error))
    return told


def refused(folder: Path, world: int) -> list[str]:
    """What is said of options that several processes cannot have."""
    told = []
    uneven, dispatched = ({"accelerator_config": {name: value}} for name, value in
                          (("even_batches", False), ("dispatch_batches", True)))  # fmt: skip
    packed = {"packing": True, "micro_batch_size": 1}
    for options in ({"ddp_find_unused_parameters": True}, uneven, dispatched, {"fsdp": True}, packed):
        try:
            make_trainer(folder, **options)
        except ValueError as error:
            told.append(str(error))
    return told


def resumed(config: type[CoSupConfig] = CoSupConfig, **options):
    """A whole run, and one from its checkpoint at step 4: dropout, shuffling, AdamW, accumulation, a queue; on machines
    of much and of little free memory, the second run on the contrary ones."""
    options |= dict(config=config, max_steps=7, logging_steps=3, queue_size=9, micro_batch_size=1, ddp_timeout=30)

    def run(folder: Path, world: int) -> dict:
        runs = [make_trainer(folder, **options) for _ in range(2)]
        free = [1 << 30, 1 << 20] if runs[0].args.process_index else [1 << 20, 1 << 30]
        with machine(free[0]):
            runs[0].train()
        unpickled = AssertionError("a checkpoint was unpickled")
        with machine(free[1]), mock.patch.object(FileSystemReader, "read_metadata", side_effect=unpickled):
            runs[1].train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        names = ("loss", "ntp_loss", "nsp_loss", "retrieval_accuracy", "grad_norm", "step")
        return {
            "weights": [dict(whole(run.model.state_dict().items())) for run in runs],
            "queue": [run.queue.state_dict() for run in runs],
            "logs": [[{n: log[n] for n in names} for log in run.state.log_history if "loss" in log] for run in runs],
            "random": torch.get_rng_state(),
            "saved": GenCtxModel.from_pretrained(folder / "checkpoint-7").state_dict(),
            "files": {str(path.relative_to(folder)) for path in folder.glob("checkpoint-7/**/*")},
        }

    return run


PARTS = {"state_dict_type": "SHARDED_STATE_DICT"}


def across(folder: Path, world: int) -> dict:
    """A checkpoint in parts: read whole, saved whole, and resumed by those who have its weights in another form."""
    trainer = make_trainer(folder, config=Sharded, max_steps=4, ddp_timeout=30, fsdp_config=PARTS)
    trainer.train()
    trainer.save_model(str(folder / "plain"))
    dist.barrier()
    told = []
    for config in (Sharded, CoSupConfig):
        other = make_trainer(folder, config=config, ddp_timeout=30)
        try:
            other.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
        except ValueError as error:
            told.append(str(error))
    paths = (folder / "plain", folder / "checkpoint-4")
    return {"told": told, "read": [GenCtxModel.from_pretrained(path).state_dict() for path in paths],
            "weights": dict(whole(trainer.model.state_dict().items()))}  # fmt: skip


UNEVEN = "tqqdqtdq" + "qqqqttdt" + "dddddqqt"  # ranks of 4: 4 and 5 queries, 4 and 2, 8 and 4
IDLE = "qdqdtttt" + "ttttdqdq" + "tttttttt"  # a rank without a query, the other one, both
RUNS = {
    "joint": training(UNEVEN),
    "nsp": training(UNEVEN, mode="nsp"),
    "ntp": training(UNEVEN, mode="ntp"),
    "paper": training(UNEVEN, unique_passages=False),
    "packed": training(UNEVEN, packing=True),
    "packed idle": training(IDLE, packing=True),
    "idle": training(IDLE),
    "cached": training(UNEVEN, micro_batch_size=3),
    "cached idle": training(IDLE, micro_batch_size=1),
    "accumulated": training(UNEVEN * 2, gradient_accumulation_steps=2),
    "cached accumulated": training(UNEVEN * 2, gradient_accumulation_steps=2, micro_batch_size=3),
    "further": training("qdqdqqtd", negatives=False, queue_size=13, extra_passages=5),
    "cached further": training("qdqdqqtd", negatives=False, queue_size=13, extra_passages=5, micro_batch_size=3),
    "detached": training(UNEVEN, gather="detached"),
    "local": training(UNEVEN, gather="local"),
    "halves": training(UNEVEN, batch=BATCH // 2, gradient_accumulation_steps=2),
    "loss": loss,
    "given exact": given("exact"),
    "given local": given("local"),
    "evaluation of 5": evaluation(5),
    "evaluation of 1": evaluation(1),
    "refused": refused,
    "sharded refused": refused_shards,
    "sharded": training(UNEVEN, shard=True),
    "sharded idle": training(IDLE, shard=True),
    "sharded packed": training(UNEVEN, shard=True, packing=True),
    "sharded ntp": training(UNEVEN, shard=True, mode="ntp"),
    "sharded cached accumulated": training(UNEVEN * 2, gradient_accumulation_steps=2, micro_batch_size=3, shard=True),
    "sharded cached idle": training(IDLE, micro_batch_size=1, shard=True),
    "queue": training("qdqdqqtd", negatives=False, queue_size=13),
    "sharded queue": training("qdqdqqtd", negatives=False, queue_size=13, shard=True),
    "sharded evaluation of 5": evaluation(5, shard=True),
    "sharded evaluation of 1": evaluation(1, shard=True),
    "sharded resumed": resumed(Sharded),
    "sharded resumed in parts": resumed(Sharded, fsdp_config=PARTS),
    "sharded across": across,
    "resumed": resumed(extra_passages=3),
}


def save(name: str, folder: Path) -> None:
    """What a run gives on this rank, in a file."""
    warnings.simplefilter("ignore")
    rank, world = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    torch.save(RUNS[name](folder / f"run {name}", world), folder / f"{name}.{rank}")
    dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    save(sys.argv[2], Path(sys.argv[1]))
    os._exit(0)  # gloo's threads may abort a process that unwinds
