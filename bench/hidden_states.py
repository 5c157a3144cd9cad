"""Real operands for linear_cross_entropy: what a causal language model makes of a text, in one file.

x [N, D]       final hidden states, times the model's logit scale;  a bias and a softcap of the head are left out
w [V, D]       the head's weight
target [N]     int64, the token after each
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosup import pretrained
from cosup.files import readable, replaced
from cosup.tokens import encode

WINDOW = 1024  # tokens read at once, each window without what came before it
NAMES = ("x", "w", "target")


@torch.no_grad()
def write(name: str, text: str, out: Path, *, tokens: int) -> int:
    """Run the model of a folder or hub id over the first ``tokens`` tokens of a text; return how many there were.

    Raises:
        ValueError: No such model, or a text of fewer than two tokens.
    """
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, tokenizer = pretrained.load(
        "model", AutoModelForCausalLM, name, dtype=dtype, attn_implementation="auto", num_layers=None
    )
    pretrained.check_head(model)
    ids = encode(tokenizer, text)[: tokens + 1]
    if len(ids) < 2:
        raise ValueError(f"text: wanted at least two tokens, got {len(ids)}")
    model = model.eval().to(device)
    ids_N = torch.tensor(ids, device=device)
    window = min(WINDOW, getattr(model.config.get_text_config(), "max_position_embeddings", WINDOW))
    parts = [
        pretrained.final_hidden_state(model.get_decoder(), ids_T[None], torch.ones_like(ids_T)[None])[0]
        for ids_T in ids_N[:-1].split(window)
    ]
    x_ND = torch.cat(parts) * pretrained.logit_scale(model)
    operands = (x_ND, model.get_output_embeddings().weight, ids_N[1:])
    with replaced(out) as part:
        save_file({name: t.detach().cpu().clone() for name, t in zip(NAMES, operands, strict=True)}, part)
    return len(x_ND)


def read(path: Path) -> tuple[Tensor, Tensor, Tensor]:
    """x, w, target of a .safetensors file, or a .pt file of a dict of them.

    Raises:
        ValueError: A tensor is missing, or the shapes do not fit.
    """
    with readable(path):
        safe = path.suffix == ".safetensors"
        held = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    missing = [name for name in NAMES if name not in held]
    if missing:
        raise ValueError(f"{path}: wanted tensors {NAMES}, got none named {missing[0]!r}")
    x, w, target = (held[name] for name in NAMES)
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1] or target.shape != x.shape[:1]:
        raise ValueError(
            f"{path}: want x [N, D], w [V, D], target [N], got {[*x.shape]}, {[*w.shape]}, {[*target.shape]}"
        )
    return x, w, target
