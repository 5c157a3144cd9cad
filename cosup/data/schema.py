"""The JSONL schema: passages and instances, one JSON object a line, UTF-8.

passages.jsonl
    {"id": "p1", "title": "Hat", "text": "A hat is a head covering."}
    title may be absent or "".

instances.jsonl
    {"id": "q1", "input": "What is a hat?",
     "output": ["Well: ", {"passage": "p1", "grounded": "A hat covers the head."}, " More text."],
     "passages": ["p1"], "hard_negatives": ["p7"], "answers": ["a head covering"]}
    output          text and references in reading order, or one plain string (no retrieval). Gen learns to ask for the
                    passage of a reference, and to write its grounded text resting on it. Without "grounded" (or null)
                    the output ends there: a question and its passage, nothing to write.
    passages        gold ids for evaluation; absent: those referenced, each once.
    hard_negatives  passages that look right and are not; absent: none.
    answers         strings that count as correct; absent: none.

Other fields are ignored. A line that breaks these rules is an error that names file and line.
"""

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from cosup import files

OnBadLine = Literal["raise", "skip"]
MAX_BAD_SHARE = 0.01  # more than this share of bad lines is no accident: "skip" gives up

T = TypeVar("T")


@dataclass(frozen=True)
class Passage:
    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Reference:
    """A place in an output where a passage is fetched, and the text that rests on it; None: the output ends here."""

    passage: str
    grounded: str | None = None


@dataclass(frozen=True)
class Instance:
    id: str
    input: str
    output: tuple[str | Reference, ...]
    passages: tuple[str, ...] = ()
    hard_negatives: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @property
    def references(self) -> list[Reference]:
        return [part for part in self.output if isinstance(part, Reference)]


def read_passages(path: str | Path, on_bad_line: OnBadLine = "raise") -> dict[str, Passage]:
    """Passages by id, in file order.

    Raises ValueError ("file:line: ...") for broken JSON, a missing or wrong-typed field, an empty text, an id seen
    before. With on_bad_line="skip" bad lines are left out and counted in one warning; over 1 % of them still raise.
    """
    passages: dict[str, Passage] = {}
    for passage in _read(path, _passage, on_bad_line):
        passages[passage.id] = passage
    return passages


def read_instances(
    path: str | Path, passages: Mapping[str, Passage] | None = None, on_bad_line: OnBadLine = "raise"
) -> list[Instance]:
    """Instances in file order; with `passages` every id they name must be among them. Errors as `read_passages`."""
    return list(_read(path, lambda record: _instance(record, passages), on_bad_line))


def write_jsonl(path: str | Path, items: Iterable[Passage | Instance]) -> None:
    """Write one item per line, atomically. Raises OSError, naming the file, if it cannot be written."""
    with files.replaced(path) as part, part.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")


def _read(path: str | Path, parse: Callable[[dict[str, Any]], T], on_bad_line: OnBadLine) -> Iterator[T]:
    if on_bad_line not in ("raise", "skip"):
        raise ValueError(f'on_bad_line: wanted "raise" or "skip", got {on_bad_line!r}')
    bad: list[str] = []
    seen: set[str] = set()
    lines = 0
    with open(path, "rb") as file:  # bytes: a line that is not UTF-8 is one bad line, not the end of the file
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            lines += 1
            try:
                record = _parse(line)
                if not isinstance(record, dict):
                    raise ValueError(f"wanted a JSON object, got {type(record).__name__}")
                item = parse(record)
                if record["id"] in seen:
                    raise ValueError(f"id {record['id']!r} was seen before")
            except ValueError as error:
                bad.append(f"{path}:{number}: {error}")
                if on_bad_line == "raise":
                    raise ValueError(bad[0]) from error
                continue
            seen.add(record["id"])
            yield item
    if len(bad) > MAX_BAD_SHARE * lines:
        raise ValueError(f"{len(bad)} of {lines} lines are bad, more than {MAX_BAD_SHARE:.0%}; the first: {bad[0]}")
    if bad:
        warnings.warn(f"{path}: skipped {len(bad)} of {lines} lines; the first: {bad[0]}", stacklevel=3)


def _passage(record: dict[str, Any]) -> Passage:
    passage = Passage(_string(record, "id"), _string(record, "title", ""), _string(record, "text"))
    if not passage.text.strip():
        raise ValueError(f"passage {passage.id!r} is empty")
    return passage


def _instance(record: dict[str, Any], passages: Mapping[str, Passage] | None) -> Instance:
    output = record.get("output")
    if not isinstance(output, str | list):
        raise ValueError(f"output: wanted a string or a list, got {_got(record, 'output')}")
    parts = tuple(_part(part) for part in ([output] if isinstance(output, str) else output))
    if not parts:
        raise ValueError("output: wanted text or a reference, got an empty list")
    referenced = tuple(dict.fromkeys(part.passage for part in parts if isinstance(part, Reference)))
    instance = Instance(
        id=_string(record, "id"),
        input=_string(record, "input"),
        output=parts,
        passages=_strings(record, "passages") or referenced,
        hard_negatives=_strings(record, "hard_negatives"),
        answers=_strings(record, "answers"),
    )
    if any(isinstance(part, Reference) and part.grounded is None for part in instance.output[:-1]):
        raise ValueError("output: wanted nothing after a reference without grounded text")
    if passages is not None:
        for name, ids in (
            ("output", referenced),
            ("passages", instance.passages),
            ("hard_negatives", instance.hard_negatives),
        ):
            unknown = [id for id in ids if id not in passages]
            if unknown:
                raise ValueError(f"{name}: passage {unknown[0]!r} is unknown")
    return instance


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except RecursionError:
        raise ValueError("wanted an object, got one nested too deeply") from None


def _part(part: Any) -> str | Reference:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ValueError(f"output: wanted strings and references, got {type(part).__name__}")
    grounded = None if part.get("grounded") is None else _string(part, "grounded")
    return Reference(_string(part, "passage"), grounded)


def _string(record: dict[str, Any], field: str, default: str | None = None) -> str:
    value = record.get(field, default)
    if not isinstance(value, str):
        raise ValueError(f"{field}: wanted a string, got {_got(record, field)}")
    value.encode("utf-8")  # a lone surrogate is no text: UnicodeEncodeError is a ValueError
    return value


def _strings(record: dict[str, Any], field: str) -> tuple[str, ...]:
    value = record.get(field, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"{field}: wanted a list of strings, got {_got(record, field)}")
    return tuple(value)


def _got(record: dict[str, Any], field: str) -> str:
    return type(record[field]).__name__ if field in record else "no such field"
