"""TRL's SFTTrainer on cosup.

    trainer = cosup.integrations.trl.patch(SFTTrainer(...))

From TRL 1.16 on, its trainers ask a model for each target's log-probability (`fused_lm_head=True`), not for logits.
A patched one answers from cosup's statistics, whatever the model does to its logits; the trainer's own loss, its
entropy and its accuracy are made of them as before.
"""

import functools
from types import MethodType
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor
from trl import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

import cosup.patching
from cosup.softmax import RowStats

Trainer = TypeVar("Trainer", bound=SFTTrainer)
_THEIRS = "trl.trainer.sft_trainer"


def patch(trainer: Trainer) -> Trainer:
    """Let the trainer's model answer by :func:`cosup.patch`. The trainer is changed, and returned.

    Raises:
        ValueError: Not an SFTTrainer, or a model that :func:`cosup.patch` refuses.
    """
    if not isinstance(trainer, SFTTrainer):
        raise ValueError(f"trainer: wanted an SFTTrainer of trl, got {type(trainer).__name__}")
    model: Any = trainer.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    patched = cosup.patching.patch(model).forward.__func__

    @functools.wraps(patched)
    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, **kwargs):
        if not fused_lm_head or labels is None:
            return patched(self, *args, labels=labels, **kwargs)
        of_sum = _sums(trainer)
        return_stats = True if of_sum else "differentiable"
        outputs = patched(self, *args, labels=labels, return_logits=False, return_stats=return_stats, **kwargs)
        stats, targets = outputs.stats, kwargs.get("shift_labels")
        if targets is None:  # TRL's rows have one less than the labels
            stats, targets = RowStats(*(rows[:, :-1] for rows in stats)), labels[:, 1:]
        counts, log_probs = targets != -100, stats.log_prob
        if of_sum:  # the first row has the gradient of all
            total = counts.sum() * outputs.cross_entropy
            log_probs = F.pad((total.detach() - total)[None], (0, log_probs.numel() - 1)).view_as(log_probs) + log_probs
        return FusedCausalLMOutput(loss=outputs.loss, log_probs=log_probs, entropy=stats.entropy, is_top1=stats.top1,
                                   label_mask=counts, aux_loss=outputs.get("aux_loss"))  # fmt: skip

    model.forward = MethodType(forward, model)
    return trainer


def _sums(trainer: Any) -> bool:
    """Whether the loss asks no more than the sum of log-probabilities: its gradient comes from the loss's own pass."""
    loss = getattr(trainer.compute_loss, "__func__", None)
    is_theirs = loss is not None and (loss.__module__, loss.__qualname__) == (_THEIRS, "SFTTrainer.compute_loss")
    return is_theirs and trainer.args.loss_type == "nll"
