"""What a pair needs of any transformers model: its weights, rows for new tokens, its final hidden state, its head.

    logits = softcap(scale * (weight @ hidden + bias))        softcap(z) = c * tanh(z / c), where the model has one

The head is computed by the losses, never here; so a model whose head is of another form is refused.
"""

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    utils,
)
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils import logging

from cosup.tokens import STARTS_FROM, encode


def load(
    role: str,
    auto: type[AutoModel] | type[AutoModelForCausalLM],
    name: str | Path,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None,
    num_layers: int | None,
    saved: Literal["whole", "in parts"] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or hub id. num_layers: keep the first layers; None: all.

    attn_implementation: "auto", for the first of `flash_attention` that there is; else as in transformers.

    saved: the folder belongs to a pair saved by cosup, whose weights are safetensors; "in parts": its weights are
    elsewhere, and the model's are to be overwritten.

    Code in a folder or repository is never run. Raises ValueError, naming the role and the folder or hub id: not
    there, of another kind, without some weights, damaged, fewer layers.
    """
    path = str(name)
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():  # no hub id
        raise ValueError(f"{role}: there is no folder {path!r}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no report of the layers and heads left out on purpose
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if num_layers is not None:
            _keep_layers(config.get_text_config(), num_layers)
        if attn_implementation == "auto":
            attn_implementation = flash_attention(auto._model_mapping.get(type(config), None), config, dtype)
        options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if saved == "in parts":
            model = auto.from_config(config, trust_remote_code=False, **options)
            if model.can_generate():
                model.generation_config = GenerationConfig.from_pretrained(name)
            return model.eval(), tokenizer
        options |= {"config": config, "use_safetensors": True if saved else None, "output_loading_info": True}
        model, report = auto.from_pretrained(name, trust_remote_code=False, **options)  # type: ignore[misc]
        missing = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if missing:  # transformers fills them at random
            raise ValueError(f"no weights there for {len(missing)} of {type(model).__name__}, {missing[0]} the first")
        return model, tokenizer
    except ImportError as error:
        raise ValueError(f"{role}: {error}") from error
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for a damaged file
        reason = _damaged(Path(path)) or error
        raise ValueError(f"{role}: wanted a model folder or hub id, got {str(name)!r}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)


def flash_attention(model: Any, config: PretrainedConfig, dtype: torch.dtype) -> str | None:
    """What "auto" chooses for a class of models: flash-attn 4, else 2, else None: as transformers chooses, mostly SDPA.

    Both are for 16-bit weights on a GPU, for models that take them by name. 2 is for compute capability 8.0 and later
    and heads up to 256 wide. 4 is for 9.0 and later (Hopper, Blackwell), for widths of a head that it has on all of
    these, and for attention without dropout: it has none, and transformers would leave it out. A config that does not
    say one width of all its heads gives None.

    Sources: flash_attn/cute/interface.py of flash-attn-4 4.0.0b30; csrc/flash_attn/flash_api.cpp of flash-attn 2.
    """
    on_gpu = dtype in (torch.float16, torch.bfloat16) and torch.cuda.is_available()
    if not on_gpu or not getattr(model, "_supports_flash_attn", False):
        return None
    generation, _ = torch.cuda.get_device_capability()
    four = generation >= 9 and utils.is_flash_attn_4_available()
    two = generation >= 8 and utils.is_flash_attn_2_available()
    if not (four or two):
        return None
    try:
        text = config.get_text_config()
        width = _head_width(text)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # not of text, or a width for each layer (Gemma 4)
        return None
    drops_out = any("att" in name and "drop" in name and rate for name, rate in vars(text).items())
    runs = {
        "flash_attention_4": four and width % 8 == 0 and width <= 128 and not drops_out,
        "flash_attention_2": two and width <= 256,
    }
    takes = getattr(model, "_compatible_flash_implementations", None)  # None: all
    return next((name for name in runs if runs[name] and (takes is None or name in takes)), None)


@torch.no_grad()
def grow_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, known: set[str]) -> None:
    """Rows for the tokens outside `known` and those past the table: a word's row, or the mean, and a little noise.

    A control token starts from the word of `tokens.STARTS_FROM`: a decoder's first layers make something of it, and the
    state there tells prompts apart at once; that of the mean row hardly does, and a shallow decoder then learns to
    retrieve far slower. The noise is seeded: a model gets the same rows wherever it is loaded. A tied head stays tied.
    """
    rows = len(_weight(model.get_input_embeddings()))
    new = sorted(id for token, id in tokenizer.get_vocab().items() if token not in known or id >= rows)
    if not new:
        return
    if new[-1] >= rows:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(new[-1] + 1, mean_resizing=False)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [_weight(table)]
    if head is not None and head.weight is not table.weight:
        weights.append(_weight(head))
    name = {id: token for token, id in tokenizer.get_vocab().items()}
    words = [[id for id in encode(tokenizer, STARTS_FROM.get(name.get(n, ""), "")) if id < rows] for n in new]
    generator = torch.Generator().manual_seed(0)
    for weight in weights:
        old = weight[:rows].float()
        noise = torch.randn(len(new), old.shape[1], generator=generator).to(old.device)
        starts = torch.stack([(old[word] if word else old).mean(dim=0) for word in words])
        weight[new] = (starts + 0.1 * old.std(dim=0) * noise).to(weight.dtype)
    bias = getattr(head, "bias", None)
    if bias is not None:
        bias[new] = bias[:rows].mean()


def final_hidden_state(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None
) -> Tensor:
    """[rows, tokens, D] of a model without a head, after its final norm.

    position_ids, of packed rows, restart at 0 in each example. They are for the decoders that `check_packing` passes,
    with no attention_mask: then transformers reads them as the bounds of attention.
    """
    # not every encoder takes use_cache; a decoder left to its default would fill a cache that nobody reads
    options: dict[str, Any] = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    if position_ids is not None:
        options["position_ids"] = position_ids
        if _runs_flash(model):  # which looks for restarts in a single row only
            (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids)
            options |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), starts)
            options |= dict.fromkeys(("max_length_q", "max_length_k"), int(longest))
    return model(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state


def hidden_width(model: PreTrainedModel) -> int:
    """The D of `final_hidden_state`. OPT may project its last state to another width than its layers have."""
    config = model.config.get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def logit_scale(model: PreTrainedModel) -> float:
    """What a causal language model multiplies its logits by, under the names that families use; 1 for most."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", None) or 1.0
    return scale / (getattr(config, "logits_scaling", None) or 1.0)


def logit_softcap(model: PreTrainedModel) -> float | None:
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


@torch.no_grad()
def check_head(gen: PreTrainedModel) -> None:
    """Refuse a model whose head is not of the form above: its loss would silently be another one. Two tokens are run.

    With eager attention in place of flash-attention; a model that is built for one attention alone is then not tried.

    Raises ValueError.
    """
    head, decoder = gen.get_output_embeddings(), gen.get_decoder()
    if head is None or decoder is gen:
        raise ValueError(f"gen: wanted a causal language model with a head, got {type(gen).__name__}")
    if _runs_flash(gen) and not gen._can_set_attn_implementation():
        return  # Falcon, GPT-J, GPT-Neo
    training = gen.training
    gen.eval()
    ids = torch.tensor([[1, 2]], device=gen.device)
    with _no_flash(gen):
        logits = logit_scale(gen) * head(final_hidden_state(decoder, ids, torch.ones_like(ids))).float()
        wanted = gen(input_ids=ids, use_cache=False).logits.float()
    softcap = logit_softcap(gen)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    gen.train(training)
    if not torch.allclose(logits, wanted, rtol=0, atol=0.02 * wanted.abs().max().item()):  # 16-bit rounding passes
        raise ValueError(f"gen: wanted logits that are a head over the final hidden state, got {type(gen).__name__}")


def check_packing(gen: PreTrainedModel) -> None:
    """Refuse a model in which an example that shares a row is not what it is alone. Two short ones are run.

    No gradient at all may go from the states of one example to the tokens of another: a masked weight is exactly 0,
    what a layer carries along is not. And states are those of the example alone, so its positions start anew: rounding
    moves a state by about the precision eps of its numbers, a wrong position by about 1 (relative L2 norm); the line is
    midway, at sqrt(eps), where float32 counts as the TF32 that it may be computed in.
    Kernels for GPUs alone (flash-attn, flex attention's backward) are not tried while the weights lie on a CPU.

    Raises ValueError.
    """
    if gen.device.type == "cpu" and (_runs_flash(gen) or gen.config._attn_implementation == "flex_attention"):
        return
    decoder = gen.get_decoder()
    wanted = f"packing: wanted a gen whose examples can share a row, got {type(gen).__name__}"
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(f"{wanted}, which takes no position_ids")
    pair = [torch.arange(1, 8, device=gen.device), torch.arange(8, 13, device=gen.device)]
    rows = torch.stack([torch.cat(pair), torch.cat(pair[::-1])])
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ((7, 5), (5, 7))])
    second = ((positions == 0).cumsum(dim=1) == 2).to(gen.device)
    embedded: list[Tensor] = []

    def leaf(module: torch.nn.Module, args: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0]

    training = gen.training
    gen.eval()
    with torch.no_grad():
        alone = [final_hidden_state(decoder, ids[None], torch.ones_like(ids[None]))[0] for ids in pair]
    hook = gen.get_input_embeddings().register_forward_hook(leaf)
    try:
        with torch.enable_grad():
            packed = final_hidden_state(decoder, rows, None, positions.to(gen.device))
    finally:
        hook.remove()
        gen.train(training)

    direction = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0)).to(packed)
    (seen,) = torch.autograd.grad((packed * direction)[second].sum(), embedded)
    if seen[~second].any():
        raise ValueError(
            f"{wanted}, where one sees the other: a layer carries a state along (state-space models, convolutions), or "
            "the model's mask does not follow position_ids"
        )
    apart = torch.stack([torch.cat(alone), torch.cat(alone[::-1])]).double()
    moved = ((packed.detach().double() - apart).norm(dim=-1) / apart.norm(dim=-1)).max().item()
    autocast = torch.is_autocast_enabled(gen.device.type)
    dtype = torch.get_autocast_dtype(gen.device.type) if autocast else packed.dtype
    if not moved <= max(torch.finfo(dtype).eps, 2**-10) ** 0.5:
        raise ValueError(f"{wanted}, where states there differ by {moved:.0%} from those of the example alone")


def _runs_flash(model: PreTrainedModel) -> bool:
    return "flash" in str(getattr(model.config, "_attn_implementation", ""))


@contextmanager
def _no_flash(model: PreTrainedModel) -> Iterator[None]:
    """Eager attention in place of flash-attention, which is for 16 bits on a GPU: one just loaded lies on a CPU."""
    configs = [m.config for m in model.modules() if isinstance(m, PreTrainedModel) and _runs_flash(m)]
    chosen = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, name in zip(configs, chosen, strict=True):
            config._attn_implementation = name


def _head_width(config: Any) -> int:
    """Of the widest of queries, keys and values. Those of multi-head latent attention are wider than head_dim."""
    widths = [getattr(config, name, None) or 0 for name in ("head_dim", "qk_head_dim", "v_head_dim")]
    return max(widths) or config.hidden_size // config.num_attention_heads


def _keep_layers(config: Any, num_layers: int) -> None:
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise ValueError(f"num_layers: wanted 1 to {config.num_hidden_layers}, got {num_layers}")
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    config.num_hidden_layers = num_layers


def _damaged(folder: Path) -> str | None:
    """The first damaged file and the reason; transformers does not always name it."""
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        try:
            if path.suffix == ".json":
                found = json.loads(path.read_text(encoding="utf-8"))
                if not isinstance(found, dict):
                    return f"{path}: wanted a JSON object, got {type(found).__name__}"
            else:
                with safe_open(path, framework="pt"):
                    pass
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            return f"{path}: {error}"
    return None


def _weight(module: Any) -> Tensor:
    return module.weight
