"""Control tokens, and plain text as ids.

A control token means something only where this package puts it as an id. Text (a question, a passage, an answer) is
encoded by `encode`, which never yields an added token, special or not, whatever is written in the text.

    prompt                      text      [Ret] passage [Cs] grounded text [Ce]      text      </s>
                                            |
                                            the hidden state here is the query for the passage

Source: Semiparametric Token-Sequence Co-Supervision, arXiv 2403.09024 (token names and prompt as in its release).
"""

from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakSet

from tokenizers import Tokenizer
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
    added = _added(tokenizer).special
    missing = [token for token in (RETRIEVE, GROUND, END, EMBED) if token not in added]
    if missing:
        tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.add_special_tokens({"pad_token": PAD})
    _added_by.cache_clear()  # a word of the vocabulary can have become special, at the same length
    return len(tokenizer) - before


def control_ids(tokenizer: PreTrainedTokenizerBase) -> ControlIds:
    """The ids of the control tokens.

    Raises ValueError where `add_control_tokens` was not called, or the tokenizer has no token that ends a text.
    """
    added = _added(tokenizer).special
    missing = [token for token in (RETRIEVE, GROUND, END, EMBED) if token not in added]
    if missing or tokenizer.pad_token_id is None:
        raise ValueError(f"tokenizer: wanted control tokens, got none for {missing or [PAD]}; call add_control_tokens")
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if eos is None:
        raise ValueError("tokenizer: wanted an eos (or sep) token, got neither")
    return ControlIds(added[RETRIEVE], added[GROUND], added[END], added[EMBED], tokenizer.pad_token_id, eos)


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of plain text. It never yields an added token, special or not, even if it spells one.

    The text is tokenized by the base vocabulary alone, which does not match added tokens. An entry of the base
    vocabulary that is also an added token (special tokens of word-level vocabularies, tags of Gemma's) is spelled
    letter by letter. Added tokens of white space, single letters that are not special, and the unknown token are kept.

    Raises ValueError for text that UTF-8 cannot encode.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # implemented in Python: there this flag covers all added tokens
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    else:
        plain = Tokenizer(backend.model)
        for part in ("normalizer", "pre_tokenizer"):
            if getattr(backend, part) is not None:
                setattr(plain, part, getattr(backend, part))
        try:
            ids = plain.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(f"text: wanted a string that UTF-8 can encode, got {text!r}") from error
    instead = _added(tokenizer).instead
    if instead.keys().isdisjoint(ids):
        return ids
    return [piece for i in ids for piece in instead.get(i, (i,))]


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
    special = _added(tokenizer).forbidden
    plain = [position for position, i in enumerate(ids) if i not in special]
    return (ids[: plain[0]], ids[plain[-1] + 1 :]) if plain else ([], [])


class _Added(NamedTuple):
    special: dict[str, int]
    forbidden: set[int]  # their ids, less the unknown token's unless it also ends or pads
    instead: dict[int, tuple[int, ...]]  # ids that text may yield but must not -> ids of their letters


_many: WeakSet[PreTrainedTokenizerBase] = WeakSet()  # tokenizers that add thousands: listing those takes 15 ms


def _added(tokenizer: PreTrainedTokenizerBase) -> _Added:
    listed = () if tokenizer in _many else tuple(tokenizer.added_tokens_decoder)
    if len(listed) > 1000:
        _many.add(tokenizer)
        listed = ()
    return _added_by(tokenizer, len(tokenizer), listed, tuple(tokenizer.all_special_ids), tokenizer.pad_token_id)


@lru_cache(maxsize=8)
def _added_by(tokenizer: PreTrainedTokenizerBase, *_: Any) -> _Added:
    """Cached; the other arguments change when tokens are added."""
    added = tokenizer.added_tokens_decoder
    special = {token.content: i for i, token in added.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    forbidden = ({*special.values()} - {tokenizer.unk_token_id}) | ends
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = {i: word for word, i in special.items() if i in forbidden}
    words |= {i: token.content for i, token in added.items() if not (token.special or token.content.isspace())}
    instead = {}
    for i, word in words.items():
        letters = () if backend is None else _letters(backend.model, word)
        if i in forbidden or (backend is not None and backend.model.id_to_token(i) == word):
            instead[i] = tuple(letter for letter in letters if letter not in forbidden)
    return _Added(special, forbidden, instead)


def _letters(model: Any, word: str) -> tuple[int, ...]:
    try:
        return tuple(piece.id for letter in word for piece in model.tokenize(letter))
    except Exception:  # a vocabulary without an unknown token
        return ()
