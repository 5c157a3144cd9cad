"""Control tokens are ids that only the package places: no text yields one, and no text is lost on the way."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from cosup.tokens import (
    EMBED,
    END,
    GROUND,
    PAD,
    RETRIEVE,
    add_control_tokens,
    control_ids,
    encode,
    passage_ids,
    passage_text,
    prompt_ids,
)
from tiny import tiny_tokenizer

CONTROL = [RETRIEVE, GROUND, END, EMBED, PAD]
SPECIAL = ["</s>", "<s>", "[CLS]", "[SEP]", "[UNK]"]


def byte_level() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def byte_level_with_begin() -> PreTrainedTokenizerBase:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    return tokenizer


def word_piece() -> PreTrainedTokenizerBase:
    """As Bert's: lower case, compatibility forms unified, [CLS] and [SEP] around a text, no eos."""
    letters = [chr(i) for i in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *("##" + letter for letter in letters)]
    backend = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def word_level() -> PreTrainedTokenizerBase:
    """The worst case: its model has the control tokens as ordinary words, so splitting does not protect them."""
    words = ["[UNK]", "</s>", *CONTROL, "a", "hat", "is", "::"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="</s>")


def gemma() -> PreTrainedTokenizerBase:
    """Its vocabulary has white space and tags that are added tokens too, no special ones, and merges reach them."""
    letters = [*"<>/abcdefghijklmnopqrstuvwxyz[]REC:.", "\u2581", "\n"]
    pieces = ["<t", "<tag", "<tag>", "ha", "hat", "\n\n"]
    merges = [("<", "t"), ("<t", "ag"), ("<tag", ">"), ("a", "g"), ("h", "a"), ("ha", "t"), ("\n", "\n")]
    words = ["<unk>", "</s>", *letters, "ag", *pieces]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in ("<tag>", "\n", "\n\n")])
    return tokenizer


def word_level_unknown_ends() -> PreTrainedTokenizerBase:
    """One id for unknown words and for the end of a text, as in some released models: no unknown word may end it."""
    words = ["</s>", "a", "hat", "is", "::"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="</s>", eos_token="</s>")


def prepared(make) -> PreTrainedTokenizerBase:
    tokenizer = make()
    add_control_tokens(tokenizer)
    return tokenizer


MAKERS = [byte_level, byte_level_with_begin, word_piece, word_level, word_level_unknown_ends, gemma]
TOKENIZERS = {make.__name__: prepared(make) for make in MAKERS}

fragments = st.sampled_from(
    [*CONTROL, *SPECIAL, "[", "]", "Ret", "[Re", "t]", "[ret]", "</", "s>", " ", "\n", "［Ret］"]
)
hostile_text = st.lists(fragments | st.text(max_size=4), max_size=12).map("".join)


def forbidden(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ids = {tokenizer.convert_tokens_to_ids(token) for token in [*CONTROL, *SPECIAL] if token in tokenizer.get_vocab()}
    return ids - ({tokenizer.unk_token_id} - {tokenizer.eos_token_id})


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=hostile_text)
def test_no_text_yields_a_control_id(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert not forbidden(tokenizer) & set(encode(tokenizer, text))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(text=hostile_text, title=hostile_text)
def test_prompt_and_passage_hold_only_the_specials_placed_by_us(name: str, text: str, title: str) -> None:
    tokenizer = TOKENIZERS[name]
    empty = prompt_ids(tokenizer, "")
    assert forbidden(tokenizer) & set(prompt_ids(tokenizer, text)) == forbidden(tokenizer) & set(empty)
    row = passage_ids(tokenizer, title, text, 64, append_embed_token=True)
    assert row.count(control_ids(tokenizer).embed) == 1 and row[-1] == control_ids(tokenizer).embed
    assert control_ids(tokenizer).retrieve not in row


@pytest.mark.parametrize("name", ["byte_level", "byte_level_with_begin"])
@settings(max_examples=100, deadline=None)
@given(text=hostile_text)
def test_no_text_is_lost(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("make", MAKERS)
def test_adding_twice_adds_once_and_survives_saving(make, tmp_path) -> None:
    tokenizer = make()
    before, had_pad = len(tokenizer), tokenizer.pad_token_id is not None
    grown = add_control_tokens(tokenizer)
    assert len(tokenizer) == before + grown
    assert grown == (0 if make is word_level else 5 - had_pad)
    ids = control_ids(tokenizer)
    assert len({*ids[:5]}) == 5 and ids.eos in (tokenizer.eos_token_id, tokenizer.sep_token_id)

    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert add_control_tokens(tokenizer) == add_control_tokens(loaded) == 0
    assert control_ids(loaded) == control_ids(tokenizer) == ids
    hostile = "a [Ret] hat </s>[Cs]"
    assert encode(loaded, hostile) == encode(tokenizer, hostile)
    assert "[Ret]" not in tokenizer.decode([ids.retrieve], skip_special_tokens=True)


MARKERS = ["<think>", "<tool_call>", "<\uff5cUser\uff5c>", "<|im_start|>", "two words"]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("when", ["before", "between", "after"])
@pytest.mark.parametrize("how", [{}, {"normalized": True}, {"lstrip": True, "rstrip": True}, {"single_word": True}])
def test_no_text_yields_a_token_that_was_added(make, when, how) -> None:
    """Before the control tokens, after them, or after the tokenizer was used."""
    how = {"special": False, "normalized": False} | how
    tokenizer, tokens = make(), [AddedToken(marker, **how) for marker in MARKERS]
    if when == "before":
        tokenizer.add_tokens(tokens)
    add_control_tokens(tokenizer)
    if when == "after":
        encode(tokenizer, "a hat")
    if when != "before":
        tokenizer.add_tokens(tokens)
    added = {tokenizer.convert_tokens_to_ids(marker) for marker in MARKERS}
    for text in (*MARKERS, "".join(MARKERS), " a ".join(MARKERS), "\n".join(marker.upper() for marker in MARKERS)):
        rows = encode(tokenizer, text), prompt_ids(tokenizer, text), passage_ids(tokenizer, text, text, 256)
        assert not any(added & {*row} for row in rows)
    if make is byte_level:
        assert tokenizer.decode(encode(tokenizer, "".join(MARKERS))) == "".join(MARKERS)


def test_what_the_vocabulary_has_and_was_added_too_is_spelled_but_white_space() -> None:
    tokenizer = TOKENIZERS["gemma"]
    pieces = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a <tag>\nhat\n\na"))
    assert pieces == [*"a\u2581<tag>\n", "hat", "\n\n", "a"]


@pytest.mark.parametrize("make", [word_level, gemma])
@pytest.mark.parametrize("how", ["special", "ordinary", "backend"])
def test_a_word_that_is_added_later_is_noticed(make, how) -> None:
    tokenizer = prepared(make)
    hat = tokenizer.convert_tokens_to_ids("hat")
    assert hat in encode(tokenizer, "a hat")
    if how == "special":
        tokenizer.add_special_tokens({"extra_special_tokens": ["hat"]}, replace_extra_special_tokens=False)
    elif how == "ordinary":
        tokenizer.add_tokens(["hat"])
    else:
        tokenizer.backend_tokenizer.add_special_tokens(["hat"])
    assert hat not in encode(tokenizer, "a hat")


def unigram() -> PreTrainedTokenizerBase:
    """As T5's: its vocabulary has the special tokens."""
    letters = [(letter, -2.0) for letter in "\u2581abhtdps<>/"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters, ("hat", -1)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def whole_words() -> PreTrainedTokenizerBase:
    """As Llama 3's: what the vocabulary has is taken without merging."""
    words = ["</s>", *"<|>abeot\u0120h", "<|eot|>"]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|eot|>"]})
    return tokenizer


SPELLED = [(unigram, "a</s>hat<pad>"), (whole_words, "a<|eot|>b"), (whole_words, "<|eot|>")]


@pytest.mark.parametrize(("make", "text"), SPELLED)
def test_special_tokens_that_the_vocabulary_has_are_spelled(make, text) -> None:
    tokenizer = prepared(make)
    ids = encode(tokenizer, text)
    assert not {*ids} & {tokenizer.convert_tokens_to_ids(token) for token in ("</s>", "<pad>", "<|eot|>", PAD)}
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).strip("\u2581") == text


def test_a_vocabulary_without_an_unknown_token_loses_a_special_word() -> None:
    """It has no other way to write it."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["</s>", "a", "hat"])}))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert encode(tokenizer, "a </s> hat") == [1, 2]


def test_of_thousands_the_number_tells() -> None:
    """Listing them takes milliseconds."""
    tokenizer = prepared(byte_level)
    tokenizer.add_tokens([f"<unused{i}>" for i in range(1200)])
    encode(tokenizer, "a")
    tokenizer.add_tokens(["<late>"])
    assert tokenizer.convert_tokens_to_ids("<late>") not in encode(tokenizer, "<late><unused7>")
    assert tokenizer.decode(encode(tokenizer, "<late><unused7>")) == "<late><unused7>"


def test_what_is_no_text_is_told() -> None:
    with pytest.raises(ValueError, match="text: wanted a string that UTF-8 can encode, got 'a.ud800'"):
        encode(TOKENIZERS["byte_level"], "a\ud800")


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name != "word_level_unknown_ends"])
def test_plain_text_is_what_the_tokenizer_itself_makes_of_it(name) -> None:
    tokenizer = TOKENIZERS[name]
    for text in ("a hat is :: a hat", "", " a", "A  Hat.\nIs it\u00fc?"):
        assert encode(tokenizer, text) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_in_python() -> None:
    """Without a backend of its own: ByT5 reads bytes."""
    tokenizer = ByT5Tokenizer()
    add_control_tokens(tokenizer)
    tokenizer.add_tokens(["<think>"])
    assert encode(tokenizer, "<think>[Ret]</s>") == [byte + 3 for byte in b"<think>[Ret]</s>"]


def test_an_unknown_word_stays_in_the_text_as_unknown() -> None:
    tokenizer = TOKENIZERS["word_piece"]
    assert encode(tokenizer, "a ü b").count(tokenizer.unk_token_id) == 1


def test_other_special_tokens_stay_special() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>"]})
    add_control_tokens(tokenizer)
    user = tokenizer.convert_tokens_to_ids("<|user|>")
    assert tokenizer("<|user|>")["input_ids"] == [user] and user in tokenizer.all_special_ids
    assert user not in encode(tokenizer, "<|user|>")


def test_a_plain_call_of_the_tokenizer_is_as_before() -> None:
    tokenizer = prepared(byte_level)
    encode(tokenizer, "[Ret]")
    assert tokenizer("[Ret]")["input_ids"] == [control_ids(tokenizer).retrieve]


def test_missing_tokens_are_named() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match=r"\[Ret\].*add_control_tokens"):
        control_ids(tokenizer)
    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    add_control_tokens(endless)
    with pytest.raises(ValueError, match="eos"):
        control_ids(endless)
    unpadded = tiny_tokenizer()
    add_control_tokens(unpadded)
    unpadded.pad_token = None
    with pytest.raises(ValueError, match=r"got none for \['<PAD>'\]"):
        control_ids(unpadded)


def test_a_tokenizer_may_know_no_letter() -> None:
    """Of others' scripts: it has no frame to be seen, and text that it knows is read."""
    backend = Tokenizer(models.BPE({"\u05d0": 0, "</s>": 1}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    add_control_tokens(tokenizer)
    assert passage_ids(tokenizer, "", "\u05d0\u05d0", 8) == [0, 0]


def test_rows_begin_and_end_as_the_tokenizer_is_used_to() -> None:
    plain, begun, bert = (TOKENIZERS[name] for name in ("byte_level", "byte_level_with_begin", "word_piece"))
    assert prompt_ids(begun, "x") == [begun.bos_token_id, *encode(begun, "## Input:\n\nx\n\n## Output:\n\n")]
    assert plain.decode(prompt_ids(plain, "x {input}")) == "## Input:\n\nx {input}\n\n## Output:\n\n"
    row = passage_ids(bert, "hat", "red", 16)
    assert (row[0], row[-1]) == (bert.cls_token_id, bert.sep_token_id)


def test_a_passage_is_cut_but_keeps_its_frame() -> None:
    bert = TOKENIZERS["word_piece"]
    embed = control_ids(bert).embed
    whole = passage_ids(bert, "hat", "a b c d e f", 64, append_embed_token=True)
    cut = passage_ids(bert, "hat", "a b c d e f", 8, append_embed_token=True)
    assert len(cut) == 8 and cut[:6] == whole[:6] and cut[6:] == [bert.sep_token_id, embed] == whole[-2:]
    assert passage_ids(bert, "hat", "a", 4, append_embed_token=True) == [cut[0], cut[1], *cut[6:]]
    with pytest.raises(ValueError, match="max_length: wanted more than 3, got 3"):
        passage_ids(bert, "hat", "a", 3, append_embed_token=True)


def test_a_passage_without_title_is_its_text() -> None:
    assert passage_text("Hat", "It warms.") == "Hat :: It warms."
    assert passage_text("", "It warms.") == "It warms."
