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

FURTHER_DIRECTIONS = {"joint": ("query_to_query", "doc_to_doc"), "per_direction": ("doc_to_query",)}


class InfoNCELoss(CachedLossMixin, MultipleNegativesRankingLoss):
    """``MultipleNegativesRankingLoss``, and its cached form: same value and gradients, within a memory budget.

    The columns are (anchor, positive) or (anchor, positive, negative, ...), each of B texts: a query's candidates are
    the texts of all columns but the first. Labels are ignored.

    Args:
        model: Its ``sentence_embedding`` [B, D] of a column; float32, bfloat16, float16 or float64.
        scale: 1 / temperature.
        similarity_fct: ``cos_sim`` or ``dot_score`` of ``sentence_transformers.util``.
        mini_batch_size: Embed so many texts at once, twice (gradient caching); None: all texts, once. By place
            it is the fourth, as in the library's cached loss.
        gather_across_devices: The candidates of all processes, with their gradients (and, where ``directions`` has
            them, the queries). The loss is the mean over all processes' queries, on each of them, with the gradients
            that DistributedDataParallel wants, which takes their mean. Batches may be of different sizes.
        directions, partition_mode: "query_to_doc" and none, one or both of "query_to_query" and "doc_to_doc" (of pairs
            alone) in the "joint" softmax; or with "doc_to_query", "per_direction".
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
                 similarity_fct: Callable[[Tensor, Tensor], Tensor] = cos_sim, mini_batch_size: int | None = None, *,
                 gather_across_devices: bool = False, directions: tuple[str, ...] = ("query_to_doc",),
                 partition_mode: str = "joint", mask_duplicates: bool = False):  # fmt: skip
        super().__init__(model)
        self.scale, self.similarity_fct, self.gather_across_devices = scale, similarity_fct, gather_across_devices
        self.directions, self.partition_mode, self.mask_duplicates = tuple(directions), partition_mode, mask_duplicates
        self.mini_batch_size = mini_batch_size  # type: ignore[assignment]  # the mixin's is not asked for where None
        self._check()

    def _check(self) -> None:
        """The options as they are now, which may have been assigned since."""
        scale, directions, mode = self.scale, {*self.directions}, self.partition_mode
        if isinstance(scale, bool) or not isinstance(scale, float | int) or not 0 < scale < float("inf"):
            raise ValueError(f"scale must be a number, positive and finite, got {scale!r}")
        if self.similarity_fct not in (cos_sim, dot_score):
            raise ValueError(f"similarity_fct must be cos_sim or dot_score, got {self.similarity_fct}")
        if mode not in FURTHER_DIRECTIONS:
            raise ValueError(f"partition_mode must be one of {[*FURTHER_DIRECTIONS]}, got {mode!r}")
        further = FURTHER_DIRECTIONS[mode]
        if "query_to_doc" not in directions or not directions <= {"query_to_doc", *further}:
            want = f'"query_to_doc" and none or more of {further} in partition_mode {mode!r}'
            raise ValueError(f"directions must be {want}, got {self.directions}")
        if self.hardness_mode is not None:
            raise ValueError(f"hardness_mode must be None, got {self.hardness_mode!r}")
        for name in ("mini_batch_size", "mini_batch_num_tokens"):
            number = getattr(self, name)
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"{name} must be None or an integer of at least 1, got {number!r}")
        for name in ("gather_across_devices", "mask_duplicates"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        model = getattr(self.model, "module", self.model)  # of DistributedDataParallel
        if self.uses_gradient_cache and has_static_embedding_input(model):
            raise ValueError(f"mini_batch_size must be None for a model of StaticEmbedding, got {self.mini_batch_size}")

    @property
    def uses_gradient_cache(self) -> bool:  # type: ignore[override]
        """Which MatryoshkaLoss asks."""
        return self.mini_batch_size is not None or self.mini_batch_num_tokens is not None

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        self._check()
        columns = list(sentence_features)
        ids = torch.cat([_ids_of_texts(column) for column in columns[1:]]) if self.mask_duplicates else None
        if self.uses_gradient_cache:
            return self.forward_cached(columns, ids)
        return self.calculate_loss([[vectors] for vectors in embed_columns(self.model, columns)], ids)

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss of vectors [B, D] of each column. Their texts are not known here, so none is masked."""
        self._check()
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
        if group is not None and loss.requires_grad:  # to be summed over processes, where the wrapper takes their mean
            loss.register_hook(lambda grad: grad * group.size())
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
