"""Gen and Ctx as one model: where the query and the passage vector are read.

    hidden   = Gen's decoder after its final norm        [B, T, D]   (logits are never computed here)
    query    = hidden at each retrieval token            [Q, D]
    passages = project(pool(Ctx's last hidden state))    [P, D]      not normalised

B rows of T tokens, Q retrieval tokens, P candidate passages of L tokens, D the width of Gen's head. The projection is
there only where Ctx is of another width.

Source: Semiparametric Token-Sequence Co-Supervision, arXiv 2403.09024.
"""

import hashlib
import json
import math
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import huggingface_hub
import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from cosup import cards, files, shards
from cosup.data.collate import GenCtxCollator
from cosup.data.schema import Passage
from cosup.generate import RetrievalGeneration
from cosup.pretrained import (
    check_head,
    check_packing,
    final_hidden_state,
    grow_vocabulary,
    hidden_width,
    load,
    logit_scale,
    logit_softcap,
)
from cosup.tokens import add_control_tokens, control_ids, passage_ids

Pooling = Literal["mean", "last", "token"]
Mode = Literal["joint", "ntp", "nsp"]

FORMAT_VERSION = 1
_CONFIG, _EXTRA = "cosup_config.json", "cosup.safetensors"
SHARDS = "pytorch_model_fsdp_0"  # weights in the form of torch.distributed.checkpoint, as accelerate names them


@dataclass
class GenCtxConfig:
    """What decides the meaning of a Gen/Ctx pair, kept with its weights.

    Args:
        pooling: a passage is the mean of its real tokens, its last real token, or an appended [Emb] ("token").
        shared_weights: Ctx is Gen's own decoder.
        normalize: queries and passages are compared by cosine.
        temperature: divides the similarities.
        learn_temperature: its logarithm is trained.
        passage_in_ntp: passage tokens are targets of next-token prediction too.
        nsp_weight: weight of the next-sequence loss.
        mode: the loss is L_NTP + nsp_weight * L_NSP ("joint"), or one of the two alone.
        unique_passages: a passage that comes twice in a batch is one candidate, never its own negative.
        max_length: most tokens of a Gen row.
        max_passage_length: most tokens of a passage.
    """

    pooling: Pooling = "mean"
    shared_weights: bool = False
    normalize: bool = True
    temperature: float = 0.05
    learn_temperature: bool = False
    passage_in_ntp: bool = False
    nsp_weight: float = 1.0
    mode: Mode = "joint"
    unique_passages: bool = True
    max_length: int = 512
    max_passage_length: int = 128

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if get_origin(kind) is Literal:
                if value not in get_args(kind):
                    raise ValueError(f"{name}: wanted one of {', '.join(get_args(kind))}, got {value!r}")
            elif type(value) is not kind and not (kind is float and type(value) is int):
                raise ValueError(f"{name}: wanted {kind.__name__}, got {value!r}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature: wanted a positive number, got {self.temperature}")
        if not (self.nsp_weight >= 0 and math.isfinite(self.nsp_weight)):
            raise ValueError(f"nsp_weight: wanted a number of at least 0, got {self.nsp_weight}")
        for name in ("max_length", "max_passage_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: wanted at least 1, got {getattr(self, name)}")

    @classmethod
    def paper(cls) -> "GenCtxConfig":
        """The choices of the paper's release."""
        return cls(
            pooling="last",
            normalize=False,
            temperature=1.0,
            passage_in_ntp=True,
            nsp_weight=0.01,
            unique_passages=False,
            max_length=1024,
            max_passage_length=1024,
        )

    @classmethod
    def of_saved(cls, folder: str | Path) -> "GenCtxConfig | None":
        """The config of a folder that `GenCtxModel.save_pretrained` wrote; None where it is not one.

        Raises ValueError, naming the file, for a config of another format or with what is none of its values.
        """
        return files.read(folder, _CONFIG, cls._read)

    @classmethod
    def _read(cls, place: Path) -> "GenCtxConfig | None":
        path = place / _CONFIG
        if not path.is_file():
            return None
        with files.readable(path):
            choices = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(choices, dict):
                raise ValueError(f"wanted a JSON object, got {type(choices).__name__}")
            version = choices.pop("format_version", None)
            if version != FORMAT_VERSION:
                raise ValueError(f"{path}: wanted format_version {FORMAT_VERSION}, got {version!r}")
            unknown = set(choices) - {field.name for field in fields(cls)}
            if unknown:
                raise ValueError(f"{path}: wanted the fields of GenCtxConfig, got {sorted(unknown)}")
            return cls(**choices)


class GenCtxOutput(NamedTuple):
    hidden: Tensor  # [B, T, D]
    query: Tensor  # [Q, D]
    passages: Tensor  # [P, D]


class GenCtxModel(nn.Module, RetrievalGeneration):
    """A causal language model and the encoder of its passages. Usually made by `from_pretrained`.

    Args:
        gen: any causal language model of transformers whose logits are a linear head over its final hidden state,
            scaled and soft-capped at most.
        ctx: a decoder or an encoder without a head; None with shared_weights.
        gen_tokenizer, ctx_tokenizer: theirs; the second None with shared_weights. Control tokens are added to both,
            and rows for them to the embeddings.
        config: defaults to GenCtxConfig().

    Raises ValueError for a gen with another kind of head, an encoder-decoder, and a ctx given or lacking against
    shared_weights.
    """

    def __init__(
        self,
        gen: PreTrainedModel,
        ctx: PreTrainedModel | None,
        gen_tokenizer: PreTrainedTokenizerBase,
        ctx_tokenizer: PreTrainedTokenizerBase | None,
        config: GenCtxConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config = config or GenCtxConfig()
        if (ctx is None) != config.shared_weights or (ctx_tokenizer is None) != config.shared_weights:
            wanted = "no ctx and no ctx_tokenizer" if config.shared_weights else "a ctx and a ctx_tokenizer"
            raise ValueError(f"ctx: wanted {wanted} with shared_weights={config.shared_weights}, got the contrary")
        if ctx is not None and ctx.config.is_encoder_decoder:
            raise ValueError(f"ctx: wanted a decoder or an encoder, got the encoder-decoder {type(ctx).__name__}")

        check_head(gen)
        self.gen_tokenizer = gen_tokenizer
        self.ctx_tokenizer = gen_tokenizer if ctx_tokenizer is None else ctx_tokenizer
        known = [set(tokenizer.get_vocab()) for tokenizer in (self.gen_tokenizer, self.ctx_tokenizer)]
        add_control_tokens(self.gen_tokenizer)
        add_control_tokens(self.ctx_tokenizer)
        grow_vocabulary(gen, self.gen_tokenizer, known[0])
        if ctx is not None:
            grow_vocabulary(ctx, self.ctx_tokenizer, known[1])
            if hasattr(ctx, "pooler"):
                setattr(ctx, "pooler", None)  # noqa: B010  # a head of some encoders, not read here
        self.gen = gen
        self.ctx = gen.get_decoder() if ctx is None else ctx

        # for its card: the hub ids it was made of, and what the trainer logged last
        self.base_models = list(dict.fromkeys(_hub_ids(gen) if ctx is None else [*_hub_ids(gen), *_hub_ids(ctx)]))
        self.training_figures: dict[str, float] = {}

        # for FSDP: the layers that gather their weights each for itself
        layers = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(layers & {*(gen._no_split_modules or ()), *(self.ctx._no_split_modules or ())})

        width, ctx_width = self.lm_head[0].shape[1], hidden_width(self.ctx)
        self.projection: nn.Linear | None = None
        if ctx_width != width:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                self.projection = nn.Linear(ctx_width, width, bias=False).to(gen.device, gen.dtype)
        self.log_temperature: nn.Parameter | None = None
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor([math.log(config.temperature)], device=gen.device))
        self.train(gen.training)

    @classmethod
    def from_pretrained(
        cls,
        gen: str | Path,
        ctx: str | Path | None = None,
        *,
        config: GenCtxConfig | None = None,
        dtype: torch.dtype = torch.float32,
        attn_implementation: str | None = "auto",
        num_layers: int | None = None,
    ) -> "GenCtxModel":
        """A folder that `save_pretrained` wrote, or a new pair of any two hub ids or model folders.

        A saved pair is also a checkpoint of CoSupTrainer, weights in one piece or, of FSDP2, in parts.

        Args:
            gen: hub id or folder, or a saved pair.
            ctx: None for the same as gen.
            config: of a saved folder it overrides what was saved, but for shared_weights. A learned temperature stays
                where config's is that of the saved config.
            dtype: of the weights; float32 to train (mixed precision is the trainer's).
            attn_implementation: "auto" for flash-attn, where the weights are 16-bit and the machine has a GPU, the
                newest that runs there, else transformers' own choice (None); or a name, as in transformers. flash-attn
                does not run on a CPU: for a 16-bit pair that is to stay there beside a GPU give None or "sdpa".
            num_layers: keep the first layers of both.

        Raises ValueError, naming the argument and the folder or hub id, where one cannot be loaded.
        """
        return files.read(
            gen, _CONFIG, lambda place: cls._read(gen, place, ctx, config, dtype, attn_implementation, num_layers)
        )

    @classmethod
    def _read(
        cls,
        gen: str | Path,
        place: Path,
        ctx: str | Path | None,
        config: GenCtxConfig | None,
        dtype: torch.dtype,
        attn_implementation: str | None,
        num_layers: int | None,
    ) -> "GenCtxModel":
        """place: the folder to read the saved pair `gen` from."""
        root, kept = Path(gen), GenCtxConfig._read(place)
        inside = [path.parent.name for path in root.glob(f"checkpoint-*/{_CONFIG}")]
        if inside and kept is None and not (root / "config.json").is_file():
            raise ValueError(f"gen: wanted a saved pair, got the folder {str(gen)!r} of {', '.join(sorted(inside))}")
        config = config or kept or GenCtxConfig()
        if kept is not None:
            if ctx is not None:
                raise ValueError(f"ctx: wanted none beside the saved pair {str(gen)!r}, got {str(ctx)!r}")
            if config.shared_weights != kept.shared_weights:
                raise ValueError(f"config: wanted shared_weights={kept.shared_weights} as in {gen}, got the contrary")
            gen, ctx = place / "gen", place / "ctx"
        elif config.shared_weights and ctx is not None:
            raise ValueError(f"ctx: wanted none with shared_weights, got {str(ctx)!r}")
        ctx = None if config.shared_weights else ctx or gen

        in_parts = kept is not None and (place / SHARDS).is_dir()
        options: dict[str, Any] = {"dtype": dtype, "num_layers": num_layers, "attn_implementation": attn_implementation}
        options["saved"] = None if kept is None else "in parts" if in_parts else "whole"
        gen_model, gen_tokenizer = load("gen", AutoModelForCausalLM, gen, **options)
        ctx_model, ctx_tokenizer = (None, None) if ctx is None else load("ctx", AutoModel, ctx, **options)
        model = cls(gen_model, ctx_model, gen_tokenizer, ctx_tokenizer, config)
        if in_parts:
            model.load_shards(place)
        elif kept is not None:
            model._read_extra(place / _EXTRA)
        if kept is not None:
            if model.log_temperature is not None and config.temperature != kept.temperature:
                model.log_temperature.data.fill_(math.log(config.temperature))
            model.base_models, model.training_figures = cards.read(place)
        return model

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write gen/ and ctx/ (each a model folder of transformers with its tokenizer), the rest and the config.

        An existing pair is replaced atomically: if saving fails or is killed, the old pair is intact. README.md is the
        pair's card; a card written by the user is kept, and so are all files but those of models and tokenizers.

        Args:
            folder: made where it is not there.
            state_dict: the weights to write, where the model itself holds shards of them; {}: all but weights.

        Raises OSError, naming the folder, if it cannot be written.
        """
        weights = self.state_dict() if state_dict is None else state_dict
        with files.updated(folder, obsolete=_model_files, keeps=cards.is_of_user) as part:
            self.gen.save_pretrained(part / "gen", state_dict=_below("gen.", weights))
            self.gen_tokenizer.save_pretrained(part / "gen")
            if not self.config.shared_weights:
                self.ctx.save_pretrained(part / "ctx", state_dict=_below("ctx.", weights))
                self.ctx_tokenizer.save_pretrained(part / "ctx")
            if extra := self._extra(weights):
                save_file({name: tensor.detach().contiguous() for name, tensor in extra.items()}, part / _EXTRA)
            cards.write(part, *self._card())
            choices = {"format_version": FORMAT_VERSION, **asdict(self.config)}
            (part / _CONFIG).write_text(json.dumps(choices, indent=2) + "\n", encoding="utf-8")

    def load_shards(self, folder: str | Path) -> None:
        """Read the weights of a checkpoint in parts, whichever number of processes wrote it.

        Each process reads what it holds: all, or its shards. Raises ValueError, naming the folder, for weights that are
        not there, of other shapes or damaged.
        """
        state, parts = get_model_state_dict(self), files.content(Path(folder)) / SHARDS
        there = shards.names(parts)
        missing = [name for name in state if f"model.{name}" not in there]
        if set(missing) - {"log_temperature"}:  # that may be trained from now on
            raise ValueError(f"folder: wanted {missing[0]} in {folder}, got none")
        state = {name: tensor for name, tensor in state.items() if name not in missing}
        shards.load({"model": state}, parts, no_dist=True)
        set_model_state_dict(self, state, options=StateDictOptions(strict=False))

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **upload: Any
    ) -> Any:
        """Save the pair, card included, to a temporary folder and upload it; what `upload_folder` says of the commit.

        The repository is made if there is none. private, token: as in huggingface_hub's `create_repo`. upload: other
        arguments of its `upload_folder` (commit_message, revision, create_pr, ...; ignore_patterns="README.md" leaves
        a card that was edited on the hub as it is).

        Raises ValueError for a repo_id that is none, and what huggingface_hub raises.
        """
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise ValueError(f"repo_id: wanted the owner/name of a repository, got {repo_id!r}: {error}") from error
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            made = huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            return huggingface_hub.upload_folder(repo_id=made.repo_id, folder_path=folder, token=token, **upload)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        query_index: Tensor,
        passage_input_ids: Tensor,
        passage_attention_mask: Tensor,
        position_ids: Tensor | None = None,
    ) -> GenCtxOutput:
        """Hidden states, queries and passage vectors of a batch of `GenCtxCollator`; what the losses need.

        Args:
            input_ids, attention_mask: [B, T] int64, padded at the right.
            query_index: [Q] int64, flat index b * T + t of each retrieval token. Q may be 0, and so may P.
            passage_input_ids, passage_attention_mask: [P, L] int64.
            position_ids: [B, T] int64, of packed rows: they restart at 0 where an example begins, and none sees
                another.

        Raises ValueError for other shapes.
        """
        _check_rows("input_ids", input_ids, attention_mask)
        if query_index.ndim != 1:
            raise ValueError(f"query_index: wanted [Q], got {list(query_index.shape)}")
        if position_ids is not None and position_ids.shape != input_ids.shape:
            raise ValueError(f"position_ids: wanted {list(input_ids.shape)}, got {list(position_ids.shape)}")
        bounds = attention_mask if position_ids is None else None  # what fills up a packed row is an example of its own
        hidden = final_hidden_state(self.gen.get_decoder(), input_ids, bounds, position_ids)
        query = hidden.flatten(0, 1)[query_index]
        return GenCtxOutput(hidden, query, self.embed_passages(passage_input_ids, passage_attention_mask))

    def embed_passages(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Passage vectors [P, D], pooled and projected, not normalised. input_ids, attention_mask: [P, L] int64.

        A passage has the same vector, up to rounding, in any batch and however it is padded. Rows must end in [Emb]
        where the pooling is "token", as those of `passage_batch` do.
        """
        _check_rows("input_ids", input_ids, attention_mask)
        if not len(input_ids):
            weight = self.lm_head[0]
            return weight.new_zeros(0, weight.shape[1])
        # real tokens first: positions count from the first real token, on whichever side the padding was
        order = attention_mask.sort(dim=1, descending=True, stable=True).indices
        input_ids, attention_mask = input_ids.gather(1, order), attention_mask.gather(1, order)
        hidden_PLD = final_hidden_state(self.ctx, input_ids, attention_mask)
        count_P1 = attention_mask.sum(dim=1, keepdim=True)
        if self.config.pooling == "mean":
            real_PLD = hidden_PLD.masked_fill(attention_mask[..., None] == 0, 0)
            sum_PD = real_PLD.sum(dim=1, dtype=torch.promote_types(real_PLD.dtype, torch.float32))
            pooled = (sum_PD / count_P1).to(hidden_PLD.dtype)
        else:
            last_P11 = (count_P1 - 1).clamp(min=0)[..., None]
            pooled = hidden_PLD.take_along_dim(last_P11, dim=1).squeeze(1)
        return pooled if self.projection is None else self.projection(pooled)

    def collator(self, passages: Mapping[str, Passage], *, packing: bool = False) -> GenCtxCollator:
        """The collator of this model's batches, as its config says. packing: instances share rows.

        Raises ValueError for packing where Gen's examples cannot share a row; it is tried out.
        """
        if packing:
            check_packing(self.gen)
        return GenCtxCollator(
            self.gen_tokenizer,
            self.ctx_tokenizer,
            passages,
            max_length=self.config.max_length,
            max_passage_length=self.config.max_passage_length,
            passage_in_ntp=self.config.passage_in_ntp,
            append_embed_token=self.config.pooling == "token",
            unique_passages=self.config.unique_passages,
            packing=packing,
        )

    def passage_batch(self, passages: Sequence[Passage]) -> dict[str, Tensor]:
        """The arguments of `embed_passages` for these passages, on the model's device."""
        if not passages:
            raise ValueError("passages: wanted at least one, got none")
        rows = [
            passage_ids(
                self.ctx_tokenizer,
                passage.title,
                passage.text,
                self.config.max_passage_length,
                append_embed_token=self.config.pooling == "token",
            )
            for passage in passages
        ]
        pad = control_ids(self.ctx_tokenizer).pad
        input_ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
        length_P = torch.tensor([len(row) for row in rows])
        attention_mask = (torch.arange(input_ids.shape[1]) < length_P[:, None]).long()
        return {"input_ids": input_ids.to(self.device), "attention_mask": attention_mask.to(self.device)}

    @property
    def device(self) -> torch.device:
        return self.gen.device

    @property
    def lm_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight [V, D] and bias [V] or None of Gen's head."""
        head = self.gen.get_output_embeddings()
        return head.weight, getattr(head, "bias", None)

    @property
    def logit_scale(self) -> float:
        """What Gen multiplies its logits by."""
        return logit_scale(self.gen)

    @property
    def logit_softcap(self) -> float | None:
        """The c of c * tanh(logit / c), where Gen caps its logits (after the scale)."""
        return logit_softcap(self.gen)

    @property
    def temperature(self) -> float | Tensor:
        return self.config.temperature if self.log_temperature is None else self.log_temperature.exp()

    def fingerprint(self) -> str:
        """sha256 (hex) of the weights and the choices that decide `embed_passages` and how vectors are compared."""
        choices = [self.config.pooling, self.config.normalize, self.config.max_passage_length]
        digest = hashlib.sha256(json.dumps(choices).encode())
        tensors = dict(self.ctx.state_dict())
        if self.projection is not None:
            tensors["projection"] = self.projection.weight
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Called by the trainer for `activation_checkpointing`; its options go to both models."""
        for part in (self.gen,) if self.config.shared_weights else (self.gen, self.ctx):
            # the older name in transformers before 5.23
            enable = getattr(part, "activation_checkpointing_enable", part.gradient_checkpointing_enable)
            enable(**options)

    gradient_checkpointing_enable = activation_checkpointing_enable

    def _card(self) -> tuple[dict[str, Any], str]:
        halves = {"Gen": self.gen} if self.config.shared_weights else {"Gen": self.gen, "Ctx": self.ctx}
        parts = {name: (type(half).__name__, half.num_parameters()) for name, half in halves.items()}
        return cards.of_pair(parts, asdict(self.config), self.base_models, self.training_figures)

    def _extra(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those of the weights that neither gen nor ctx holds."""
        names = {"projection": "projection.weight", "log_temperature": "log_temperature"}
        return {short: weights[name] for short, name in names.items() if name in weights}

    def _read_extra(self, path: Path) -> None:
        with files.readable(path):
            extra = load_file(path) if path.is_file() else {}
            for name, tensor in self._extra(self.state_dict()).items():
                got = extra.get(name)
                if got is not None and (got.shape != tensor.shape or not got.is_floating_point()):
                    wanted = f"floating-point numbers {list(tensor.shape)}"
                    raise ValueError(f"{name}: wanted {wanted}, got {got.dtype} {list(got.shape)}")
                if got is not None:
                    tensor.copy_(got)
                elif name == "projection":
                    raise ValueError("wanted a projection, got none")


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _model_files(folder: Path) -> Iterable[Path]:
    """Files that transformers writes for models and tokenizers; a save removes those that it does not write anew."""
    kinds = ["*.safetensors*", "*config.json", "tokenizer*.json", "*_tokens*.json", "vocab.*", "merges.txt", "*.model"]
    kinds += ["chat_template.*", "additional_chat_templates/*"]
    patterns = [f"{half}/{kind}" for half in ("gen", "ctx") for kind in kinds]
    patterns += [_EXTRA, f"{SHARDS}/*", f"{SHARDS}/.metadata"]
    return (path for pattern in patterns for path in folder.glob(pattern))


def _hub_ids(half: PreTrainedModel) -> list[str]:
    """The hub id that a model was loaded by, if it was."""
    name = half.name_or_path or ""
    return [name] if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not Path(name).is_dir() else []


def _check_rows(name: str, input_ids: Tensor, attention_mask: Tensor) -> None:
    if input_ids.ndim != 2 or attention_mask.shape != input_ids.shape:
        got = f"{list(input_ids.shape)} and {list(attention_mask.shape)}"
        raise ValueError(f"{name}: wanted [rows, tokens] and an attention_mask of that shape, got {got}")
