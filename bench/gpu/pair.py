"""A Gen/Ctx pair with random weights, of any size, and data for it: nothing is fetched."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast

from cosup.data.schema import Instance, Passage, Reference
from cosup.model import GenCtxModel

SMOLLM2 = {"hidden": 576, "layers": 30, "intermediate": 1536, "heads": 9, "vocabulary": 49152}  # of 135M weights


def random_pair(device: str, *, hidden: int, layers: int, intermediate: int = 128, heads: int = 1,
                vocabulary: int = 300, attention: str | None = None,
                dtype: torch.dtype = torch.float32) -> GenCtxModel:  # fmt: skip
    """Gen and Ctx of one architecture, Llama's, with a third of the heads for keys where that is possible."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads, vocab_size=vocabulary, tie_word_embeddings=True,
        pad_token_id=None, bos_token_id=None, eos_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    halves = (LlamaForCausalLM(config), LlamaModel(config))
    gen, ctx = (half.to(device, dtype).train() for half in halves)
    return GenCtxModel(gen, ctx, _tokenizer(), _tokenizer())


def passages(n: int, words: int = 12) -> dict[str, Passage]:
    texts = (" ".join(f"{(7 * i + 13 * k) % 997}" for k in range(words)) for i in range(n))
    return {f"p{i}": Passage(f"p{i}", f"title {i}", text) for i, text in enumerate(texts)}


def instances(n: int, words: int = 12) -> list[Instance]:
    """One a passage: a question, and an answer that is grounded in it."""
    found = []
    for i, (name, passage) in enumerate(passages(n, words).items()):
        found.append(Instance(f"q{i}", f"What is {i}?", ("It is ", Reference(name, passage.text)), (name,)))
    return found


def _tokenizer() -> PreTrainedTokenizerFast:
    """Of bytes: "</s>" ends a text."""
    alphabet = {piece: i + 1 for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE({"</s>": 0} | alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
