"""Every causal language model of transformers, tiny and random: cosup.patch leaves its loss and gradients as they are.

    python tests/architectures.py                  all of them; writes docs/architectures.md
    python tests/architectures.py llama mixtral    these alone, with their errors over those allowed
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import cosup

PAGE = Path(__file__).parents[1] / "docs/architectures.md"

# Set wherever a config, or one within it, has the name.
SIZES = {
    1: """bos_token_id decoder_start_token_id mamba_n_groups n_group n_groups num_expert_group topk_group""",
    2: """decoder_layers depth encoder_layers eos_token_id index_n_heads linear_num_key_heads moe_topk n_layer n_layers
        num_blocks num_decoder_layers num_encoder_layers num_experts_per_tok num_experts_per_token num_hidden_layers
        num_key_value_heads num_layers zero_expert_num""",
    4: """attention_heads chunk_size decoder_attention_heads encoder_attention_heads index_topk linear_num_heads
        linear_num_value_heads mamba_chunk_size mamba_dt_rank mamba_n_heads mamba_num_heads moe_num_experts n_head
        n_heads n_routed_experts num_attention_heads num_decoder_attention_heads num_encoder_attention_heads num_experts
        num_heads num_local_experts rotary_dim""",
    8: """dim_head head_dim hidden_size_per_layer_input linear_head_dim linear_key_head_dim linear_value_head_dim
        mamba_d_state patch_size qk_nope_head_dim qk_rope_head_dim ssm_state_size state_size v_head_dim""",
    16: """image_size index_head_dim kv_lora_rank mamba_d_head mamba_head_dim moe_intermediate_size
        moe_shared_expert_intermediate_size q_lora_rank qk_head_dim shared_expert_intermediate_size
        shared_experts_intermediate_size shared_intermediate_size""",
    32: """d_model embed_dim embedding_dim embedding_size hidden_size hidden_size_global n_embd word_embed_proj_dim""",
    48: """d_ff d_inner decoder_ffn_dim dff dim_ff encoder_ffn_dim expert_ffn_hidden_size ffn_dim ffn_hidden_size
        intermediate_size mlp_dim n_inner""",
    64: """mamba_d_ssm max_position_embeddings max_seq_len model_max_length n_ctx n_positions""",
    90: """unpadded_vocab_size""",
    96: """vocab_size vocab_size_per_layer_input""",
    # what a model may do to its logits and its loss: strongly enough to be seen
    0.1: """aux_loss_coef init_std initializer_range moe_loss_weight router_aux_loss_coef z_loss_coefficient""",
    0.5: """final_logit_softcapping logits_soft_cap output_logit_soft_cap""",
    0.7: """lm_head_multiplier logit_scale logits_mup_width_multiplier logits_scaling""",
}
TINY = {name: size for size, names in SIZES.items() for name in names.split()}
TINY |= {"pad_token_id": 0, "output_router_logits": True, "lm_head_bias": True}
DOTS3 = {f"swa_{name}": TINY[name] for name in ("num_attention_heads", "q_lora_rank", "kv_lora_rank",
                                                "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}  # fmt: skip
DOTS3 |= {"swa_num_key_value_heads": 4, "swa_head_dim": 16}
QWEN4 = {"hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
         "indexer_compress_ratio": 2}  # fmt: skip
# What a type needs besides; for the configs within, by their names.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 96, "use_cache": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"mlp_layer_types": ["dense"] * 2, "per_layer_config": {}, "adapter_in_dim": 32,
                          "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config": {"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"], "axial_pos_shape": [2, 4],
                 "axial_pos_embds_dim": [16, 16], "attention_head_size": 8, "local_attn_chunk_length": 4,
                 "lsh_attn_chunk_length": 4, "num_buckets": 2, "hash_seed": 0},
    "roc_bert": {"pronunciation_vocab_size": 96, "shape_vocab_size": 96},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "mode": "train", "use_cache": False},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention"] * 2 + ["hybrid"] * 2, "num_hidden_layers": 4},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
# Why a type is not exact, for whoever uses it.
REASONS = {
    "gemma3n": "its images go through timm, which is not installed here. Its language model, gemma3n_text, is exact",
    "gemma4_assistant": "its own checks allow no config to build it from; and as the next one it takes no labels",
    "gemma4_unified_assistant": "it drafts for another model and takes no labels, so it has no loss",
    "musicgen": "it has a head for each codebook, and its loss is the mean of their cross entropies, not that of one",
    "musicgen_melody": "the same",
    "prophetnet": "its loss is over two streams, of the next token and the one after it, by log_softmax, not one cross "
    "entropy",
}
FEW = 8 * torch.finfo(torch.float32).eps  # for sums that are taken in another order
TEXT = """# Architectures

[`cosup.patch`](../cosup/patching.py) knows no model by name. So each of the {all} types of causal language models that
transformers {transformers} has is built, tiny and random, and trained for a step: **{exact} are exact**, {refused} are
refused with the reason, {not_built} cannot be built or trained here.

*Exact* means that with `cosup.patch` the loss and the gradient of every parameter have at most twice the error of the
model as it is, both against the same step in float64, plus 8 units of rounding of the loss and of the model's largest
gradient. Where a model does not run in float64 the two are compared with each other, within those 8 units. The same
parameters have a gradient; there are no logits; every other output (caches, router logits, auxiliary losses) is equal
to the bit; and after `cosup.unpatch` the model is, too.

*Refused* means a `ValueError` that says why, from `cosup.patch` or from the first step, and a model that is as before.

What was tried: float32 on a CPU, with torch {torch}; two texts of 8 tokens, some labels ignored; no images or sounds
but where a model takes nothing else (git); no dropout where a config can say so; soft caps, scales, auxiliary losses
and a z-loss switched on where it has them. What was not: released weights, and other switches of a config.

    python tests/architectures.py                                       # makes this page
    pytest tests/test_patching_architectures.py --release               # the same, and fails where it differs

Either takes about a minute (2 cores of an AMD EPYC, Python 3.11).

| type | class | with `cosup.patch` |
| --- | --- | --- |
{rows}
"""


def tiny_config(default: PreTrainedConfig, own: dict[str, Any]) -> PreTrainedConfig:
    """A config of the default's class: TINY, no dropout, one layer of each kind; ``own`` decides where it speaks."""
    given = default.to_dict()
    made = {name: value for name, value in TINY.items() if name in given or name in default.attribute_map}
    made |= {name: type(value)(0) for name, value in given.items() if "drop" in name and type(value) in (float, int)}
    kinds = list(dict.fromkeys(given.get("layer_types") or ()))
    if len(kinds) > 1:
        made |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    if "kv_lora_rank" in given:  # keys of all heads are read from one latent vector
        made["num_key_value_heads"] = TINY["num_attention_heads"]
    made |= {name: value for name, value in own.items() if name not in default.sub_configs}
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            made[name] = tiny_config(part, own.get(name, {}))
    return type(default)(**made)


def build(model_type: str) -> nn.Module:
    """A random model of a type, float32, training. Composite configs give what the class takes of them, as in Auto."""
    model_class = getattr(transformers, CLASSES[model_type])
    config = tiny_config(CONFIG_MAPPING[model_type](), OWN.get(model_type, {}))
    parts = [getattr(config, name) for name in config.sub_configs]
    config = next((part for part in parts if type(part) is model_class.config_class), config)
    torch.manual_seed(0)
    return model_class._from_config(config, dtype=torch.float32).train()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """A training step's: two texts of 8 tokens, some labels ignored, and what a model cannot do without."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 90, (2, 8), generator=generator)
    labels = tokens.clone()
    labels[0, :3] = labels[1, 4] = labels[1, 7] = -100
    if model.config.model_type.startswith("musicgen"):  # [B C, T] and [B, T, C], of C codebooks
        tokens, labels = tokens.repeat(4, 1), labels[..., None].repeat(1, 1, 4)
    batch = {"input_ids": tokens, "labels": labels}
    if model.config.model_type == "git":
        batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator)
    return batch


class Step(NamedTuple):
    outputs: dict[str, Tensor]  # all of them, those in tuples and caches too
    grads: dict[str, Tensor]


class Verdict(NamedTuple):
    status: str  # "exact", "refused", "not built"; of `survey`, "wrong"
    reason: str = ""
    loss_error: float = 0.0  # over what is allowed
    grad_error: float = 0.0


def compare(model_type: str) -> Verdict:
    """Train a model for a step: as it is, patched, and patched no more.

    "exact":     loss and gradients within `errors` of the unpatched model's, the same parameters with a gradient, no
                 logits, and all other outputs equal to the bit
    "refused":   with a ValueError, by `cosup.patch` or in the step
    "not built": transformers cannot build or train it here

    Raises AssertionError where it is none of these, where a step is not the same twice, or where the model is not
    equal to the bit after `cosup.unpatch`.
    """
    try:
        model = build(model_type)
        batch = inputs(model)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        plain = step(model, batch)
    except Exception as error:
        return Verdict("not built", f"{type(error).__name__}: {error}")
    before = attributes(model)
    assert_equal(step(model, batch), plain, "the same step again")
    patched, reason = None, ""
    try:
        patched = step(cosup.patch(model), batch)
    except ValueError as error:
        reason = str(error)
        if not reason.startswith("model: wanted"):
            raise
    model.zero_grad()
    assert cosup.unpatch(model) is model and attributes(model) == before
    assert not differing(model.state_dict(), weights)
    assert_equal(step(model, batch), plain, "after unpatch")
    if patched is None:
        return Verdict("refused", reason)
    assert "logits" not in patched.outputs
    rest = {name: value for name, value in plain.outputs.items() if name != "logits"}
    assert differing(patched.outputs, {**rest, "loss": patched.outputs["loss"]}) == []
    assert patched.grads.keys() == plain.grads.keys(), patched.grads.keys() ^ plain.grads.keys()
    loss_error, grad_error = errors(patched, plain, reference(model_type, batch) or plain)
    assert loss_error <= 1 and grad_error <= 1, f"{loss_error} and {grad_error} of what is allowed"
    return Verdict("exact", "", loss_error, grad_error)


def step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    model.zero_grad()
    torch.manual_seed(2)
    outputs = model(**batch)
    outputs.loss.backward()
    grads = {name: w.grad.clone() for name, w in model.named_parameters() if w.grad is not None}
    return Step(dict(tensors(dict(outputs))), grads)


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in a model's outputs, by their place."""
    if isinstance(value, Tensor):
        yield name, value.detach().clone()
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, f"{name}.{key}" if name else str(key))
    elif "Cache" in type(value).__name__:
        yield from tensors(vars(value), name)


def reference(model_type: str, batch: dict[str, Tensor]) -> Step | None:
    """The step in float64; None where the model does not run in it."""
    model = build(model_type).double()
    model.set_experts_implementation("eager")  # torch's grouped products know no float64
    try:
        return step(model, {k: v.double() if v.is_floating_point() else v for k, v in batch.items()})
    except RuntimeError:
        return None


def errors(patched: Step, plain: Step, exact: Step) -> tuple[float, float]:
    """Of the loss and of the worst gradient, over what is allowed: twice the unpatched model's error against float64,
    and a few units of rounding of the loss and of the model's largest gradient.

    A model that casts to float32 on its way has only the smaller an error. Without a run in float64, or where that one
    chose another expert, patched and unpatched models are compared with each other.
    """
    largest = max(grad.abs().max().item() for grad in exact.grads.values())
    if max(distance(plain.grads[name], exact.grads[name]) for name in exact.grads) > 1e-3 * largest:
        exact = plain
    loss, loss_plain, loss_exact = (run.outputs["loss"] for run in (patched, plain, exact))
    allowed = 2 * distance(loss_plain, loss_exact) + FEW * loss_exact.item()
    ratios = [distance(patched.grads[name], grad) / (2 * distance(plain.grads[name], grad) + FEW * largest)
              for name, grad in exact.grads.items()]  # fmt: skip
    return distance(loss, loss_exact) / allowed, max(ratios)


def distance(one: Tensor, other: Tensor) -> float:
    return (one.double() - other.double()).abs().max().item()


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names that only one has, or whose tensors differ in a bit."""
    return [name for name in {**one, **other}
            if name not in one or name not in other or not torch.equal(one[name], other[name])]  # fmt: skip


def assert_equal(one: Step, other: Step, when: str) -> None:
    wrong = differing(one.outputs, other.outputs) + differing(one.grads, other.grads)
    assert not wrong, f"{when}: {wrong}"


def attributes(model: nn.Module) -> dict[str, list[str]]:
    return {name: [*vars(module)] for name, module in model.named_modules()}


def survey() -> dict[str, Verdict]:
    """All types, each said as it is done."""
    verdicts = {}
    for model_type in sorted(CLASSES):
        try:
            verdicts[model_type] = compare(model_type)
        except AssertionError as error:
            verdicts[model_type] = Verdict("wrong", str(error))
        print(model_type, *verdicts[model_type][:2], flush=True)
        gc.collect()
    return verdicts


def page(verdicts: dict[str, Verdict]) -> str:
    counts = Counter(verdict.status for verdict in verdicts.values())
    reasons = {name: f": {REASONS.get(name, verdict.reason)}" for name, verdict in verdicts.items() if verdict.reason}
    rows = [f"| {name} | {CLASSES[name]} | {verdict.status}{reasons.get(name, '')} |"
            for name, verdict in verdicts.items()]  # fmt: skip
    return TEXT.format(
        all=len(verdicts), exact=counts["exact"], refused=counts["refused"], not_built=counts["not built"],
        transformers=transformers.__version__, torch=torch.__version__.partition("+")[0], rows="\n".join(rows),
    )  # fmt: skip


def main() -> int:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for model_type in sys.argv[1:]:
        print(model_type, *compare(model_type))
    if sys.argv[1:]:
        return 0
    verdicts = survey()
    wrong = [name for name, verdict in verdicts.items() if verdict.status == "wrong"]
    if wrong:
        print("wrong:", *wrong, file=sys.stderr)
        return 1
    PAGE.write_text(page(verdicts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
