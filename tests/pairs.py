"""Pairs of tiny models for every test: Gens of many families, Ctx of another or of the same, and a step of training."""

import copy

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from cosup.model import GenCtxConfig, GenCtxModel
from cosup.train import CoSupTrainer
from tiny import tiny_encoder, tiny_gen, tiny_tokenizer

_ROPE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "qwen2": Qwen2Config(**_ROPE),
    "qwen3": Qwen3Config(**_ROPE, head_dim=8),
    "gemma2": Gemma2Config(**_ROPE, head_dim=8, final_logit_softcapping=3.0),
    "cohere": CohereConfig(**_ROPE, logit_scale=0.25),
    "granite": GraniteConfig(**_ROPE, logits_scaling=4.0),
    "falcon_h1": FalconH1Config(
        **_ROPE, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8
    ),
    "phi": PhiConfig(**_ROPE),  # its head has a bias
    "gpt_neox": GPTNeoXConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    "opt": OPTConfig(
        hidden_size=32, word_embed_proj_dim=16, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, dropout=0.0
    ),
}


def family(name: str, seed: int = 0) -> LlamaForCausalLM:
    config = copy.deepcopy(FAMILIES[name])
    config.vocab_size, config.initializer_range = 300, 0.2
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 0, None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        bias = getattr(model.get_output_embeddings(), "bias", None)
        if bias is not None:
            nn.init.normal_(bias)
    return model


def pair(**choices: object) -> GenCtxModel:
    """A Llama and a Bert of another width."""
    return GenCtxModel(tiny_gen(), tiny_encoder(), tiny_tokenizer(), tiny_tokenizer(), GenCtxConfig(**choices))


def shared(gen: LlamaForCausalLM, **choices: object) -> GenCtxModel:
    return GenCtxModel(gen, None, tiny_tokenizer(), None, GenCtxConfig(shared_weights=True, **choices))


def run(model: GenCtxModel, batch: dict[str, torch.Tensor]):
    names = ("input_ids", "attention_mask", "query_index", "passage_input_ids", "passage_attention_mask")
    with torch.no_grad():
        return model(**{name: batch[name] for name in names})


def without_dropout(model: GenCtxModel) -> GenCtxModel:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def losses(trainer: CoSupTrainer) -> dict[int, dict[str, float]]:
    """What was logged of each step, without times and memory."""
    names = ("loss", "ntp_loss", "nsp_loss", "retrieval_accuracy", "grad_norm", "learning_rate")
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {log["step"]: {name: log[name] for name in names if name in log} for log in logs}


def step(trainer: CoSupTrainer, instances) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss and gradients of one training step on one batch, and the random number that comes next."""
    batch = trainer.collator(instances)
    (batch,), counts = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.model.zero_grad()
    torch.manual_seed(3)
    loss = trainer.training_step(trainer.model, batch, counts)
    grads = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    return loss.detach(), grads, torch.rand(1)
