"""Train two language models together by next-token and next-sequence prediction, and never store the logits."""

from cosup import nn
from cosup.losses import RowStats, co_supervision_loss, info_nce, linear_cross_entropy

__version__ = "0.1.0"
__all__ = ["RowStats", "co_supervision_loss", "info_nce", "linear_cross_entropy", "nn"]
