"""Generate, retrieve, go on generating: what Gen and a passage index do together.

    prompt   text [Ret]  passage [Cs]  grounded text [Ce]   text </s>
                    |    put in as ids
                    the hidden state here searches the index

Rows of a batch stop at different places. A row with many new tokens (its prompt, a passage) goes through Gen alone,
rows with one new token go together. In the shared cache every row ends at the right: padding is a prefix, so masks,
positions, windows and distances are those of the row on its own, and keeping the cache changes no token.

Source: Semiparametric Token-Sequence Co-Supervision, arXiv 2403.09024 (its generation, without recomputing the prefix).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cosup.data.schema import Passage
from cosup.index import PassageIndex
from cosup.tokens import ControlIds, control_ids, encode, passage_text, prompt_ids

FinishedBy = Literal["eos", "length", "context"]


@dataclass(frozen=True)
class RetrievedPassage:
    """A passage that Gen asked for.

    Attributes:
        passage: what the index gave.
        score: inner product of the query and the passage vector.
        position: of its [Ret] in Generation.tokens.
        char: of its place in Generation.text.
    """

    passage: Passage
    score: float
    position: int
    char: int


@dataclass(frozen=True)
class Generation:
    """The output for one prompt.

    Attributes:
        text: what Gen wrote, without control tokens and passages.
        passages: what was fetched, in order.
        tokens: all that followed the prompt, control tokens and passages too.
        finished_by: "eos", "length" (max_new_tokens) or "context" (max_length).
    """

    text: str
    passages: list[RetrievedPassage]
    tokens: list[int]
    finished_by: FinishedBy

    def render(self) -> str:
        """The text with each passage in its place, as «title» (its id where it has no title)."""
        start, parts = 0, []
        for retrieved in self.passages:
            name = retrieved.passage.title or retrieved.passage.id
            parts.append(f"{self.text[start : retrieved.char]}«{name}» ")
            start = retrieved.char
        return "".join([*parts, self.text[start:]])


class _Generator(Protocol):
    """What the mixin needs of its class."""

    gen: PreTrainedModel
    gen_tokenizer: PreTrainedTokenizerBase
    config: Any  # max_passage_length

    @property
    def logit_scale(self) -> float: ...

    @property
    def logit_softcap(self) -> float | None: ...


class RetrievalGeneration:
    """Mixin of `GenCtxModel`."""

    @torch.no_grad()
    def generate(
        self: _Generator,
        prompts: Sequence[str],
        index: PassageIndex,
        *,
        max_new_tokens: int = 128,
        max_retrievals: int = 4,
        max_length: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        use_cache: bool = True,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Write an output for each prompt, fetching a passage wherever Gen asks for one.

        At [Ret] the best passage of the index is put in, cut as in training, then [Cs]. An open [Cs] is closed before a
        [Ret]. [Ret] cannot be chosen once max_retrievals is reached or nothing of a passage would fit, [Ce] only where
        a [Cs] is open, the other control tokens never; the model chooses among the rest.

        Args:
            max_new_tokens: tokens that the model chooses, a row; passages and what is put in around them don't count.
            max_length: most tokens of a row, prompt and passages included; the last passage is cut to fit. None: what
                the model has positions for, if it says so.
            do_sample: from softmax(logits / temperature) within the nucleus top_p; else the likeliest token. With a
                seed a row's draws depend on the seed and its place in the batch, not on the other rows. None: seeded
                by torch.
            use_cache: False computes every row from scratch for every token: slow, and the same tokens.
            on_text: called with (row, piece) as text comes; the pieces of a row add up to its text.

        Raises ValueError for options out of range, prompts that are no list or leave no room, an index of another
        width, and a Gen whose cache cannot be kept exactly (with use_cache).
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: wanted a list of strings, got one string")
        for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("max_retrievals", max_retrievals, 0)):
            if value < least:
                raise ValueError(f"{name}: wanted at least {least}, got {value}")
        if not (temperature > 0 and temperature < float("inf")):
            raise ValueError(f"temperature: wanted a positive number, got {temperature}")
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p: wanted above 0 and at most 1, got {top_p}")
        head = self.gen.get_output_embeddings()
        if index.dim != head.weight.shape[1]:
            raise ValueError(f"index: wanted vectors of {head.weight.shape[1]}, as wide as Gen's head, got {index.dim}")
        positions = getattr(self.gen.config.get_text_config(), "max_position_embeddings", None)
        if max_length is not None and positions is not None and max_length > positions:
            raise ValueError(f"max_length: wanted at most {positions}, the positions of the model, got {max_length}")
        if use_cache and (reason := _inexact(self.gen)):
            raise ValueError(f"use_cache: Gen has {reason}, whose cache cannot be kept exactly; wanted False, got True")

        control = control_ids(self.gen_tokenizer)
        limits = _Limits(max_new_tokens, max_retrievals, max_length or positions or 2**62)
        rows = [_Row(number, prompt_ids(self.gen_tokenizer, p), self.gen_tokenizer) for number, p in enumerate(prompts)]
        for row in rows:
            if row.start >= limits.context:
                raise ValueError(f"prompts: wanted fewer than {limits.context} tokens, got {row.start} in {row.number}")
        if do_sample:
            seeds = torch.Generator().manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
            for row in rows:
                row.random.manual_seed(int(torch.randint(2**62, (), generator=seeds)))
        outside = torch.ones(head.weight.shape[0], dtype=torch.bool, device=self.gen.device)
        outside[: max(self.gen_tokenizer.get_vocab().values()) + 1] = False  # heads are padded to round sizes
        outside[[control.ground, control.embed, control.pad]] = True
        outside[control.eos] = False  # the pad token too, for some tokenizers
        states = (_Cached if use_cache else _Recomputed)(self.gen.get_decoder())

        training = self.gen.training
        self.gen.eval()
        try:
            while live := [row for row in rows if row.finished_by is None]:
                hidden = states.advance(live)  # [R, D]
                asking = [r for r, row in enumerate(live) if row.asking]
                writing = [r for r, row in enumerate(live) if not row.asking]
                if asking:
                    scores, found = index.search(hidden[asking], k=1)
                    for r, score, (passage,) in zip(asking, scores[:, 0].tolist(), found, strict=True):
                        text = encode(self.gen_tokenizer, passage_text(passage.title, passage.text))
                        live[r].take(passage, score, text[: self.config.max_passage_length], control, limits)
                if writing:
                    logits = head(hidden[writing]).float() * self.logit_scale  # [W, V]
                    if self.logit_softcap is not None:
                        logits = self.logit_softcap * torch.tanh(logits / self.logit_softcap)
                    logits = logits.masked_fill(outside, -torch.inf)
                    for w, r in enumerate(writing):
                        logits[w, live[r].forbidden(control, limits)] = -torch.inf
                    draws = [live[r].random for r in writing]
                    tokens = _sample(logits / temperature, top_p, draws) if do_sample else logits.argmax(dim=1)
                    for r, token in zip(writing, tokens.tolist(), strict=True):
                        piece = live[r].write(token, control, limits)
                        if piece and on_text is not None:
                            on_text(live[r].number, piece)
        finally:
            self.gen.train(training)
        return [row.generation() for row in rows]


@dataclass(frozen=True)
class _Limits:
    new_tokens: int
    retrievals: int
    context: int


class _Row:
    """One prompt and what follows it."""

    def __init__(self, number: int, prompt: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
        self.number = number
        self.ids = prompt
        self.start = len(prompt)
        self.cached = 0  # of these ids, how many have their keys and values in the cache
        self.chosen = 0
        self.asking = False  # the last token is a [Ret] that waits for its passage
        self.grounded = False  # a [Cs] is open
        self.passages: list[RetrievedPassage] = []
        self.text = _Text(tokenizer)
        self.random = torch.Generator()
        self.finished_by: FinishedBy | None = None

    def forbidden(self, control: ControlIds, limits: _Limits) -> list[int]:
        """Control tokens that must not be chosen next."""
        # [Ret], one passage token, [Cs] and one token after it, all within the context; a [Ce] before where one is due
        fits = len(self.ids) + self.grounded + 4 <= limits.context and self.chosen + 2 <= limits.new_tokens
        may_ask = fits and len(self.passages) < limits.retrievals
        return ([] if may_ask else [control.retrieve]) + ([] if self.grounded else [control.end])

    def write(self, token: int, control: ControlIds, limits: _Limits) -> str:
        """Append the chosen token; returns the text that it completes."""
        if token == control.retrieve:
            self.ids += [control.end] * self.grounded
            self.asking = True
        if token in (control.retrieve, control.end):
            self.grounded = False
        elif token != control.eos:
            self.text.tokens.append(token)
        self.ids.append(token)
        self.chosen += 1
        if token == control.eos:
            self.finished_by = "eos"
        elif self.chosen == limits.new_tokens:
            self.finished_by = "length"
        elif len(self.ids) == limits.context:
            self.finished_by = "context"
        return self.text.piece(whole=self.asking or self.finished_by is not None)

    def take(self, passage: Passage, score: float, text: list[int], control: ControlIds, limits: _Limits) -> None:
        """Put in the passage that was asked for."""
        position = len(self.ids) - 1 - self.start
        self.passages.append(RetrievedPassage(passage, score, position, len(self.text.written)))
        room = limits.context - len(self.ids) - 2  # for [Cs] and a token after it
        self.ids += [*text[:room], control.ground]
        self.asking, self.grounded = False, True

    def generation(self) -> Generation:
        assert self.finished_by is not None
        return Generation(self.text.written, self.passages, self.ids[self.start :], self.finished_by)


@dataclass
class _Text:
    """Tokens as text in pieces: a character whose bytes are spread over tokens is held back until it is whole."""

    tokenizer: PreTrainedTokenizerBase
    tokens: list[int] = field(default_factory=list)
    written: str = ""
    before: int = 0  # tokens[before:done] stand before the next piece: some tokenizers drop a leading space
    done: int = 0

    def piece(self, whole: bool) -> str:
        """The text since the last piece; `whole` gives out broken bytes too."""
        old, new = self._decode(self.tokens[self.before : self.done]), self._decode(self.tokens[self.before :])
        if self.done == len(self.tokens) or (new.endswith("\ufffd") and not whole):
            return ""
        self.before, self.done = self.done, len(self.tokens)
        self.written += new[len(old) :]
        return new[len(old) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class _Recomputed:
    """Each row from scratch, alone and unpadded: the definition of what `_Cached` computes."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.decoder = decoder

    def advance(self, rows: list[_Row]) -> Tensor:
        """The final hidden state [R, D] at the last token of each row."""
        return torch.cat([self._last(row) for row in rows])

    def _last(self, row: _Row) -> Tensor:
        ids = torch.tensor([row.ids], device=next(self.decoder.parameters()).device)
        states = self.decoder(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        return states.last_hidden_state[:, -1]


class _Cached:
    """The same with keys and values kept, in a cache for each group of rows that goes through the decoder together."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.decoder = decoder
        self.device = next(decoder.parameters()).device
        self.groups: list[tuple[list[_Row], DynamicCache]] = []

    def advance(self, rows: list[_Row]) -> Tensor:
        alone = [row for row in rows if row.cached == 0 or len(row.ids) - row.cached > 1]
        together = [row for row in rows if row not in alone]
        groups = [[row] for row in alone] + ([together] if together else [])
        self.groups = [(group, self._cache(group)) for group in groups]
        last = {row: state for group, cache in self.groups for row, state in self._forward(group, cache)}
        return torch.stack([last[row] for row in rows])

    def _forward(self, group: list[_Row], cache: DynamicCache) -> list[tuple[_Row, Tensor]]:
        ids = torch.tensor([row.ids[row.cached :] for row in group], device=self.device)  # [G, W], W new tokens
        cached = torch.tensor([[row.cached] for row in group], device=self.device)
        new = torch.arange(ids.shape[1], device=self.device)
        slots = torch.arange(max(row.cached for row in group) + len(new), device=self.device)
        states = self.decoder(
            input_ids=ids,
            attention_mask=(slots >= slots[-1] + 1 - len(new) - cached).long(),
            position_ids=cached + new,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        for row in group:
            row.cached = len(row.ids)
        return list(zip(group, states, strict=True))

    def _cache(self, group: list[_Row]) -> DynamicCache:
        """The cache of these rows: as it is where they went together last time, else packed anew."""
        for rows, cache in self.groups:
            if rows == group:
                return cache
        packed = DynamicCache()  # without a config: every layer keeps all, the mask alone says how far a window sees
        length = max(row.cached for row in group)
        if length == 0:
            return packed
        kept = {row: (list(cache), r) for rows, cache in self.groups for r, row in enumerate(rows)}

        def own(row: _Row, layer: int, part: int) -> Tensor:
            layers, r = kept[row]
            states = layers[layer][part][r : r + 1]  # [1, heads, slots, width]
            return F.pad(states[:, :, states.shape[2] - row.cached :], (0, 0, length - row.cached, 0))

        for layer in range(len(self.groups[0][1])):
            keys, values = (torch.cat([own(row, layer, part) for row in group]) for part in (0, 1))
            packed.update(keys, values, layer)
        return packed


def _inexact(gen: PreTrainedModel) -> str | None:
    """What keeps the cache of this model from being cut, padded and packed by rows, or None."""
    config = gen.config.get_text_config()
    layers = {type(layer) for layer in DynamicCache(config=config).layers}
    if not layers <= {DynamicLayer, DynamicSlidingWindowLayer}:
        return "layers that keep a state other than keys and values of each token"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "attention in chunks"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type") for parameters in (rope, *rope.values()) if isinstance(parameters, dict)}
    if kinds & {"dynamic", "longrope"}:
        return "rotary frequencies that change with the length of the text"
    if "position_ids" not in inspect.signature(gen.get_decoder().forward).parameters:
        return "positions that cannot be given"
    return None


def _sample(logits: Tensor, top_p: float, draws: list[torch.Generator]) -> Tensor:
    """One token a row, [W], from softmax(logits [W, V]) within the fewest likeliest tokens that hold top_p of it."""
    probs = logits.double().softmax(dim=1)
    if top_p < 1:
        ordered = probs.sort(dim=1, descending=True).values
        beyond = ordered.cumsum(dim=1) - ordered >= top_p
        probs = probs.masked_fill(probs < ordered.masked_fill(beyond, torch.inf).amin(dim=1, keepdim=True), 0)
    # in the order of the vocabulary, not of the probabilities: rounding moves a border a little, never swaps two tokens
    sums = probs.cumsum(dim=1)
    draw = torch.stack([torch.rand(1, generator=random) for random in draws]).to(sums.device, torch.float64)  # [W, 1]
    return torch.searchsorted(sums, draw * sums[:, -1:], right=True).squeeze(1)
