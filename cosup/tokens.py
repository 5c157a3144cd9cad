"""Control tokens, and plain text as ids.

A control token means something only where this package puts it as an id. Text (a question, a passage, an answer) is
encoded by `encode`, which never yields a control or special id, whatever is written in the text.

    prompt                      text      [Ret] passage [Cs] grounded text [Ce]      text      </s>
                                            |
                                            the hidden state here is the query for the passage

Source: Semiparametric Token-Sequence Co-Supervision, arXiv 2403.09024 (token names and prompt as in its release).
"""

from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

RETRIEVE, GROUND, END, EMBED, PAD = "[Ret]", "[Cs]", "[Ce]", "[Emb]", "<PAD>"

# A word whose embedding each control token starts from: one that leads on to what follows it.
STARTS_FROM = {RETRIEVE: " called", GROUND: " says", END: ".", EMBED: " is"}

_PROMPT = "## Input:\n\n{input}\n\n## Output:\n\n"


class ControlIds(NamedTuple):
    """Ids of one tokenizer. `eos` ends an output; for an encoder without one it is the separator."""

    retrieve: int  # ask for a passage
    ground: int  # the text that rests on the passage begins
    end: int  # it ends
    embed: int  # appended to a passage where Ctx pools by token
    pad: int
    eos: int


def add_control_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the control tokens, and a pad token where there is none; a second call changes nothing.

    Returns the number of tokens that the vocabulary grew by; resize the model's embeddings if it is not 0.
    """
    before = len(tokenizer)
    added = _special_ids(tokenizer, before)
    missing = [token for token in (RETRIEVE, GROUND, END, EMBED) if token not in added]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    _special_ids.cache_clear()  # a word of the vocabulary can have become special, at the same length
    return len(tokenizer) - before


def control_ids(tokenizer: PreTrainedTokenizerBase) -> ControlIds:
    """The ids of the control tokens.

    Raises ValueError where `add_control_tokens` was not called, or the tokenizer has no token that ends a text.
    """
    added = _special_ids(tokenizer, len(tokenizer))
    missing = [token for token in (RETRIEVE, GROUND, END, EMBED) if token not in added]
    if missing or tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer: wanted control tokens, got none for {missing or [PAD]}; call add_control_tokens")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if eos is None:
        raise ValueError("tokenizer: wanted an eos (or sep) token, got neither")
    return ControlIds(added[RETRIEVE], added[GROUND], added[END], added[EMBED], tokenizer.pad_token_id, eos)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text, nothing added. Never a control or special id, even where the text spells one.

    Special tokens written in the text are split into ordinary pieces. A vocabulary that has one as an ordinary
    entry too (word-level ones can) would still reach its id: such ids are dropped. The unknown token is kept.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    special = _forbidden(tokenizer)
    return [i for i in ids if i not in special]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, input: str) -> list[int]:
    """Ids of "## Input:\\n\\n{input}\\n\\n## Output:\\n\\n", after the token that the tokenizer itself begins with."""
    return _frame(tokenizer)[0] + encode(tokenizer, _PROMPT.format(input=input))


def passage_text(title: str, text: str) -> str:
    """A passage as both models read it: "title :: text"."""
    return f"{title} :: {text}" if title else text


def passage_ids(
    tokenizer: PreTrainedTokenizerBase, title: str, text: str, max_length: int, *, append_embed_token: bool = False
) -> list[int]:
    """A passage as Ctx reads it: the tokenizer's own begin token, title and text, its own end token, [Emb] if asked.

    Only the text is cut to keep the row within `max_length`; ValueError where that leaves none. (Gen reads a passage
    bare: encode(tokenizer, passage_text(title, text))[:max_length].)
    """
    prefix, suffix = _frame(tokenizer)
    if append_embed_token:
        suffix = [*suffix, control_ids(tokenizer).embed]
    room = max_length - len(prefix) - len(suffix)
    if room < 1:
        raise ValueError(f"max_length: wanted more than {len(prefix) + len(suffix)}, got {max_length}")
    return prefix + encode(tokenizer, passage_text(title, text))[:room] + suffix


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer itself puts before and after a text, and so its models expect."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    special = _forbidden(tokenizer)
    plain = [position for position, i in enumerate(ids) if i not in special]
    return (ids[: plain[0]], ids[plain[-1] + 1 :]) if plain else ([], [])


def _forbidden(tokenizer: PreTrainedTokenizerBase) -> set[int | None]:
    """Ids that text must not yield: all that are special, less the unknown token unless it also ends or pads."""
    ends: set[int | None] = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    return ({*_special_ids(tokenizer, len(tokenizer)).values()} - {tokenizer.unk_token_id}) | ends


@lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, int]:
    """Special token -> id. Cached, for it takes 15 ms where a vocabulary adds thousands; `length` notices additions."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
