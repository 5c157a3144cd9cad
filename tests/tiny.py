"""Tiny random models, a tiny tokenizer and a little text, for every test. Nothing is downloaded; all is seeded."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cosup.data.schema import Instance, Passage, Reference

VOCABULARY = 300  # of tiny_tokenizer(), before control tokens
_THINGS = ["hat", "river", "tower", "song", "planet", "engine", "poem", "bridge", "garden", "violin", "castle"]
_KINDS = ["red", "old", "deep", "quiet", "famous", "northern", "wooden", "strange", "early", "green", "heavy", "round"]


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A fresh byte-level BPE tokenizer of 300 tokens: "</s>" ends a text, no begin, no pad, no control tokens yet."""
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(_trained()), eos_token="</s>")


def tiny_gen(
    seed: int = 0, *, hidden_size: int = 32, layers: int = 2, vocab_size: int = VOCABULARY, tied: bool = False
) -> LlamaForCausalLM:
    """A random Llama, float32, eval mode. Two key-value heads of four, so that grouped attention is tried too."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # large, so that random models disagree clearly
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    return _seeded(LlamaForCausalLM, config, seed)


def tiny_encoder(seed: int = 1, *, hidden_size: int = 24, vocab_size: int = VOCABULARY) -> BertModel:
    """A random Bert without a head, float32, eval mode; of another width than `tiny_gen`, so a projection is needed."""
    config = BertConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return _seeded(BertModel, config, seed)


def tiny_passages(n: int) -> dict[str, Passage]:
    """n different passages, "p0" first; every seventh has no title."""
    passages = [
        Passage(f"p{i}", f"{kind} {thing} {i}" if i % 7 else "", f"The {thing} number {i} is {kind}. It stands alone.")
        for i, kind, thing in ((i, _KINDS[i % len(_KINDS)], _THINGS[i % len(_THINGS)]) for i in range(n))
    ]
    return {passage.id: passage for passage in passages}


def tiny_instances(n: int) -> list[Instance]:
    """n instances over tiny_passages(n): of every four one has text alone, one two references, one a hard negative."""
    passages = list(tiny_passages(n).values())
    instances = []
    for i, passage in enumerate(passages):
        other = passages[(i + 3) % n]
        first = Reference(passage.id, passage.text.split(". ")[0] + ".")
        question = f"Which is number {i}?"
        if i % 4 == 3:
            instances.append(Instance(f"q{i}", question, (f"It is {i}.",), answers=(str(i),)))
        elif i % 4 == 2:
            second = Reference(other.id, "It stands alone.")
            instances.append(Instance(f"q{i}", question, (first, " And ", second), (passage.id, other.id)))
        else:
            negatives = (other.id,) if i % 4 == 1 and other.id != passage.id else ()
            instances.append(
                Instance(f"q{i}", question, ("See: ", first, " Done."), (passage.id,), negatives, (str(i),))
            )
    return instances


def tiny_folder(folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Save a tiny model and its tokenizer as `from_pretrained` wants them."""
    model.save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return Path(folder)


@cache
def _trained() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([passage.text for passage in tiny_passages(60).values()], trainer)
    return tokenizer.to_str()


def _seeded(architecture: type[PreTrainedModel], config: LlamaConfig | BertConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return architecture(config).float().eval()
