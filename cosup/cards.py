"""The card of a pair or of a data set: README.md, facts in YAML before Markdown, as the Hugging Face hub shows it.

    ---
    library_name: cosup          facts
    ---
    <!-- ... -->                 MARKER: without this line the card is its user's, and is never written over
    # A Gen/Ctx pair             Markdown

What is not known is not in a card.
"""

import importlib.metadata
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cosup import files

CARD = "README.md"
MARKER = "<!-- Written by cosup at every save. Delete this line and the card is yours: it is never written over. -->"

PAIR = """\
# A Gen/Ctx pair

Two language models to be used together, saved by cosup {version}, after
[Semiparametric Token-Sequence Co-Supervision](https://arxiv.org/abs/2403.09024). Gen writes; at its retrieval token its
state is the query for a passage. {ctx_sentence}

{parts}

## Load

```python
from cosup import GenCtxModel, SequenceIndex
from cosup.data import read_passages

model = GenCtxModel.from_pretrained("path/to/this/folder").eval()
index = SequenceIndex.from_model(model, read_passages("passages.jsonl").values())
(answer,) = model.generate(["A question?"], index)
print(answer.render())
```

From the hub, `huggingface_hub.snapshot_download("owner/name")` gives the folder.

## Config

{config}
"""

TRAINING = """
## Training

What `CoSupTrainer` logged last, in nats where it is a loss:

{training}
"""


def of_pair(
    parts: Mapping[str, tuple[str, int]],
    config: Mapping[str, Any],
    base_models: Sequence[str],
    training: Mapping[str, float],
) -> tuple[dict[str, Any], str]:
    """Facts and Markdown of a pair's card. parts: architecture and number of parameters of each half, by its name."""
    facts: dict[str, Any] = {"library_name": "cosup", "pipeline_tag": "text-generation"}
    facts["tags"] = ["cosup", "retrieval-augmented-generation", "sentence-similarity"]
    if base_models:
        facts["base_model"] = list(base_models)
    if training:
        facts["training"] = dict(training)
    body = PAIR.format(
        version=importlib.metadata.version("cosup"),
        ctx_sentence="Ctx embeds the passages." if "Ctx" in parts else "Its own decoder embeds the passages too.",
        parts=table(("part", "architecture", "parameters"), ((n, k, f"{count:,}") for n, (k, count) in parts.items())),
        config=table(("field", "value"), ((f"`{name}`", f"`{value}`") for name, value in config.items())),
    )
    if training:
        rows = ((f"`{name}`", f"{n:,}" if isinstance(n, int) else f"{n:.4g}") for name, n in training.items())
        body += TRAINING.format(training=table(("figure", "value"), rows))
    return facts, body


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; a bar in a cell stays a bar."""
    lines: list[Sequence[object]] = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def write(folder: str | Path, facts: Mapping[str, Any], body: str) -> None:
    """Write the card of a folder, unless its user wrote one."""
    path = Path(folder) / CARD
    if not is_of_user(path):
        front = yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)
        files.write_text(path, f"---\n{front}---\n\n{MARKER}\n\n{body}")


def is_of_user(path: Path) -> bool:
    """Whether this is a card without MARKER, written by a user."""
    return path.name == CARD and path.exists() and MARKER not in path.read_text(encoding="utf-8", errors="replace")


def read(folder: str | Path) -> tuple[list[str], dict[str, float]]:
    """The base models and the training figures of a pair's card; none where there is no card or they are not in it."""
    path = Path(folder) / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        facts = yaml.safe_load(front[1]) if front else None
    except (yaml.YAMLError, ValueError, AttributeError, RecursionError):  # a user's slip in a user's card
        facts = None
    facts = facts if isinstance(facts, dict) else {}
    bases, training = facts.get("base_model"), facts.get("training")
    bases = [bases] if isinstance(bases, str) else bases
    figures = training if isinstance(training, dict) else {}
    return (
        [name for name in bases if isinstance(name, str)] if isinstance(bases, list) else [],
        {k: v for k, v in figures.items() if isinstance(v, float) or (isinstance(v, int) and abs(v) < 2**63)},
    )
