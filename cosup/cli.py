"""The command: demo, data, train, index, generate, eval, bench, plan, doctor. Each is a few calls of the library."""

from __future__ import annotations

import json
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.text import Text

console = Console()
app = typer.Typer(
    name="cosup",
    help="Train two language models together by next-token and next-sequence prediction; generate with retrieval.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
data = typer.Typer(
    help="Fetch and build public data and weights, each by name, version and sha256.", no_args_is_help=True
)
app.add_typer(data, name="data")
bench = typer.Typer(
    help="Measure the losses against their peers on this machine: tables, JSON, pictures; without a command everything."
)
app.add_typer(bench, name="bench")

Model = Annotated[str, typer.Argument(help="Folder that training wrote, or any saved Gen/Ctx pair.")]
PassagesFile = Annotated[Path, typer.Argument(help="JSONL of passages.", exists=True, dir_okay=False)]
UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="Of the matrix products; auto: bfloat16 where fast.")
]
BatchSize = Annotated[int, typer.Option(help="Passages embedded at once.", min=1)]
IndexPlace = Annotated[
    str,
    typer.Argument(
        help="Folder of the index; or URI/COLLECTION of one in Milvus: http://host:19530/passages, corpus.db/passages "
        "(a local file). The token of a server that asks for one is read from the environment variable MILVUS_TOKEN."
    ),
]


def main() -> None:
    """Entry point: what the user can mend is told in one line, without a traceback."""
    try:
        app()
    except Exception as error:
        network = type(error).__module__.partition(".")[0] in ("httpx", "httpx2")  # huggingface_hub's, without one
        if not network and not isinstance(error, ValueError | IndexError | OSError | RuntimeError | ImportError):
            raise
        Console(stderr=True).print(Text("error: ", "bold red"), Text(str(error)), sep="", soft_wrap=True)
        sys.exit(1)


@app.callback()
def quiet() -> None:
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading and writing weights; training keeps its own


@app.command()
def doctor(
    json_object: Annotated[
        bool, typer.Option("--json", help='One JSON object: {"GPU": {"state": "...", "advice": "..."}, ...}.')
    ] = False,
) -> None:
    """Say which kernels are active, versions, GPU, and what to do about what is missing."""
    from cosup.doctor import as_json, show

    if json_object:
        print(as_json())
    else:
        show()


@app.command()
def plan(
    n: Annotated[int, typer.Argument(help="Rows, or queries.", min=1)],
    d: Annotated[int, typer.Argument(help="Features.", min=1)],
    m: Annotated[int, typer.Argument(help="Classes, or candidates.", min=1)],
    loss: Annotated[Literal["linear_cross_entropy", "info_nce"], typer.Option()] = "linear_cross_entropy",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"], typer.Option(help="Of both operands.")
    ] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda or cpu; it need not be there.")] = "cuda",
    free: Annotated[str | None, typer.Option(help="Its free memory: 79GiB, 512MiB; default: it is asked.")] = None,
    workspace: Annotated[str | None, typer.Option(help="The budget; default: a share of --free.")] = None,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Of info_nce: both directions.")] = False,
    reduction: Annotated[Literal["mean", "sum", "none"], typer.Option()] = "mean",
    frozen: Annotated[Literal["input", "weight"] | None, typer.Option(help="Asks no gradient.")] = None,
    json_object: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say how a loss would run: strategy, tiles, workspace, bytes moved, launches, predicted time."""
    from cosup.predict import plan_for, show

    found = plan_for(
        n, d, m, loss=loss, dtype=getattr(torch, dtype), device=device, free_bytes=_size("--free", free),
        workspace_bytes=_size("--workspace", workspace), symmetric=symmetric, reduction=reduction, frozen=frozen,
    )  # fmt: skip
    if json_object:
        print(json.dumps(found._asdict(), indent=2))
    else:
        show(found)


@data.command("wiki")
def data_wiki(
    out: Annotated[Path | None, typer.Option(help="Folder; default: in the cache.")] = None,
    seed: Annotated[int, typer.Option(help="Of the split into training and test.")] = 0,
) -> None:
    """10,033 encyclopedia leads as passages; instances to train on, and three held-out sets (CC BY-SA 4.0)."""
    from cosup.data import wiki

    for name, path in wiki.build(out, seed=seed)._asdict().items():
        console.print(f"{name:14} {path}", highlight=False, markup=False, soft_wrap=True)


@data.command("smollm2")
def data_smollm2(out: Annotated[Path | None, typer.Option(help="Folder; default: in the cache.")] = None) -> None:
    """SmolLM2-135M-Instruct (Apache-2.0) as a model folder of transformers."""
    from cosup.data import smollm2

    console.print(str(smollm2.build(out)), highlight=False, markup=False, soft_wrap=True)


@bench.callback(invoke_without_command=True)
def bench_everything(
    context: typer.Context,
    full: Annotated[bool, typer.Option("--full", help="Of everything: the published shapes, not quick ones.")] = False,
    out: Annotated[Path, typer.Option(help="Of everything: folder of report.md.")] = Path("cosup-bench"),
) -> None:
    if context.invoked_subcommand is not None:
        if full:
            raise ValueError(f"--full: wanted without a command, got {context.invoked_subcommand}")
        return
    from cosup.bench import suite

    if not suite.run(out, full=full):
        raise typer.Exit(1)


SUBJECTS = {
    "linear_cross_entropy": "Against every peer that is installed, and the bare matrix products",
    "info_nce": "Against every peer that is installed, and the bare matrix products",
    "ranks": "info_nce over processes of a CPU, against its cost model",
    "patched-model": "A step of a whole model, patched and not",
    "large-pool": "info_nce with candidates that fill a CPU's memory",
    "gpu": "Everything that a few minutes of a GPU must find out, in one file that can be resumed",
}


def _bench_subject(context: typer.Context) -> None:
    if import_module(f"cosup.bench.{str(context.info_name).replace('-', '_')}").run(context.args) is False:
        raise typer.Exit(1)


for _name, _meaning in SUBJECTS.items():
    _help = f"{_meaning}; --help lists the options."
    bench.command(_name, help=_help, context_settings=ANY_OPTION, add_help_option=False)(_bench_subject)


@bench.command("hidden-states")
def bench_hidden_states(
    model: Annotated[str, typer.Argument(help="Folder or hub id of a causal language model.")],
    text: Annotated[Path, typer.Argument(help="A text in UTF-8.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    tokens: Annotated[int, typer.Option(help="Tokens of the text to take, at most.", min=1)] = 8192,
) -> None:
    """Write operands for linear_cross_entropy --hidden-states: a model's states on a text, its head, the targets."""
    from cosup.bench import hidden_states
    from cosup.files import readable

    with readable(text):
        read = text.read_text(encoding="utf-8")
    count = hidden_states.write(model, read, out, tokens=tokens)
    console.print(f"{count:,} tokens in {out}", highlight=False, markup=False, soft_wrap=True)


@bench.command("pools")
def bench_pools(
    out: Annotated[Path, typer.Option(help="Folder of pools.json.")] = Path("pools"),
    queries: Annotated[int, typer.Option(help="Queries seen in each training.", min=1)] = 8192,
    dtype: Dtype = "auto",
) -> None:
    """Train Gen and Ctx with 64, 512 and 4,096 candidates a query: large batches, a queue, extra passages."""
    from cosup.pools import run

    run(out, queries=queries, dtype=dtype)


@app.command(
    context_settings=ANY_OPTION,
    epilog="Everything else is a field of CoSupConfig, which has all of transformers' TrainingArguments: "
    "--gen, --ctx, --instances, --passages, --eval_instances, --num_layers, --pooling, --temperature, --nsp_weight, "
    "--mode, --preset paper, --learning_rate, --max_steps, --per_device_train_batch_size, --bf16, --save_steps, ...",
)
def train(
    context: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML of the same names.", exists=True, dir_okay=False)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --output_dir's last checkpoint, if any.")
    ] = False,
    fields: Annotated[bool, typer.Option("--fields", help="List CoSupConfig's own fields and what they mean.")] = False,
) -> None:
    """Train Gen and Ctx: cosup train --gen DIR --instances train.jsonl --passages passages.jsonl --output_dir OUT."""
    from cosup.train import CoSupConfig, CoSupTrainer, last_checkpoint

    if fields:
        for name, meaning in CoSupConfig.own_fields().items():
            console.print(Text(f"--{name:22} {meaning}"))
        return
    arguments = CoSupConfig.parse(context.args, yaml_file=config)
    if not resume and any(Path(str(arguments.output_dir)).glob("checkpoint-*")):
        raise ValueError(f"output_dir: {arguments.output_dir} holds checkpoints; add --resume or choose another folder")
    trainer = CoSupTrainer.from_config(arguments)
    trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir) if resume else None)
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    trainer.save_model()
    if arguments.should_save:
        console.print(f"saved {arguments.output_dir}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def index(
    model: Model,
    passages: PassagesFile,
    out: IndexPlace,
    factory: Annotated[str, typer.Option(help="Flat, or a FAISS factory string; of an index in a folder.")] = "Flat",
    batch_size: BatchSize = 64,
) -> None:
    """Embed every passage with Ctx and save a searchable index."""
    from cosup.data import read_passages
    from cosup.index import SequenceIndex
    from cosup.model import GenCtxModel

    milvus = _milvus(out)
    if milvus and factory != "Flat":
        raise ValueError(f"--factory: wanted an index in a folder, got {out}")
    corpus, loaded = read_passages(passages).values(), _eval(GenCtxModel, model)
    if milvus:
        built = milvus[0].from_model(loaded, corpus, batch_size=batch_size, **milvus[1])
    else:
        built = SequenceIndex.from_model(loaded, corpus, factory=factory, batch_size=batch_size)
        built.save(out)
    console.print(f"{len(built):,} passages in {out}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def generate(
    model: Model,
    index: IndexPlace,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Questions; none: one a line from standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens that Gen chooses, a question.", min=1)] = 128,
    max_retrievals: Annotated[int, typer.Option(help="Passages fetched, a question.", min=0)] = 4,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    temperature: Annotated[float, typer.Option(help="Of the draws.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest tokens of this share.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Answer: Gen writes, stops at its retrieval token, takes in the best passage, and goes on."""
    from cosup.index import SequenceIndex
    from cosup.model import GenCtxModel

    milvus = _milvus(index)
    loaded = _eval(GenCtxModel, model)
    if milvus:
        passages = milvus[0].connect(**milvus[1], fingerprint=loaded.fingerprint())
    else:
        passages = SequenceIndex.load(index, fingerprint=loaded.fingerprint())
    questions = prompts or [line.strip() for line in sys.stdin if line.strip()]
    answers = loaded.generate(
        questions, passages, max_new_tokens=max_new_tokens, max_retrievals=max_retrievals, do_sample=sample,
        temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    for question, answer in zip(questions, answers, strict=True):
        fetched = [
            {"id": p.passage.id, "title": p.passage.title, "score": p.score, "char": p.char} for p in answer.passages
        ]
        if as_json:
            print(json.dumps({"input": question, "text": answer.text, "passages": fetched}, ensure_ascii=False))
        else:
            none = "" if fetched else " (no passage fetched)"
            console.print(Text(question, "bold"), Text(f"{answer.render()}{none}\n"), sep="\n", soft_wrap=True)


@app.command("eval")
def evaluate(
    model: Model,
    instances: Annotated[Path, typer.Argument(help="JSONL of held-out instances.", exists=True, dir_okay=False)],
    passages: PassagesFile,
    answers: Annotated[int, typer.Option(help="Instances to generate an answer for.", min=0)] = 32,
    out: Annotated[Path, typer.Option(help="Folder of the report and the picture.")] = Path("eval"),
    batch_size: BatchSize = 64,
) -> None:
    """Held-out loss, retrieval over the whole corpus against BM25, and correctness of answers."""
    from cosup.data import read_instances, read_passages
    from cosup.evaluate import evaluate, render, save_picture
    from cosup.files import write_text
    from cosup.index import SequenceIndex
    from cosup.model import GenCtxModel

    corpus = read_passages(passages)
    held_out = read_instances(instances, corpus)
    loaded = _eval(GenCtxModel, model)
    built = SequenceIndex.from_model(loaded, corpus.values(), batch_size=batch_size)
    report = evaluate(loaded, held_out, built, answers=answers)
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    console.print(render(report))
    if report["retrieval"]:
        save_picture(report, out / "retrieval.png")


@app.command()
def demo(
    compare: Annotated[bool, typer.Option("--compare", help="Also train ntp-only and nsp-only.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of pictures, report and the trained pair.")] = Path("demo"),
    dtype: Dtype = "auto",
) -> None:
    """The main job in small: real text, real weights, joint training, an index of 10,033 passages, one answer."""
    from cosup.demo import run

    run(out, compare=compare, dtype=dtype)


def _size(name: str, text: str | None) -> int | None:
    """Bytes of 79GiB, 512MiB, 1048576."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,20}(?:\.\d+)?) ?([A-Za-z]*)", text)
    if found is None or found[2] not in UNITS:
        raise ValueError(f"{name} must be a size as 79GiB, 512MiB or 1048576, got {text!r}")
    return int(float(found[1]) * UNITS[found[2]])


def _eval(cls, folder: str):
    """A saved pair, or any model folder as a fresh pair, ready to embed and generate."""
    from cosup.model import GenCtxConfig

    if GenCtxConfig.of_saved(folder) is None:
        text = f"{folder} is no saved pair: a fresh one is made of it, which has not learned to retrieve"
        Console(stderr=True).print(Text("warning: ", "bold yellow"), Text(text), sep="", soft_wrap=True)
    return cls.from_pretrained(folder).eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _milvus(place: str) -> tuple[Any, dict[str, Any]] | None:
    """MilvusIndex, and which, for the place of an index that is URI/COLLECTION; None for a folder."""
    uri, _, collection = place.rpartition("/")
    if "://" not in place and not uri.endswith(".db") and not place.endswith(".db"):
        return None
    if place.endswith(".db") or ("://" in place and "://" not in uri):
        raise ValueError(f"index: wanted URI/COLLECTION, got {place} without a collection")
    try:
        from cosup.integrations.milvus import MilvusIndex
    except ImportError as error:
        raise RuntimeError("an index in Milvus needs pip install 'pymilvus>=3' 'milvus-lite>=3'") from error
    return MilvusIndex, {"uri": uri, "collection": collection, "token": os.environ.get("MILVUS_TOKEN")}
