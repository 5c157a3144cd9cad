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

Trainer = TypeVar("Trainer", bound=SFTTrainer)


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
        outputs = patched(self, *args, labels=labels, return_logits=False, return_stats="differentiable", **kwargs)
        shifted = kwargs.get("shift_labels")
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shifted is None else shifted
        stats = outputs.stats
        return FusedCausalLMOutput(loss=outputs.loss, log_probs=stats.log_prob, entropy=stats.entropy,
                                   is_top1=stats.top1, label_mask=targets != -100,
                                   aux_loss=outputs.get("aux_loss"))  # fmt: skip

    model.forward = MethodType(forward, model)
    return trainer
