"""Training Gen and Ctx together on transformers' Trainer.

    L = L_NTP / (targets of the accumulated batch) + nsp_weight * L_NSP / (queries of the accumulated batch)

so gradient accumulation gives the NTP gradient of one large batch. It does not give its negatives: each query sees the
candidates of its own batch only. `micro_batch_size` does: a large batch, all its negatives, the gradients of the whole,
in the memory of a micro-batch (cosup.gradcache).

Over several processes (torchrun, accelerate launch) both terms are over the batches of all: the loss, the gradients and
what is logged are those of one process that holds them all, rank after rank.
"""

import argparse
import itertools
import json
import random
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from cosup import cards, files, shards
from cosup.agreement import agreed, note, reopen, settle
from cosup.contrastive import GATHERS
from cosup.data.collate import micro_batches
from cosup.data.schema import Instance, Passage, read_instances, read_passages
from cosup.gradcache import RandomState
from cosup.losses import CoSupervisionOutput, co_supervision_loss
from cosup.model import SHARDS, GenCtxConfig, GenCtxModel, GenCtxOutput, Mode, Pooling
from cosup.nn import CandidateQueue
from cosup.walk import default_workspace, set_default_workspace

_STATE, _INTERVAL, _QUEUE = "trainer_state.json", "cosup_interval.json", "cosup_queue.safetensors"
_OPTIMIZER, _SCHEDULE = "optimizer", "scheduler.pt"  # as accelerate and transformers name them
_FIGURES = [
    when + name for when in ("", "eval_") for name in ("loss", "ntp_loss", "nsp_loss", "retrieval_accuracy")
]
_ALIKE = (  # on all ranks
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "micro_batch_size",
    "packing", "queue_size", "extra_passages", "gather", "logging_strategy", "logging_steps", "eval_strategy",
    "eval_steps", "save_strategy", "save_steps", "load_best_model_at_end", "fsdp",
)  # fmt: skip
_SUMS = ("loss", "ntp_loss", "nsp_loss", "hits", "queries", "tokens")  # over the batches since the last log


def _choice(help: str) -> Any:
    return field(default=None, metadata={"help": f"{help} Default: the preset's."})


def _explained(option: Any, hint: Any) -> str:
    """The help of a field, with its choices and the presets' values."""
    text, kinds = option.metadata["help"], (hint, *get_args(hint))
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices:
        text += f" One of {', '.join(choices)}."
    if option.name in {f.name for f in fields(GenCtxConfig)}:
        default, paper = (getattr(preset, option.name) for preset in (GenCtxConfig(), GenCtxConfig.paper()))
        values = f"Default {default}" if paper == default else f"Default {default}, paper {paper}"
        text = text.replace("Default: the preset's.", f"{values}.")
    return text


@dataclass
class CoSupConfig(TrainingArguments):
    """TrainingArguments, and the models, the data and the choices of `GenCtxConfig` (None: as the preset says)."""

    gen: str | None = field(default=None, metadata={"help": "Hub id or folder of a language model, or a saved pair."})
    ctx: str | None = field(default=None, metadata={"help": "Hub id or folder of the passage encoder. Default: gen's."})
    instances: str | None = field(default=None, metadata={"help": "JSONL of training instances."})
    passages: str | None = field(default=None, metadata={"help": "JSONL of the passages that instances name."})
    eval_instances: str | None = field(default=None, metadata={"help": "JSONL of held-out instances."})
    on_bad_line: Literal["raise", "skip"] = field(default="raise", metadata={"help": "What a bad JSONL line does."})
    num_layers: int | None = field(default=None, metadata={"help": "Keep the first layers only, of both models."})
    attn_implementation: str | None = field(
        default="auto",
        metadata={"help": "auto: SDPA, for weights are float32 even with --bf16. Or transformers' name."},
    )
    preset: Literal["default", "paper"] | None = field(
        default=None, metadata={"help": "Gives the choices that are not given below; None: as a saved pair has them."}
    )
    pooling: Pooling | None = _choice("A passage vector is the mean, the last real token, or an appended token.")
    shared_weights: bool | None = _choice("Ctx is Gen's own decoder.")
    normalize: bool | None = _choice("Compare queries and passages by cosine; False: by inner product.")
    temperature: float | None = _choice("Divides the similarities.")
    learn_temperature: bool | None = _choice("Train the temperature too.")
    passage_in_ntp: bool | None = _choice("Passage tokens are targets of next-token prediction too.")
    nsp_weight: float | None = _choice("Weight of the next-sequence loss.")
    mode: Mode | None = _choice("Both losses, or one of them alone.")
    unique_passages: bool | None = _choice("A passage that comes twice in a batch is one candidate.")
    max_length: int | None = _choice("Most tokens of a Gen row.")
    max_passage_length: int | None = _choice("Most tokens of a passage.")
    packing: bool = field(
        default=False,
        metadata={"help": "Instances share rows of at most max_length tokens: the same losses, hardly any padding."},
    )
    micro_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Instances (packed: rows) that go through Gen and Ctx at once: a large batch in little memory, for "
            "one more forward pass. None: the whole batch."
        },
    )
    queue_size: int = field(
        default=0,
        metadata={"help": "So many passage vectors of earlier batches, of all processes, are candidates too, without "
                  "gradient."},
    )  # fmt: skip
    extra_passages: int = field(
        default=0,
        metadata={"help": "So many passages, drawn for each batch, are candidates too, without gradient: shared out "
                  "among the processes (with gather=local so many on each)."},
    )  # fmt: skip
    gather: Literal["exact", "detached", "local"] = field(
        default="exact",
        metadata={"help": "Candidates of a query, over several processes: those of all, with their gradients; those of "
                  "all, with gradients for the own only; the own only."},
    )  # fmt: skip
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps (or this share of all)."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide NaN and infinite losses in the log."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # nothing to pin for
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size: wanted at least 1 or None, got {self.micro_batch_size}")
        for name, least in (("queue_size", 0), ("extra_passages", 0), ("gradient_accumulation_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: wanted at least {least}, got {getattr(self, name)}")
        if self.gather not in GATHERS:
            raise ValueError(f"gather: wanted one of {', '.join(GATHERS)}, got {self.gather!r}")
        self.model_config()  # a wrong choice is told now, not after the models are loaded

    def model_config(self) -> GenCtxConfig:
        """The preset (without one: what a saved pair in `gen` was saved with), and over it the choices given."""
        if self.preset not in (None, "default", "paper"):
            raise ValueError(f"preset: wanted default or paper, got {self.preset!r}")
        saved = GenCtxConfig.of_saved(self.gen) if self.gen and self.preset is None else None
        base = GenCtxConfig.paper() if self.preset == "paper" else saved or GenCtxConfig()
        names = [f.name for f in fields(GenCtxConfig)]
        return replace(base, **{name: getattr(self, name) for name in names if getattr(self, name) is not None})

    @classmethod
    def own_fields(cls) -> dict[str, str]:
        """What there is beside TrainingArguments, and what each means."""
        inherited, hints = {f.name for f in fields(TrainingArguments)}, get_type_hints(cls)
        return {f.name: _explained(f, hints[f.name]) for f in fields(cls) if f.name not in inherited}

    @classmethod
    def parse(cls, arguments: Sequence[str] = (), *, yaml_file: str | Path | None = None) -> "CoSupConfig":
        """From command-line arguments, a YAML file of the same names, or both; an argument wins over the file.

        Raises ValueError for an unknown name, naming it and where it stands, and for a value of a wrong type.
        """
        parser = HfArgumentParser(cls, prog="cosup train", exit_on_error=False, allow_abbrev=False)  # type: ignore[arg-type]
        if yaml_file is not None:
            with files.readable(Path(yaml_file)):
                values = yaml.safe_load(Path(yaml_file).read_text(encoding="utf-8")) or {}
            if not isinstance(values, dict):
                raise ValueError(f"{yaml_file}: wanted a mapping of names to values, got {type(values).__name__}")
            unknown = [str(name) for name in values if name not in {f.name for f in fields(cls)}]
            if unknown:
                raise ValueError(f"{yaml_file}: wanted names of CoSupConfig, got {', '.join(unknown)}")
            # as text they go through the same conversion as arguments, and the same errors
            parser.set_defaults(**{k: v if v is None or isinstance(v, dict) else str(v) for k, v in values.items()})
        try:
            return parser.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)[0]
        except (argparse.ArgumentError, TypeError) as error:  # TypeError: of accelerator_config's names
            raise ValueError(f"{yaml_file or 'arguments'}: {error}") from error


class CoSupTrainer(Trainer):
    """Trains a `GenCtxModel` as its config says; logs both losses, retrieval accuracy, speed and memory.

    Logged beside transformers' own, over the steps since the last log:

        loss, ntp_loss, nsp_loss   mean over the steps; loss = ntp_loss + nsp_weight * nsp_loss in mode "joint"
        retrieval_accuracy         share of queries whose passage comes first among all candidates of its batch
        tokens_per_second          real tokens (no padding) of Gen and Ctx rows; logging, saving, evaluation not timed
        peak_memory_MB             most memory so far: allocated on the GPU, or resident on the CPU

    Args:
        model: moved to the device of `args`. Its weights should be float32; `args.bf16` and the like are autocast.
        args: `CoSupConfig` or plain TrainingArguments.
        train_dataset, eval_dataset: instances.
        passages: all that they name, by id.

    Over several processes all this is over all of them, the peak memory excepted. A batch has
    per_device_train_batch_size instances of each; an epoch's last is filled up with some of its first. Sharded by FSDP2
    the model stays so: save_model writes the whole pair, to be loaded for embedding and generation. Checkpoints hold
    it too, or with fsdp_config's state_dict_type SHARDED_STATE_DICT parts, which `GenCtxModel.from_pretrained` reads.

    Raises ValueError for no instances, label smoothing, micro-batches in mode "ntp", packing with a gen whose examples
    cannot share a row, and for what several processes cannot have: ddp_find_unused_parameters, uneven or dispatched
    batches, micro-batches of packed rows, DeepSpeed, FSDP1, FSDP2 with extra_passages.
    """

    model: GenCtxModel

    def __init__(
        self,
        model: GenCtxModel,
        args: TrainingArguments,
        *,
        train_dataset: Sequence[Instance],
        passages: Mapping[str, Passage],
        eval_dataset: Sequence[Instance] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
    ) -> None:
        self._group = _group_of(args)
        with agreed(self._group, "CoSupTrainer", {name: str(getattr(args, name, None)) for name in _ALIKE}):
            note(self._group, train_dataset=f"{len(train_dataset)} instances", config=str(model.config))
            if not len(train_dataset):
                raise ValueError("train_dataset: wanted at least one instance, got none")
            if args.world_size > 1:
                if args.ddp_find_unused_parameters:
                    raise ValueError("ddp_find_unused_parameters: wanted False over several processes, got True")
                args.ddp_find_unused_parameters = False  # all take part on each rank; Gen's head outside of the forward
                if args.ddp_broadcast_buffers is None:
                    args.ddp_broadcast_buffers = False  # none changes, and no rank waits for a forward pass that failed
            if args.label_smoothing_factor:
                raise ValueError(f"args: wanted label_smoothing_factor 0, got {args.label_smoothing_factor}")
            args._n_gpu = min(args.n_gpu, 1)  # no DataParallel: it would cut a batch whose query_index is flat
            args.remove_unused_columns = False
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                callbacks=callbacks,
                optimizers=optimizers,
            )
            with self.accelerator.autocast():  # packing is tried out as it will be trained
                self.collator = self.data_collator = model.collator(passages, packing=getattr(args, "packing", False))
            if args.world_size > 1:
                self._check_ranks()
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
            self._in_parts = plugin is not None and "SHARDED" in str(plugin.state_dict_type)  # what checkpoints are
            self._saves_in: str | None = None  # temporary folder of the checkpoint being written
            self._reset_interval()
            self._micro_batch_size: int | None = getattr(args, "micro_batch_size", None)
            self._gather: str = getattr(args, "gather", "exact")
            # further candidates that this rank gives: each is given by one, or seen by the queries of its rank alone
            shared = self._group is not None and self._gather != "local"
            self._share = slice(args.process_index, None, args.world_size) if shared else slice(None)
            contrasts = model.config.mode != "ntp"
            if self._group is not None and not contrasts and not model.config.shared_weights:
                # DDP must not wait for Ctx
                of_ctx = [name for name, _ in model.named_parameters() if name.startswith(("ctx.", "projection."))]
                nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, of_ctx)
            if self._micro_batch_size is not None and not contrasts:
                got = f"got {self._micro_batch_size}: gradient_accumulation_steps does the same"
                raise ValueError(f"micro_batch_size: wanted None in mode 'ntp', {got}")
            if self._micro_batch_size is not None and self._group is not None and self.collator.packing:
                got = f"got {self._micro_batch_size}: ranks would have unequal numbers of them"
                raise ValueError(f"micro_batch_size: wanted None with packing over several processes, {got}")
            self._passage_ids = list(passages)
            self._extra_passages = getattr(args, "extra_passages", 0) if contrasts else 0
            size = getattr(args, "queue_size", 0) if contrasts else 0
            width = model.lm_head[0].shape[1]
            self.queue = CandidateQueue(size, width, process_group=self._group, device=args.device) if size else None
            self.model_accepts_loss_kwargs = True  # compute_loss normalises by the whole accumulated batch
            if args.gradient_accumulation_steps > 1 and model.config.mode != "ntp":
                warnings.warn(
                    f"negatives do not accumulate: with {args.gradient_accumulation_steps} accumulation steps each "
                    f"query still sees the candidates of its own {args.per_device_train_batch_size} instances only; a "
                    "larger per_device_train_batch_size with micro_batch_size takes no more memory, and gives them all",
                    stacklevel=2,
                )

    @classmethod
    def from_config(cls, config: CoSupConfig) -> "CoSupTrainer":
        """Read the data, load the models, make the trainer. Raises ValueError naming what is missing or wrong."""
        with agreed(_group_of(config), "CoSupTrainer.from_config"):
            for name in ("gen", "instances", "passages"):
                if getattr(config, name) is None:
                    raise ValueError(f"{name}: wanted a path, got None")
            assert config.gen and config.instances and config.passages
            passages = read_passages(config.passages, config.on_bad_line)
            train = read_instances(config.instances, passages, config.on_bad_line)
            held_out = config.eval_instances and read_instances(config.eval_instances, passages, config.on_bad_line)
            model = GenCtxModel.from_pretrained(
                config.gen,
                config.ctx,
                config=config.model_config(),
                attn_implementation=config.attn_implementation,
                num_layers=config.num_layers,
            )
            return cls(model, config, train_dataset=train, passages=passages, eval_dataset=held_out or None)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train. resume_from_checkpoint: a checkpoint folder, or True or "last" for the last whole one of output_dir.

        The model is left in eval mode. Its rows that were cut to max_length are counted in one warning.
        A resumed run goes on exactly, with as many processes: on the CPU its losses are those of a run that was never
        stopped, bit for bit. So the losses take the memory budget that is saved in the checkpoint, whatever is free now
        (on a device of the same kind); it is the process's default from then on.
        Raises ValueError where there is no whole checkpoint, and naming the file where one is damaged. Of several
        processes all raise the first error of one, and name its rank: ValueError, IndexError or TypeError as it was,
        RuntimeError for another; but not one in the backward pass, nor where FSDP has split the weights.
        """
        with agreed(self._group, "train"):
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            if checkpoint:
                steps = _steps_done(Path(checkpoint, _STATE))
                note(self._group, resume_from_checkpoint=f"after {steps} steps")  # in a folder that may be its own
            self._reset_interval()
            result = super().train(checkpoint, trial, ignore_keys_for_eval)
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # takes autocast off model.forward again
            self.model.eval()  # what comes next is to embed and generate
            report, length = self.collator.report(), self.model.config.max_length
            if report["instances"] and report["without_target"] == report["instances"]:
                got = f"{length} leaves no target in any of {report['instances']} rows"
                raise ValueError(f"max_length: {got}; raise it")
        lost = {name: n for name, n in report.items() if n and name != "instances"}
        if lost:
            warnings.warn(f"rows were cut to max_length {length} (raise it to keep all): {lost}", stacklevel=2)
        return result

    def _checkpoint_to_resume(self, given: str | bool | None) -> str | None:
        if given in (True, "last"):
            given = last_checkpoint(self.args.output_dir)
            if given is None:
                wanted = f"wanted a whole checkpoint in {self.args.output_dir}, found none"
                raise ValueError(f"resume_from_checkpoint: {wanted}")
        elif given and not _is_whole(Path(str(given))):
            raise ValueError(f"resume_from_checkpoint: wanted a whole checkpoint, got {str(given)!r}")
        if not given:
            return None
        return str(files.content(Path(str(given))))

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Tensor]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], Tensor]:
        """The micro-batches of one step, and the NTP targets and queries of all ranks in it: int64 [2]."""
        with agreed(self._group, "batch"):
            batches = list(itertools.islice(epoch_iterator, num_batches))
            counts = torch.zeros(2, dtype=torch.int64, device=device)
            for batch in batches:
                counts[0] += (batch["labels"][:, 1:] != -100).sum()
                counts[1] += len(batch["query_index"])
            note(self._group, batches=len(batches), step=self.state.global_step)
        self._sum_over_ranks(counts)
        held = [batch["candidate_ids"].tolist() for batch in batches] if self._extra_passages else []
        if held and self._gather != "local":
            held = [sum(of_ranks, []) for of_ranks in zip(*self._of_all_ranks(held), strict=True)]
        reopen(self._group)
        for place, ids in enumerate(held):
            batches[place] = batches[place] | self._draw(ids, place)
        self._steps += 1
        return batches, counts

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Any = None) -> Tensor:
        with agreed(self._group, "training_step"):  # up to the loss
            if self._micro_batch_size is None:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                model.train()
                set_training = getattr(self.optimizer, "train", None)
                if callable(set_training):
                    set_training()  # as optimizers without a schedule want it
                inputs = self._needed(self._prepare_inputs(inputs))
                output = self._cached_step(model, inputs, num_items_in_batch)
                self._record(output, inputs)
                loss = output.loss
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model.reducer._rebuild_buckets()  # now, and not in the next forward pass, which one may not come to
        reopen(self._group)
        return loss

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        settle(self._group)
        return super()._wrap_model(model, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor | tuple[Tensor, CoSupervisionOutput]:
        inputs = self._needed(inputs)
        output = self._losses(model, inputs, num_items_in_batch)
        if model.training:
            self._record(output, inputs)
        return (output.loss, output) if return_outputs else output.loss

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out losses: NTP per target token, NSP per query, over the whole set (negatives are of the batch).

        Several processes share the batches of one: what comes out is the same on each, however many there are.
        """
        with agreed(self._group, "evaluate"):
            dataloader = self.get_eval_dataloader(eval_dataset)
            note(self._group, eval_dataset=f"{len(dataloader.dataset)} instances")  # type: ignore[arg-type]
            (batches,) = settle(self._group, len(dataloader))
            reopen(self._group)
            sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
            self.model.eval()
            for inputs in dataloader:
                with torch.no_grad():
                    output = self._losses(self.model, self._needed(self._prepare_inputs(inputs)))
                targets, queries = output.ntp_count, output.nsp_count
                sums += self._row(output.ntp_loss * targets, targets, output.nsp_loss * queries, queries, _hits(output))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            if self.is_fsdp_enabled and len(dataloader) < max(batches):  # others wait for the weights that are here
                inputs = self._prepare_inputs(self.collator([dataloader.dataset[0]]))
                with torch.no_grad():
                    self._forward(self.model, self._needed(inputs))
        ntp_sum, targets, nsp_sum, queries, hits = self._sum_over_ranks(sums).tolist()
        ntp_loss, nsp_loss = ntp_sum / max(targets, 1), nsp_sum / max(queries, 1)
        config = self.model.config
        loss = ntp_loss if config.mode != "nsp" else 0.0
        if config.mode != "ntp" and config.nsp_weight:
            loss += config.nsp_weight * nsp_loss
        metrics = {"loss": loss} | _parts(config.mode, (ntp_loss, nsp_loss), hits, queries)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        with agreed(self._group, "evaluate"):
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _check_ranks(self) -> None:
        """That accelerate deals out batches and wraps the model in a way known to work; ValueError where not."""
        even, dispatch = self.accelerator.even_batches, self.accelerator.dispatch_batches
        if not even or dispatch:
            got = f"even_batches={even}, dispatch_batches={dispatch}"
            raise ValueError(f"accelerator_config: wanted even_batches=True, dispatch_batches unset, got {got}")
        if self.is_deepspeed_enabled:
            raise ValueError("deepspeed: wanted None, got a configuration; fsdp shards the weights")
        if not (self.args.fsdp or self.is_fsdp_enabled):
            return
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if not self.accelerator.is_fsdp2:  # on CPUs accelerate would take DistributedDataParallel without a word
            version = "none" if plugin is None else plugin.fsdp_version
            raise ValueError(f"fsdp: wanted version 2 on GPUs, got version {version} on {self.args.device.type}")
        if plugin.cpu_ram_efficient_loading:  # it unties tied weights
            raise ValueError("fsdp_config: wanted cpu_ram_efficient_loading False, got True")
        if extra := getattr(self.args, "extra_passages", 0):
            raise ValueError(f"extra_passages: wanted 0 with fsdp, got {extra}")

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The batches of one process, dealt out to the ranks: no instance twice, a rank may have a batch less."""
        even, self.accelerator.even_batches = self.accelerator.even_batches, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.accelerator.even_batches = even

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._steps:
            sums = dict(zip(_SUMS, self._sums.tolist(), strict=True))
            seconds = self._seconds + time.perf_counter() - self._mark
            logs["loss"] = sums["loss"] / self._steps
            losses = sums["ntp_loss"] / self._steps, sums["nsp_loss"] / self._steps
            logs |= _parts(self.model.config.mode, losses, sums["hits"], sums["queries"])
            logs["tokens_per_second"] = sums["tokens"] / seconds
            logs["peak_memory_MB"] = _peak_memory_MB(self.args.device)
            self._reset_interval()
        super().log(logs, start_time)

    def store_flos(self) -> None:
        settle(self._group)
        super().store_flos()
        reopen(self._group)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # decay would pull the temperature towards 1
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_temperature")]

    def _needed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.model.config.mode != "ntp":
            return inputs
        unused = ("query_index", "query_target", "passage_input_ids", "passage_attention_mask", "candidate_ids")
        return {**inputs, **{name: inputs[name][:0] for name in unused}}  # Ctx has no part in it

    def _losses(self, model: nn.Module, inputs: dict[str, Tensor], counts: Tensor | None = None) -> CoSupervisionOutput:
        further, group = (self._further(inputs), self._group) if model.training else (None, None)
        with self.accelerator.autocast():
            output = self._forward(model, inputs)
            losses = self._loss(output, inputs, self.model.config.mode, counts, further, group)
        if model.training:
            self._enqueue(output.passages, inputs)
        return losses

    def _cached_step(self, model: nn.Module, batch: dict[str, Tensor], counts: Tensor | None) -> CoSupervisionOutput:
        """Loss and gradients of a batch in the memory of a micro-batch.

        First pass, without a graph: queries and passages. One NSP loss over all of them gives their gradients.
        Second pass, with the same dropout: backward of each micro-batch's NTP loss and those gradients. Ranks wait for
        each other in the NSP loss, in the last of their micro-batches, where gradients are summed, and at the end.
        """
        assert self._micro_batch_size is not None
        parts = micro_batches(batch, self._micro_batch_size)
        states, vectors = [], []
        with torch.no_grad():
            further = self._further(batch)
            for part in parts:
                states.append(RandomState(self.args.device))
                output = self._forward(model, part)
                vectors.append((output.query, output.passages))
        query, passages = (torch.cat(part).requires_grad_() for part in zip(*vectors, strict=True))
        self._enqueue(passages, batch)
        no_row = {"labels": batch["labels"][:0, :1]}
        alone = GenCtxOutput(query[:0, None], query, passages)
        total = self._loss(alone, batch | no_row, "nsp", counts, further, self._group)
        self.accelerator.backward(total.loss)
        reopen(self._group)

        no_query = {name: batch[name][:0] for name in ("query_target", "candidate_ids")}
        rest: Mode = "nsp" if self.model.config.mode == "nsp" else "ntp"  # "nsp" without queries: nothing
        scaler = self.accelerator.scaler  # of float16; the gradients of the vectors are scaled already
        assert query.grad is not None and passages.grad is not None
        dqueries = query.grad.split([len(part["query_index"]) for part in parts])
        dpassages = passages.grad.split([len(part["passage_input_ids"]) for part in parts])
        ntp_loss, ntp_count = torch.zeros_like(total.ntp_loss), total.ntp_count
        for part, state, dquery, dpassage in zip(parts, states, dqueries, dpassages, strict=True):
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(model):
                with state.again():
                    output = self._forward(model, part)
                alone = output._replace(query=output.query[:0], passages=output.passages[:0])
                losses = self._loss(alone, part | no_query, rest, counts)
                loss = losses.loss if scaler is None else scaler.scale(losses.loss)
                roots = [(loss, None), (output.query, dquery), (output.passages, dpassage)]
                roots = [(tensor, grad) for tensor, grad in roots if tensor.requires_grad]  # none, or a frozen model
                if part is parts[-1]:
                    settle(self._group)
                torch.autograd.backward([tensor for tensor, _ in roots], [grad for _, grad in roots])
            ntp_loss, ntp_count = ntp_loss + losses.ntp_loss.detach(), ntp_count + losses.ntp_count
        self._sum_over_ranks(ntp_loss)
        return total._replace(loss=total.loss.detach() + ntp_loss, ntp_loss=ntp_loss, ntp_count=ntp_count)

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> GenCtxOutput:
        names = ("input_ids", "attention_mask", "query_index", "passage_input_ids", "passage_attention_mask")
        given = {name: inputs[name] for name in (*names, "position_ids") if name in inputs}
        idle = self._group is not None and self.model.config.mode != "ntp" and not len(given["passage_input_ids"])
        if idle:  # other ranks wait for the gradients of Ctx: here it embeds one token, for nothing
            token = given["input_ids"].new_zeros(1, 1)
            given |= {"passage_input_ids": token, "passage_attention_mask": token + 1}
        with self.accelerator.autocast():
            output = model(**given)
        return output._replace(passages=output.passages[:0]) if idle else output

    def _loss(
        self,
        output: GenCtxOutput,
        inputs: dict[str, Tensor],
        mode: Mode,
        counts: Tensor | None = None,
        further: tuple[Tensor, Tensor] | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> CoSupervisionOutput:
        """Losses of these states and vectors, among the further candidates (vectors, ids) too; over the group's ranks.

        Several ranks' gradients are to be summed, and are going to be averaged: that of the loss is so many times 1.
        """
        config = self.model.config
        targets, queries = (None, None) if counts is None else counts.clamp(min=1).unbind()
        weight, bias = self.model.lm_head
        candidates, ids = output.passages, inputs["candidate_ids"]
        if further is not None:
            candidates = torch.cat([candidates, further[0].to(candidates.dtype)])
            ids = torch.cat([ids, further[1]])
        with self.accelerator.autocast():
            losses = co_supervision_loss(
                output.hidden,
                weight,
                inputs["labels"],
                output.query,
                candidates,
                inputs["query_target"],
                linear_bias=bias,
                candidate_ids=ids if config.unique_passages else None,
                nsp_weight=config.nsp_weight,
                mode=mode,
                temperature=self.model.temperature,
                normalize=config.normalize,
                logit_scale=self.model.logit_scale,
                logit_softcap=self.model.logit_softcap,
                ntp_normalizer=targets,
                nsp_normalizer=queries,
                process_group=group,
                gather=self._gather,
            )
        if self._group is not None and losses.loss.requires_grad:
            losses.loss.register_hook(lambda grad: grad * self.args.world_size)
        return losses

    @torch.no_grad()
    def _further(self, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Candidates without a gradient and their ids: drawn passages, then those of the queue; this rank's share."""
        parts = []
        if "extra_candidate_ids" in inputs:
            size = self._micro_batch_size or self.args.per_device_train_batch_size
            rows = (inputs[f"extra_{name}"].split(size) for name in ("passage_input_ids", "passage_attention_mask"))
            with self.accelerator.autocast():
                vectors = [self.model.embed_passages(*part) for part in zip(*rows, strict=True)]
            parts.append((torch.cat(vectors), inputs["extra_candidate_ids"]))
        if self.queue is not None:
            past, past_ids = self.queue.candidates()
            parts.append((past[self._share], past_ids[self._share]))
        if not parts:
            return None
        return torch.cat([vectors for vectors, _ in parts]), torch.cat([ids for _, ids in parts])

    def _enqueue(self, passages: Tensor, inputs: dict[str, Tensor]) -> None:
        if self.queue is not None:
            self.queue.enqueue(passages, inputs["candidate_ids"])

    def _draw(self, held: list[int], place: int) -> dict[str, Tensor]:
        """Passages other than those held by the batch; each batch of each step has its own draw, the same when resumed.

        The batches of all ranks have one draw, which the ranks share; where a query sees the candidates of its own rank
        only, each rank has its own.
        """
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        name = f"{seed} {self.state.global_step} {place}"
        if self._gather == "local":
            name += f" {self.args.process_index}"
        count = min(self._extra_passages + len(set(held)), len(self._passage_ids))
        rows = random.Random(name).sample(range(len(self._passage_ids)), count)
        ids = [self._passage_ids[row] for row in rows if row not in set(held)][: self._extra_passages][self._share]
        return {f"extra_{name}": tensor for name, tensor in self.collator.candidates(ids).items()}

    def _record(self, output: CoSupervisionOutput, inputs: dict[str, Tensor]) -> None:
        tokens = sum(mask.sum() for name, mask in inputs.items() if name.endswith("attention_mask"))
        counts = self._sum_over_ranks(self._row(_hits(output), output.nsp_count, tokens))
        self._sums += torch.cat([self._row(output.loss, output.ntp_loss, output.nsp_loss), counts])

    def _row(self, *numbers: Tensor | int) -> Tensor:
        float64, device = torch.float64, self.args.device
        return torch.stack([torch.as_tensor(number, dtype=float64, device=device).detach() for number in numbers])

    def _sum_over_ranks(self, t: Tensor) -> Tensor:
        """t, made the sum of those of all ranks in place."""
        if self._group is not None:
            dist.all_reduce(t, group=self._group)
        return t

    def _of_all_ranks(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _kind_of_device(self) -> str:
        device = self._sums.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _reset_interval(self) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.args.device)
        self._steps, self._seconds, self._mark = 0, 0.0, time.perf_counter()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        todo = [self.control.should_log, self.control.should_evaluate, self.control.should_save]
        note(self._group, log_evaluate_save=todo)
        if any(todo):
            settle(self._group)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        reopen(self._group)
        self._mark = time.perf_counter()  # what was just done is not training time

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the pair to output_dir (None: that of args). All processes call it; sharded weights come together."""
        if self._in_parts:  # transformers writes a checkpoint's parts, with the optimizer's state
            self._save(output_dir, {} if self._saves_in else self.accelerator.get_state_dict(self.model))
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            self.model.training_figures = self._figures() or self.model.training_figures
            self.model.save_pretrained(output_dir or str(self.args.output_dir), state_dict)

    def _figures(self) -> dict[str, float]:
        """For the pair's card: how much it was trained on, and what was logged last; nothing before the first step."""
        if not self.state.global_step:
            return {}
        logged = {name: value for log in self.state.log_history for name, value in log.items()}  # the last one stays
        seen = {"instances": len(self.train_dataset), "passages": len(self._passage_ids)}  # type: ignore[arg-type]
        return {"steps": self.state.global_step, **seen} | {name: logged[name] for name in _FIGURES if name in logged}

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Called by transformers' push_to_hub, after the pair was saved with the card of its own."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint to a temporary folder and rename it; an existing checkpoint stays until then."""
        run = self._get_output_dir(trial)
        folder = Path(run, f"checkpoint-{self.state.global_step}")
        with agreed(self._group, "checkpoint"), self._writes(folder) as part:
            settle(self._group)
            places = self._of_all_ranks(part and str(part.parent))
            reopen(self._group)
            here = self.args.process_index - self.args.local_process_index  # with save_on_each_node
            self._saves_in = places[here] or places[0]
            try:
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(Path(self._saves_in, folder.name)):
                    self.state.best_model_checkpoint = str(folder)
                    if part is not None:
                        self.state.save_to_json(str(part / _STATE))
            finally:
                self._saves_in = None
        reopen(self._group)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            best, limit = self.state.best_model_checkpoint, self.args.save_total_limit
            rotate_checkpoints(run, save_total_limit=limit, best_model_checkpoint=best, use_mtime=True)

    def _writes(self, folder: Path) -> AbstractContextManager[Path | None]:
        if not self.args.should_save:
            return nullcontext()
        return files.updated(folder, obsolete=_all_of, keeps=cards.is_of_user)

    def _get_output_dir(self, trial: Any) -> str:
        return self._saves_in or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._saves_in is None:  # otherwise the checkpoint is not complete yet
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        settle(self._group)  # the state is written after those of all ranks
        reopen(self._group)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if (files.content(Path(resume_from_checkpoint)) / SHARDS).is_dir():
            self.model.load_shards(resume_from_checkpoint)
            return
        with agreed(self._group, "checkpoint"):
            saved = GenCtxConfig.of_saved(resume_from_checkpoint) or self.model.config
            config = replace(self.model.config, temperature=saved.temperature)  # a learned one goes on
            kept = GenCtxModel.from_pretrained(resume_from_checkpoint, config=config, dtype=self.model.gen.dtype)
        set_model_state_dict(self.model, kept.state_dict(), options=StateDictOptions(full_state_dict=True))
        reopen(self._group)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        workspace = self._kind_of_device(), default_workspace(self._sums.device)
        settle(self._group)
        workspaces = self._of_all_ranks(workspace)
        reopen(self._group)
        if not self.args.should_save:
            return
        interval = {"sums": self._sums.tolist(), "steps": self._steps, "seconds": self._seconds}
        interval["workspaces"] = workspaces
        Path(output_dir, _INTERVAL).write_text(json.dumps(interval), encoding="utf-8")
        if self.queue is not None:
            save_file(self.queue.state_dict(), Path(output_dir, _QUEUE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        if (folder / SHARDS).is_dir() != self._in_parts:
            forms = ["SHARDED_STATE_DICT", "none such"][:: -1 if self._in_parts else 1]
            raise ValueError(f"fsdp_config: wanted state_dict_type {forms[0]} as in {checkpoint}, got {forms[1]}")
        if not (folder / _INTERVAL).is_file():
            raise ValueError(f"resume_from_checkpoint: wanted optimizer state in {checkpoint}, got weights only")
        if self._in_parts:
            self._load_optimizer_in_parts(folder)
        else:
            self._load_schedule(folder / _SCHEDULE)  # again below: here its own file is named if it is damaged
            with files.readable(folder / (f"{_OPTIMIZER}.bin" if self.is_fsdp_enabled else f"{_OPTIMIZER}.pt")):
                super()._load_optimizer_and_scheduler(checkpoint)
        with files.readable(folder / _INTERVAL):
            interval = json.loads((folder / _INTERVAL).read_text(encoding="utf-8"))
            self._sums.copy_(torch.tensor(interval["sums"], dtype=torch.float64).reshape(len(_SUMS)))
            self._steps, self._seconds = int(interval["steps"]), float(interval["seconds"])
            self._mark = time.perf_counter()
            workspaces = interval.get("workspaces", [])  # none: an older checkpoint
            if len(workspaces) == self.args.world_size:
                kind, workspace = workspaces[self.args.process_index]
                if kind == self._kind_of_device():  # bits of another kind differ anyway
                    set_default_workspace(self._sums.device, workspace)
        with files.readable(folder / _QUEUE):
            kept = load_file(folder / _QUEUE) if (folder / _QUEUE).is_file() else {}
            size, wanted = 0 if self.queue is None else len(self.queue.ids), kept["ids"].numel() if kept else 0
            if size != wanted:
                raise ValueError(f"queue_size: wanted {wanted} as in {folder / _QUEUE}, got {size}")
            if self.queue is not None:
                self.queue.load_state_dict(kept)

    def _load_optimizer_in_parts(self, checkpoint: Path) -> None:
        """Replaces accelerate's load_fsdp_optimizer, which unpickles."""
        assert self.optimizer is not None
        state = {"optimizer": get_optimizer_state_dict(self.model, self.optimizer)}
        shards.load(state, checkpoint / f"{_OPTIMIZER}_0")
        set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"])
        self._load_schedule(checkpoint / _SCHEDULE)

    def _load_schedule(self, path: Path) -> None:
        assert self.lr_scheduler is not None
        with files.readable(path):
            self.lr_scheduler.load_state_dict(torch.load(path, weights_only=True))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if not self.is_fsdp_enabled:  # which reads a checkpoint together
            reopen(self._group)  # the model is wrapped
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:
            raise ValueError(f"lr_scheduler_kwargs: wanted arguments of the schedule, got {error}") from error

    def _load_rng_state(self, checkpoint: str | None) -> None:
        rank = f"_{self.args.process_index}" if self.args.world_size > 1 else ""
        with files.readable(Path(str(checkpoint), f"rng_state{rank}.pth")):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with files.readable(Path(str(checkpoint), "scaler.pt")):
            super()._load_scaler(checkpoint)


def _group_of(args: TrainingArguments) -> dist.ProcessGroup | None:
    return dist.group.WORLD if args.world_size > 1 else None


def _parts(mode: str, losses: tuple[float, float], hits: float, queries: float) -> dict[str, float]:
    """What is logged beside the loss: only what the mode computes."""
    parts = {"ntp_loss": losses[0]} if mode != "nsp" else {}
    if mode != "ntp":
        parts |= {"nsp_loss": losses[1], "retrieval_accuracy": hits / max(queries, 1)}
    return parts


def _hits(output: CoSupervisionOutput) -> Tensor | int:
    """Queries whose passage came first."""
    return 0 if output.nsp_stats is None else output.nsp_stats.top1.sum()


def _peak_memory_MB(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def last_checkpoint(output_dir: str | Path | None) -> str | None:
    """The last complete checkpoint of a run; None if there is none yet."""
    folders = Path(output_dir or ".").glob("checkpoint-*")
    whole = [folder for folder in folders if folder.name[11:].isdigit() and _is_whole(folder)]
    return str(max(whole, key=lambda folder: int(folder.name[11:]))) if whole else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the trainer's state is there, which is written last."""
    try:
        json.loads((files.content(checkpoint) / _STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True


def _steps_done(path: Path) -> int:
    """Of a trainer's state; values of other types, which transformers would take, are refused."""
    with files.readable(path):
        state = TrainerState.load_from_json(str(path))
        kinds = {"global_step": int, "epoch": int | float, "log_history": list, "stateful_callbacks": dict}
        for name, kind in kinds.items():
            if not isinstance(getattr(state, name), kind):
                raise ValueError(f"{name}: wanted {kind}, got {getattr(state, name)!r}")
        return state.global_step


def _all_of(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())
