"""What test_patching_ranks.py trains: in one process by a call, in several as a script, which writes what came out.

torchrun --nproc-per-node 2 tests/patched_ranks.py FOLDER      FOLDER/NAME.RANK for each run below
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from fsdp_on_cpus import FSDPOnCPUs
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import cosup
from tiny import VOCABULARY, tiny_gen

STEPS, WORLD = 3, 2


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four rows of nine tokens, of all ranks; as many targets in each pair, so that means of means are means."""
    ids = torch.randint(1, VOCABULARY, (4, 9), generator=torch.Generator().manual_seed(step))
    return ids, ids.masked_fill(torch.arange(9) < torch.tensor([[3], [0], [2], [2]]), -100)


def steps(model, of: slice, patched: bool = True) -> list[float]:
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(STEPS):
        ids, labels = (part[of] for part in rows(step))
        optimizer.zero_grad()
        outputs = model(input_ids=ids, labels=labels)
        assert (outputs.logits is None) == patched
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    return losses


def alone(tied: bool) -> tuple[list[float], dict]:
    """One process, without cosup."""
    model = tiny_gen(tied=tied).train()
    return steps(model, slice(None), patched=False), model.state_dict()


def sharded(model, head_too: bool = False, keep: bool = False):
    """As recipes do it: every layer, then what is left, the head with it."""
    for layer in model.model.layers:
        fully_shard(layer)
    if head_too:
        fully_shard(model.lm_head, reshard_after_forward=not keep)
    return fully_shard(model)


def fsdp(folder: Path, of: slice, tied: bool):
    model = sharded(cosup.patch(tiny_gen(tied=tied).train()))
    losses = steps(model, of)
    checkpoint.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / f"checkpoint{tied}")
    again = sharded(cosup.patch(tiny_gen(seed=5, tied=tied).train()))
    state = {"model": get_model_state_dict(again)}
    checkpoint.load(state, checkpoint_id=folder / f"checkpoint{tied}")
    set_model_state_dict(again, state["model"])
    whole = get_model_state_dict(again, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        LlamaForCausalLM(again.config).save_pretrained(folder / f"plain{tied}", state_dict=whole)
    return losses


def fsdp_after(folder: Path, of: slice):
    """Sharded first, then patched: nothing is run, for its weights are not whole here."""
    return steps(cosup.patch(sharded(tiny_gen().train())), of)


def ddp(folder: Path, of: slice):
    return steps(DistributedDataParallel(cosup.patch(tiny_gen().train())), of)


def head_kept(folder: Path, of: slice):
    """A head of its own that stays gathered until the backward."""
    return steps(sharded(cosup.patch(tiny_gen().train()), head_too=True, keep=True), of)


def head_of_its_own(folder: Path, of: slice):
    """A head that is gathered and given back by itself, before the loss: an error says what to do."""
    try:
        return steps(sharded(cosup.patch(tiny_gen().train()), head_too=True), of)
    except ValueError as error:
        return str(error)


class Sharded(FSDPOnCPUs, TrainingArguments):
    pass


class InOrder(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


def trained(folder: Path, model, ranks: int = 1) -> list[float]:
    """Losses of three steps of transformers' Trainer, as `accelerate launch --use_fsdp` runs it over ranks."""
    pairs = (pair for step in range(STEPS) for pair in zip(*rows(step), strict=True))
    data = [{"input_ids": ids, "labels": labels} for ids, labels in pairs]
    options = dict(max_steps=STEPS, logging_steps=1, learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True)
    options |= dict(save_strategy="no", report_to=[], disable_tqdm=True, max_grad_norm=0.0)
    kind = Sharded if ranks > 1 else TrainingArguments
    trainer = InOrder(model, kind(str(folder), per_device_train_batch_size=4 // ranks, **options), train_dataset=data)
    trainer.train()
    assert ranks == 1 or any(isinstance(module, FSDPModule) for module in trainer.model.model.layers)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


RUNS = {
    "trainer": lambda folder, of: trained(folder, cosup.patch(tiny_gen().train()), WORLD),
    "fsdp": lambda folder, of: fsdp(folder, of, tied=False),
    "fsdp without cosup": lambda folder, of: steps(sharded(tiny_gen().train()), of, patched=False),
    "fsdp tied": lambda folder, of: fsdp(folder, of, tied=True),
    "fsdp after": fsdp_after,
    "ddp": ddp,
    "head kept": head_kept,
    "head": head_of_its_own,
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, gather = dist.get_rank(), _fsdp_param_group.foreach_all_gather
    gathered: list[str | None] = []  # names of weights, each as often as it is put together

    def noted(params, *args, **kwargs):
        gathered.extend(param._param_fqn for param in params)
        return gather(params, *args, **kwargs)

    _fsdp_param_group.foreach_all_gather = noted
    for name, run in RUNS.items():
        gathered.clear()
        torch.save(run(folder, slice(2 * rank, 2 * rank + 2)), folder / f"{name}.{rank}")
        torch.save(gathered, folder / f"{name}.{rank}.gathered")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo may abort a process at its end


if __name__ == "__main__":
    main(Path(sys.argv[1]))
