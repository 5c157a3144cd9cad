"""Train two language models together by next-token and next-sequence prediction, within a memory budget."""

from typing import TYPE_CHECKING, Any

from cosup import nn
from cosup.contrastive import info_nce, sigmoid_loss
from cosup.gradcache import cached_encode
from cosup.losses import co_supervision_loss, linear_cross_entropy, linear_log_prob
from cosup.predict import Prediction, plan_for
from cosup.softmax import RowStats

if TYPE_CHECKING:
    from cosup.index import SequenceIndex
    from cosup.model import GenCtxConfig, GenCtxModel
    from cosup.patching import patch, unpatch
    from cosup.train import CoSupConfig, CoSupTrainer

__version__ = "0.1.0"
__all__ = [
    "CoSupConfig",
    "CoSupTrainer",
    "GenCtxConfig",
    "GenCtxModel",
    "Prediction",
    "RowStats",
    "SequenceIndex",
    "cached_encode",
    "co_supervision_loss",
    "info_nce",
    "linear_cross_entropy",
    "linear_log_prob",
    "nn",
    "patch",
    "plan_for",
    "sigmoid_loss",
    "unpatch",
]

# What needs transformers is imported when it is first asked for: the losses alone need neither.
_LATER = {
    "GenCtxConfig": "model",
    "GenCtxModel": "model",
    "CoSupConfig": "train",
    "CoSupTrainer": "train",
    "SequenceIndex": "index",
    "patch": "patching",
    "unpatch": "patching",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'cosup' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"cosup.{_LATER[name]}"), name)
