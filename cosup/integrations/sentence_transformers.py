"""sentence-transformers' MultipleNegativesRankingLoss, its similarities made in tiles within a budget.

    loss = mean_n (logsumexp_m scale s(q[n], d[m]) - scale s(q[n], d[n]))        s: cosine or inner product

q [B, D] of the first column's texts, d [K B, D] of all others', column after column: one call of cosup.info_nce.

Source: the library's own loss, from version 6 on, https://sbert.net.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses import CachedLossMixin, has_static_embedding_input
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.losses import MultipleNegativesRankingLoss
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from cosup.contrastive import info_nce


class InfoNCELoss(CachedLossMixin, MultipleNegativesRankingLoss):
    """``MultipleNegativesRankingLoss``, and its cached form: same value and gradients, within a memory budget.

    The columns are (anchor, positive) or (anchor, positive, negative, ...), each of B texts: a query's candidates are
    the texts of all columns but the first. Labels are ignored.

    Args:
        model: Its ``sentence_embedding`` [B, D] of a column; float32, bfloat16, float16 or float64.
        scale: 1 / temperature.
        similarity_fct: ``cos_sim`` or ``dot_score`` of ``sentence_transformers.util``.
        gather_across_devices: The candidates of all processes, with their gradients (and, where ``directions`` has
            them, the queries). The loss is the mean over all processes' queries, on each of them, with the gradients
            that DistributedDataParallel wants, which takes their mean. Batches may be of different sizes.
        directions, partition_mode: "query_to_doc" and none, one or both of "query_to_query" and "doc_to_doc" (of pairs
            alone) in the "joint" softmax; or with "doc_to_query", "per_direction".
        mini_batch_size: Embed so many texts at once, twice (gradient caching); None: all texts, once.
        mask_duplicates: A candidate with the text of a query's positive is no negative of that query. Texts are
            compared as tokens, with their prompts and after truncation, by 64 bits of a digest.

    Returns:
        By ``forward``, the scalar loss in float32 (float64 for float64 vectors).

    Raises:
        ValueError: An option, or columns, that it does not take, named with what was wanted and what came.

    Sources: Henderson et al. 2017, arXiv:1705.00652, section 4.4; van den Oord et al. 2018, arXiv:1807.03748;
    mini-batches, Gao et al. 2021, arXiv:2101.06983.
    """

    def __init__(self, model: SentenceTransformer, scale: float = 20.0,
                 similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim, gather_across_devices: bool = False,
                 directions: tuple[str, ...] = ("query_to_doc",), partition_mode: str = "joint",
                 mini_batch_size: int | None = None, mask_duplicates: bool = False):  # fmt: skip
        if not isinstance(scale, float | int) or not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a number, positive and finite, got {scale!r}")
        if similarity_fct not in (cos_sim, dot_score):
            raise ValueError(f"similarity_fct must be cos_sim or dot_score, got {similarity_fct}")
        super().__init__(model, scale, similarity_fct, gather_across_devices, directions, partition_mode)
        if "doc_to_query" in directions and partition_mode == "joint":
            raise ValueError('partition_mode must be "per_direction" where directions have "doc_to_query", got "joint"')
        if mini_batch_size is not None:
            if isinstance(mini_batch_size, bool) or not isinstance(mini_batch_size, int) or mini_batch_size < 1:
                raise ValueError(f"mini_batch_size must be None or an integer of at least 1, got {mini_batch_size!r}")
            if has_static_embedding_input(model):
                raise ValueError(f"mini_batch_size must be None for a model of StaticEmbedding, got {mini_batch_size}")
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]  # the mixin's is not asked for where None
        self.mask_duplicates = mask_duplicates
        self.uses_gradient_cache = mini_batch_size is not None  # which MatryoshkaLoss asks

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        columns = list(sentence_features)
        ids = torch.cat([_ids_of_texts(column) for column in columns[1:]]) if self.mask_duplicates else None
        if self.mini_batch_size is not None:
            return self.forward_cached(columns, ids)
        return self.calculate_loss([[vectors] for vectors in embed_columns(self.model, columns)], ids)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of vectors [B, D] of each column. Their texts are not known here, so none is masked."""
        return self.calculate_loss([[vectors] for vectors in embeddings])

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of each column's parts [b, D]; ``labels``: ids of the candidates [K B] int64, or None."""
        if len(reps) < 2:
            raise ValueError(f"want an anchor, a positive and perhaps negatives, got columns: {len(reps)}")
        if "doc_to_doc" in self.directions and len(reps) > 2:
            raise ValueError(f'direction "doc_to_doc" wants (anchor, positive) pairs, got columns: {len(reps)}')
        query, *candidates = (torch.cat(parts) for parts in reps)
        group = dist.group.WORLD if self.gather_across_devices and dist.is_initialized() else None
        loss: Any = info_nce(query, torch.cat(candidates), temperature=self.temperature, candidate_ids=labels,
                             normalize=self.similarity_fct is cos_sim, symmetric="doc_to_query" in self.directions,
                             query_negatives="query_to_query" in self.directions,
                             candidate_negatives="doc_to_doc" in self.directions, process_group=group)  # fmt: skip
        if group is not None:  # gradients to be summed over processes, where the wrapper takes their mean
            loss = loss.detach() + group.size() * (loss - loss.detach())
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        names = ("scale", "gather_across_devices", "directions", "partition_mode", "mini_batch_size", "mask_duplicates")
        return {"similarity_fct": self.similarity_fct.__name__, **{name: getattr(self, name) for name in names}}


def _ids_of_texts(column: Mapping[str, Any]) -> Tensor:
    """[B] int64, equal for equal texts in all columns and processes, however they are padded."""
    tokens, mask = column.get("input_ids"), column.get("attention_mask")
    tensors = {name: value for name, value in column.items() if isinstance(value, Tensor) and value.ndim > 1}
    for made in ("token_embeddings", "sentence_embedding"):  # by the model, which writes into the column
        tensors.pop(made, None)
    if tokens is None or mask is None or not all(t.shape == tokens.shape == mask.shape for t in tensors.values()):
        shapes = {name: [*value.shape] for name, value in tensors.items()}
        raise ValueError(f"mask_duplicates wants input_ids and attention_mask [B, T] of texts alone, got {shapes}")
    rows = zip(tokens.cpu().numpy(), mask.bool().cpu().numpy(), strict=True)
    digests = b"".join(blake2b(row[kept].tobytes(), digest_size=8).digest() for row, kept in rows)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64).to(tokens.device)
