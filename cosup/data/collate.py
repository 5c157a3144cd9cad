"""Instances as a batch of tensors: Gen's token rows with their targets, and the passages that Ctx embeds.

B instances, T tokens, Q queries (retrieval tokens of the batch), P candidate passages, L tokens of a passage

row       prompt   text   [Ret] passage [Cs]  grounded [Ce]   text   eos   padding
target    -        yes    yes   -       -     yes      yes    yes    yes   -          (passage_in_ntp=False)
                          |
                          query_index, its passage is candidate query_target

Packed, several such rows stand in one, one after another (cosup/data/packing.py).
"""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cosup.data.packing import first_fit, restarting_positions
from cosup.data.schema import Instance, Passage
from cosup.tokens import control_ids, encode, passage_ids, passage_text, prompt_ids

IGNORE = -100


class _Row(NamedTuple):
    ids: list[int]
    labels: list[int]
    queries: list[tuple[int, str]]  # position of a [Ret], id of its passage


class GenCtxCollator:
    """Makes the batch of `GenCtxModel.forward` and `co_supervision_loss` from instances.

    A row is cut at the right to `max_length`. What is lost so is counted (`report`), and the first loss is warned of.

    Args:
        gen_tokenizer, ctx_tokenizer: with control tokens added; may be the same.
        passages: every passage that an instance may name, by id.
        max_length: most tokens of a Gen row.
        max_passage_length: most tokens of a passage, in Gen's row and in Ctx's.
        passage_in_ntp: passage tokens and [Cs] are targets of next-token prediction too.
        append_embed_token: a Ctx row ends in [Emb].
        unique_passages: a passage is one candidate however often it is named; False: one candidate for each query
            and each hard negative.
        packing: several instances share a row of at most `max_length` tokens, each in the first row with room for it.
            Losses and gradients stay the same.
    """

    def __init__(
        self,
        gen_tokenizer: PreTrainedTokenizerBase,
        ctx_tokenizer: PreTrainedTokenizerBase,
        passages: Mapping[str, Passage],
        *,
        max_length: int = 512,
        max_passage_length: int = 128,
        passage_in_ntp: bool = False,
        append_embed_token: bool = False,
        unique_passages: bool = True,
        packing: bool = False,
    ):
        for name, value in (("max_length", max_length), ("max_passage_length", max_passage_length)):
            if value < 1:
                raise ValueError(f"{name}: wanted at least 1, got {value}")
        self.gen_tokenizer = gen_tokenizer
        self.ctx_tokenizer = ctx_tokenizer
        self.passages = passages
        self.max_length = max_length
        self.max_passage_length = max_passage_length
        self.passage_in_ntp = passage_in_ntp
        self.append_embed_token = append_embed_token
        self.unique_passages = unique_passages
        self.packing = packing
        self._control = control_ids(gen_tokenizer)
        self._ctx_pad = control_ids(ctx_tokenizer).pad
        self._row_of = {id: row for row, id in enumerate(passages)}
        self._counts: Counter[str] = Counter()

    def __call__(self, instances: Sequence[Instance]) -> dict[str, Tensor]:
        """Returns int64 tensors, rows padded at the right:

        input_ids, attention_mask, labels  [B, T]   labels unshifted; -100 is not a target: prompt, padding, passages
        position_ids [B, T]                         with packing only: from 0 in each instance; B rows hold them all
        query_index  [Q]                            flat index b * T + t of each [Ret], ascending
        query_target [Q]                            row of its passage among the candidates
        passage_input_ids, passage_attention_mask [P, L]   positives, then hard negatives
        candidate_ids [P]                           row of the passage in `passages`, the same in every batch

        Raises ValueError for no instances, or one that names an unknown passage.
        """
        if not instances:
            raise ValueError("instances: wanted at least one, got none")
        alone = [self._cut(self._row(instance)) for instance in instances]
        lengths = [len(row.ids) for row in alone]
        packs = first_fit(lengths, self.max_length) if self.packing else [[place] for place in range(len(alone))]
        rows = [_joined([alone[place] for place in pack]) for pack in packs]
        input_ids, attention_mask = _pad([row.ids for row in rows], self._control.pad)
        labels, _ = _pad([row.labels for row in rows], IGNORE)
        width = input_ids.shape[1]

        queries = [(b * width + t, passage) for b, row in enumerate(rows) for t, passage in row.queries]
        candidates = [passage for _, passage in queries]
        target = list(range(len(queries)))
        for instance, row in zip(instances, alone, strict=True):
            if row.queries:
                candidates.extend(instance.hard_negatives)
        if self.unique_passages:
            place = {passage: row for row, passage in enumerate(dict.fromkeys(candidates))}
            target = [place[passage] for _, passage in queries]
            candidates = list(place)
        positions = restarting_positions([[lengths[place] for place in pack] for pack in packs])
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            **({"position_ids": positions} if self.packing else {}),
            "query_index": torch.tensor([index for index, _ in queries], dtype=torch.int64),
            "query_target": torch.tensor(target, dtype=torch.int64),
            **self.candidates(candidates),
        }

    def candidates(self, ids: Sequence[str]) -> dict[str, Tensor]:
        """passage_input_ids, passage_attention_mask and candidate_ids of these passages, as in a batch."""
        passage_input_ids, passage_attention_mask = _pad([self._ctx_row(id) for id in ids], self._ctx_pad)
        return {
            "passage_input_ids": passage_input_ids,
            "passage_attention_mask": passage_attention_mask,
            "candidate_ids": torch.tensor([self._row_of[id] for id in ids], dtype=torch.int64),
        }

    def report(self) -> dict[str, int]:
        """Counts since the collator was made; in a DataLoader with workers each worker counts for itself."""
        names = ("instances", "truncated", "targets_lost", "retrievals_lost", "without_target")
        return {name: self._counts[name] for name in names}

    def _row(self, instance: Instance) -> _Row:
        ids = prompt_ids(self.gen_tokenizer, instance.input)
        labels = [IGNORE] * len(ids)
        queries = []

        def add(new: list[int], target: bool = True) -> None:
            ids.extend(new)
            labels.extend(new if target else [IGNORE] * len(new))

        for part in instance.output:
            if isinstance(part, str):
                add(encode(self.gen_tokenizer, part))
                continue
            passage = self._passage(part.passage)
            queries.append((len(ids), passage.id))
            add([self._control.retrieve])
            if part.grounded is None:
                return _Row(ids, labels, queries)
            text = encode(self.gen_tokenizer, passage_text(passage.title, passage.text))
            if self.passage_in_ntp:
                self._counts["targets_lost"] += max(0, len(text) - self.max_passage_length)
            add([*text[: self.max_passage_length], self._control.ground], target=self.passage_in_ntp)
            add([*encode(self.gen_tokenizer, part.grounded), self._control.end])
        add([self._control.eos])
        return _Row(ids, labels, queries)

    def _cut(self, row: _Row) -> _Row:
        end = self.max_length
        lost_labels = row.labels[end:]
        kept = _Row(row.ids[:end], row.labels[:end], [query for query in row.queries if query[0] < end])
        if lost_labels and not self._counts["truncated"]:
            warnings.warn(f"a row of {len(row.ids)} tokens was cut to max_length {end}; see report()", stacklevel=3)
        self._counts["instances"] += 1
        self._counts["truncated"] += bool(lost_labels)
        self._counts["targets_lost"] += sum(label != IGNORE for label in lost_labels)
        self._counts["retrievals_lost"] += len(row.queries) - len(kept.queries)
        self._counts["without_target"] += all(label == IGNORE for label in kept.labels)
        return kept

    def _ctx_row(self, id: str) -> list[int]:
        passage = self._passage(id)
        return passage_ids(
            self.ctx_tokenizer,
            passage.title,
            passage.text,
            self.max_passage_length,
            append_embed_token=self.append_embed_token,
        )

    def _passage(self, id: str) -> Passage:
        if id not in self.passages:
            raise ValueError(f"instances: passage {id!r} is not among the {len(self.passages)} passages")
        return self.passages[id]


def micro_batches(batch: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """A collator's batch in parts of `size` rows, each with an even share of the passages.

    A part has labels and the arguments of `GenCtxModel.forward`, and no padding that none of its rows needs. Queries
    and passages of the parts, one after another, are those of the batch. Raises ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"size: wanted at least 1, got {size}")
    rows, width = batch["input_ids"].shape
    starts = range(0, rows, size)
    query_row = batch["query_index"] // width
    of_rows = [name for name in ("input_ids", "attention_mask", "labels", "position_ids") if name in batch]
    ids, masks = (batch[name].tensor_split(len(starts)) for name in ("passage_input_ids", "passage_attention_mask"))
    parts = []
    for start, passage_ids_PL, passage_mask_PL in zip(starts, ids, masks, strict=True):
        stop = start + size
        length = _longest(batch["attention_mask"][start:stop])
        index = batch["query_index"][(query_row >= start) & (query_row < stop)] - start * width
        passage_length = _longest(passage_mask_PL)
        parts.append({
            **{name: batch[name][start:stop, :length] for name in of_rows},
            "query_index": index // width * length + index % width,
            "passage_input_ids": passage_ids_PL[:, :passage_length],
            "passage_attention_mask": passage_mask_PL[:, :passage_length],
        })  # fmt: skip
    return parts


def _joined(rows: list[_Row]) -> _Row:
    """One row of them all. The first token of each is no target: what stands before it is of another."""
    joined = _Row([], [], [])
    for row in rows:
        joined.queries.extend((len(joined.ids) + place, passage) for place, passage in row.queries)
        joined.ids.extend(row.ids)
        joined.labels.extend([IGNORE, *row.labels[1:]])
    return joined


def _longest(mask: Tensor) -> int:
    return int(mask.any(dim=0).sum())


def _pad(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Rows as [len(rows), longest] and the mask of what is real, both int64."""
    width = max((len(row) for row in rows), default=0)
    padded = torch.tensor([row + [value] * (width - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.int64)
    return padded.view(len(rows), width), mask.view(len(rows), width)
