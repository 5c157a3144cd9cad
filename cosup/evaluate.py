"""How well Gen writes, how well it retrieves, and whether its answers are right, on held-out instances.

    ntp        nats per target token; its passages given, as in training
    retrieval  Gen's state at its first [Ret] against BM25 on the same input, both over the whole corpus
                 R@k = share of queries with a gold passage among the first k
                 MRR@c = mean of 1 / rank of the first gold passage, 0 beyond the first c
    answers    an acceptable answer stands in what Gen wrote; apart for answers with a gold passage fetched, and without

Source: BM25, Robertson et al. 1994 (bm25s with its defaults: Lucene's variant, English stop words).
"""

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Group
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cosup.data.schema import Instance, Passage, Reference
from cosup.files import replaced
from cosup.index import PassageIndex
from cosup.losses import linear_cross_entropy
from cosup.model import GenCtxModel
from cosup.tokens import control_ids, encode, passage_text, prompt_ids

CUTOFFS = (1, 10, 100)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7f7f7f")  # told apart by the colour-blind too


@torch.no_grad()
def evaluate(
    model: GenCtxModel,
    instances: Sequence[Instance],
    index: PassageIndex,
    *,
    batch_size: int = 32,
    bm25: bool = True,
    answers: int = 0,
    max_new_tokens: int = 64,
) -> dict[str, Any]:
    """The report of a model on held-out instances; numbers, strings, None and dicts of them, ready for JSON.

    index: of every passage, by this model; instances may name its passages only. All are read into memory.
    bm25: rank with BM25 too, by the package bm25s. max_new_tokens: of each answer.
    answers: let Gen answer this many instances, the first that have answers.

        {"instances": 733, "passages": 10033,
         "ntp": {"loss": 3.1, "targets": 30000, "loss_with_passages": 3.6, "targets_with_passages": 66000, "lost": 0},
         "retrieval": {"Gen": {"queries": 733, "R@1": 0.2, "R@10": 0.5, "R@100": 0.8, "MRR@100": 0.3}, "BM25": {...}},
         "answers": {"all": {"count": 50, "correct": 20, "share": 0.4}, "hit": {...}, "missed": {...}}}

    ntp: "with_passages" counts passage tokens and [Cs] as targets too; "lost": targets cut off by the model's
        max_length. retrieval: over the instances that have gold passages; a query is Gen's input and output up to the
        first [Ret], or [Ret] alone where the output has none. Cutoffs above the size of the corpus are left out.
        A share of nothing is None. Work is done under the caller's autocast, if any.

    Raises ValueError for no instances, options out of range, and a gold passage that the index does not hold;
    RuntimeError for bm25 where bm25s is not installed.
    """
    if not instances:
        raise ValueError("instances: wanted at least one, got none")
    for name, value, least in (("batch_size", batch_size, 1), ("answers", answers, 0)):
        if value < least:
            raise ValueError(f"{name}: wanted at least {least}, got {value}")
    corpus = index.passages
    passages = {passage.id: passage for passage in corpus}
    for instance in instances:
        named = (*instance.passages, *(reference.passage for reference in instance.references))
        unknown = [id for id in named if id not in passages]
        if unknown:
            raise ValueError(f"index: wanted the passages of {instance.id!r}, got none with the id {unknown[0]!r}")

    asked = [instance for instance in instances if instance.passages]
    depth = min(CUTOFFS[-1], len(index))
    by_words = _bm25(asked, corpus, depth) if bm25 and asked else []  # first of all: its package may be missing
    training = model.training
    model.eval()
    try:
        report: dict[str, Any] = {
            "instances": len(instances),
            "passages": len(index),
            "ntp": _ntp(model, instances, passages, batch_size),
            "retrieval": {},
        }
        if asked:
            _, found = index.search(query_vectors(model, asked, batch_size=batch_size), k=depth)
            report["retrieval"]["Gen"] = _recall(asked, found)
            if by_words:
                report["retrieval"]["BM25"] = _recall(asked, by_words)
        if answers:
            answerable = [instance for instance in instances if instance.answers][:answers]
            report["answers"] = _answers(model, answerable, index, batch_size, max_new_tokens)
    finally:
        model.train(training)
    return report


@torch.no_grad()
def query_vectors(model: GenCtxModel, instances: Sequence[Instance], *, batch_size: int = 32) -> Tensor:
    """Gen's state at the first [Ret] of each instance, [len(instances), D]. Only what comes before it is computed."""
    rows = [_until_retrieval(model, instance) for instance in instances]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # by length: batches hold little padding
    vectors = []
    for start in range(0, len(order), batch_size):
        batch = [torch.tensor(rows[i], device=model.device) for i in order[start : start + batch_size]]
        length_B = torch.tensor([len(row) for row in batch], device=model.device)
        ids_BT = pad_sequence(batch, batch_first=True)
        mask_BT = (torch.arange(ids_BT.shape[1], device=model.device) < length_B[:, None]).long()
        last_B = torch.arange(len(batch), device=model.device) * ids_BT.shape[1] + length_B - 1
        vectors.append(model(ids_BT, mask_BT, last_B, *_no_passages(ids_BT)).query)
    place = torch.tensor(order).argsort()
    return torch.cat(vectors)[place.to(model.device)]


def render(report: Mapping[str, Any]) -> Group:
    """The report as tables for `rich.print`. Other systems may be added under report["retrieval"]."""
    tables = []
    ntp = report["ntp"]
    table = Table(title="next-token loss, nats per token", title_justify="left")
    for column in ("targets", "loss", "tokens"):
        table.add_column(column, justify="left" if column == "targets" else "right")
    table.add_row("what Gen writes", _number(ntp["loss"]), f"{ntp['targets']:,}")
    table.add_row("and its passages", _number(ntp["loss_with_passages"]), f"{ntp['targets_with_passages']:,}")
    tables.append(table)

    systems = report["retrieval"]
    if systems:
        title = f"retrieval over {report['passages']:,} passages"
        table = Table("system", title=title, title_justify="left")
        for name in next(iter(systems.values())):
            table.add_column(name, justify="right")
        for system, scores in systems.items():
            table.add_row(system, *(_number(score) for score in scores.values()))
        tables.append(table)

    if "answers" in report:
        table = Table("passage", title="answers that hold an acceptable answer", title_justify="left")
        for column in ("correct", "of", "share"):
            table.add_column(column, justify="right")
        for name, part in report["answers"].items():
            table.add_row(name, f"{part['correct']}", f"{part['count']}", _number(part["share"]))
        tables.append(table)
    return Group(*tables)


def save_picture(report: Mapping[str, Any], path: str | Path) -> None:
    """Recall of each system in report["retrieval"] at each cutoff, as a PNG.

    Raises ValueError for a report without retrieval.
    """
    systems = report["retrieval"]
    if not systems:
        raise ValueError("report: wanted a report with retrieval, got one without queries")
    cutoffs = [name for name in next(iter(systems.values())) if name.startswith("R@")]
    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(systems)
    for s, (system, scores) in enumerate(systems.items()):
        left = [c + (s - (len(systems) - 1) / 2) * width for c in range(len(cutoffs))]
        shares = [scores[cutoff] for cutoff in cutoffs]
        bars = axes.bar(left, shares, 0.92 * width, label=system, color=COLOURS[s % len(COLOURS)])
        axes.bar_label(bars, [f"{share:.2f}" for share in shares], padding=2, fontsize=8)
    axes.set_xticks(range(len(cutoffs)), cutoffs)
    axes.set_ylim(0, 1)
    axes.set_ylabel("share of questions")
    queries = next(iter(systems.values()))["queries"]
    axes.set_title(f"Gold passage among the first k of {report['passages']:,}, {queries:,} held-out questions", size=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    with replaced(path) as part:
        figure.savefig(part)


def _ntp(
    model: GenCtxModel, instances: Sequence[Instance], passages: Mapping[str, Passage], batch_size: int
) -> dict[str, Any]:
    """Both losses from one forward: passage tokens are targets of it, and are told apart afterwards."""
    collator, written = model.collator(passages), model.collator(passages)
    collator.passage_in_ntp, written.passage_in_ntp = True, False
    weight_VD, bias_V = model.lm_head
    # all and written only: sum of nats, number of targets
    sums = torch.zeros(2, 2, dtype=torch.float64, device=model.device)
    by_length = sorted(instances, key=lambda instance: len(instance.input) + sum(map(_length, instance.output)))
    for start in range(0, len(by_length), batch_size):
        chunk = by_length[start : start + batch_size]
        batch = {name: value.to(model.device) for name, value in collator(chunk).items()}
        labels_BT = batch["labels"][:, 1:]
        is_target_BT = labels_BT != -100
        is_written_N = (written(chunk)["labels"][:, 1:] != -100).to(model.device)[is_target_BT]
        ids_BT = batch["input_ids"]
        hidden_BTD = model(ids_BT, batch["attention_mask"], batch["query_index"], *_no_passages(ids_BT)).hidden
        nll_N = linear_cross_entropy(
            hidden_BTD[:, :-1][is_target_BT],
            weight_VD,
            labels_BT[is_target_BT],
            linear_bias=bias_V,
            reduction="none",
            logit_scale=model.logit_scale,
            logit_softcap=model.logit_softcap,
        )
        assert isinstance(nll_N, Tensor)
        for row, kept in enumerate((torch.ones_like(is_written_N), is_written_N)):
            sums[row] += torch.stack([nll_N.double()[kept].sum(), kept.sum().double()])
    (nats_all, targets_all), (nats, targets) = sums.tolist()
    return {
        "loss": nats / targets if targets else None,
        "targets": int(targets),
        "loss_with_passages": nats_all / targets_all if targets_all else None,
        "targets_with_passages": int(targets_all),
        "lost": written.report()["targets_lost"],
    }


def _no_passages(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Passage ids and mask of the model's forward where Ctx has nothing to do."""
    return ids[:0], ids[:0]


def _length(part: str | Reference) -> int:
    return len(part) if isinstance(part, str) else len(part.grounded or "")


def _until_retrieval(model: GenCtxModel, instance: Instance) -> list[int]:
    """Ids of the prompt and the output up to its first [Ret], that included; the prompt and [Ret] if it has none."""
    ids = prompt_ids(model.gen_tokenizer, instance.input)
    if instance.references:
        for part in instance.output:
            if isinstance(part, Reference):
                break
            ids = ids + encode(model.gen_tokenizer, part)
    return [*ids, control_ids(model.gen_tokenizer).retrieve]


def _bm25(instances: Sequence[Instance], passages: Sequence[Passage], depth: int) -> list[list[Passage]]:
    """What BM25 finds with the inputs as queries, best first. It reads the same passage text as Ctx, uncut."""
    try:
        import bm25s
    except ImportError as error:
        raise RuntimeError("BM25 needs bm25s: pip install 'cosup[bm25]'") from error
    ranker = bm25s.BM25()
    texts = [passage_text(passage.title, passage.text) for passage in passages]
    ranker.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
    queries = bm25s.tokenize([instance.input for instance in instances], show_progress=False)
    rows, _ = ranker.retrieve(queries, k=depth, show_progress=False)
    return [[passages[m] for m in row] for row in rows.tolist()]


def _recall(instances: Sequence[Instance], found: Sequence[Sequence[Passage]]) -> dict[str, float]:
    """R@k and MRR of lists of passages, best first, all of one length."""
    depth = len(found[0])
    ranks = []  # of the first gold passage, from 1; depth + 1 where none was found
    for instance, ranked in zip(instances, found, strict=True):
        gold = set(instance.passages)
        ranks.append(next((rank for rank, passage in enumerate(ranked, 1) if passage.id in gold), depth + 1))
    scores: dict[str, float] = {"queries": len(ranks)}
    for k in CUTOFFS:
        if k <= depth:
            scores[f"R@{k}"] = sum(rank <= k for rank in ranks) / len(ranks)
    scores[f"MRR@{depth}"] = sum(1 / rank for rank in ranks if rank <= depth) / len(ranks)
    return scores


def _answers(
    model: GenCtxModel, instances: Sequence[Instance], index: PassageIndex, batch_size: int, max_new_tokens: int
) -> dict[str, Any]:
    """Count and correct answers: of all, of those with a gold passage fetched ("hit"), of the others ("missed")."""
    parts = {name: {"count": 0, "correct": 0} for name in ("all", "hit", "missed")}
    for start in range(0, len(instances), batch_size):
        batch = instances[start : start + batch_size]
        prompts = [instance.input for instance in batch]
        for instance, answer in zip(batch, model.generate(prompts, index, max_new_tokens=max_new_tokens), strict=True):
            hit = any(retrieved.passage.id in instance.passages for retrieved in answer.passages)
            for name in ("all", "hit" if hit else "missed"):
                parts[name]["count"] += 1
                parts[name]["correct"] += is_correct(answer.text, instance.answers)
    return {
        name: {**part, "share": part["correct"] / part["count"] if part["count"] else None}
        for name, part in parts.items()
    }


def is_correct(text: str, answers: Sequence[str]) -> bool:
    """Whether one of the answers stands in the text, word for word; case, accents, punctuation, articles aside."""
    words = f" {_normalised(text)} "
    return any(f" {answer} " in words for answer in map(_normalised, answers) if answer)


def _normalised(text: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).casefold()
    plain = re.sub(r"\b(a|an|the)\b", " ", "".join(" " if c in string.punctuation else c for c in plain))
    return " ".join(plain.split())


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
