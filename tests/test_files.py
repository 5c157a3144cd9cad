"""What is written is whole or as it was before, wherever its writer is killed, on a full disk, beside other writers.

Every writer of the package writes version 0, then 1. A child process is killed at its n-th touch of a file or folder,
for n = 1, 2, 3 ..., or may not write files of more than so many bytes.
"""

import itertools
import json
import multiprocessing
import os
import resource
import signal
import stat
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from cosup import files
from cosup.data.schema import Passage, read_passages, write_jsonl
from cosup.index import SequenceIndex
from cosup.model import GenCtxModel
from cosup.train import CoSupConfig, CoSupTrainer, last_checkpoint
from pairs import shared
from tiny import tiny_gen, tiny_instances, tiny_passages

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
TOUCHES = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "os.chmod"}
STALE, OTHERS = "of version 0 alone", "of somebody else"


class Text:
    """One file of 100 kB."""

    def write(self, place: Path, version: int) -> None:
        files.write_text(place / "text", f"{version}" * 100_000)

    def read(self, place: Path) -> int:
        text = (place / "text").read_text()
        assert len(text) == 100_000 and len(set(text)) == 1
        return int(text[0])


class Jsonl:
    def write(self, place: Path, version: int) -> None:
        write_jsonl(place / "passages.jsonl", (Passage(str(i), "", f"{version} " * 99) for i in range(50)))

    def read(self, place: Path) -> int:
        passages = read_passages(place / "passages.jsonl").values()
        (version,) = {int(passage.text[0]) for passage in passages}
        assert len(passages) == 50
        return version


class Folder:
    """Two files, one in a folder of its own; a third one that version 1 has no more; and what is none of its."""

    def write(self, place: Path, version: int) -> None:
        with files.updated(place / "folder", obsolete=lambda folder: folder.glob(f"{STALE}*")) as part:
            (part / "deep").mkdir(parents=True)
            (part / "key").write_text(f"{version}")
            (part / "deep/file").write_text(f"{version}" * 1000)
            if not version:
                (part / STALE).touch()
        (place / "folder" / OTHERS).touch()

    def read(self, place: Path) -> int:
        def reader(folder: Path) -> set[int]:
            got = {int((folder / "key").read_text()), int((folder / "deep/file").read_text()[0])}
            return got | ({0} if (folder / STALE).exists() else set())

        (version,) = files.read(place / "folder", "key", reader)
        return version


class Index:
    def write(self, place: Path, version: int) -> None:
        passages = [Passage(str(i), "", f"{version}") for i in range(8 + version)]
        vectors = torch.full((len(passages), 4), float(version + 1))
        options = dict(fingerprint="f" * 64, pooling="mean", normalize=False, batch_size=99)
        SequenceIndex.build(passages, lambda batch: vectors, **options).save(place / "index")

    def read(self, place: Path) -> int:
        index = SequenceIndex.load(place / "index", None)
        (version,) = {int(passage.text) for passage in index.passages}
        assert len(index) == 8 + version and torch.all(index.vectors == version + 1)
        return version


class Approximate(Index):
    """An index of FAISS, over a table of vectors."""

    def write(self, place: Path, version: int) -> None:
        if not version:
            return super().write(place, version)
        pytest.importorskip("faiss")
        passages = [Passage(str(i), "", "1") for i in range(9)]
        options = dict(fingerprint="f" * 64, pooling="mean", normalize=False, batch_size=99, factory="HNSW4")
        SequenceIndex.build(passages, lambda batch: torch.full((9, 4), 2.0), **options).save(place / "index")

    def read(self, place: Path) -> int:
        if isinstance(SequenceIndex.load(place / "index", None).vectors, torch.Tensor):
            return super().read(place)
        assert not (place / "index/vectors.safetensors").exists() or (place / "index/.cosup-next").exists()
        return 1


class Pair:
    """Of another width each; between other things of its user."""

    def __init__(self) -> None:
        self.models = [shared(tiny_gen(hidden_size=32), max_length=64), shared(tiny_gen(hidden_size=48), max_length=65)]

    def write(self, place: Path, version: int) -> None:
        self.models[version].save_pretrained(place / "pair")
        (place / "pair" / OTHERS).touch()

    def read(self, place: Path) -> int:
        model = GenCtxModel.from_pretrained(place / "pair")
        version = model.config.max_length - 64
        assert model.lm_head[0].shape[1] == (32, 48)[version]
        assert torch.equal(model.lm_head[0], self.models[version].lm_head[0])
        return version


class Checkpoint:
    """One that is there from a run before."""

    def __init__(self) -> None:
        self.models = Pair().models

    def write(self, place: Path, version: int) -> None:
        options = dict(lr_scheduler_type="constant", learning_rate=(version + 1) * 1e-3, save_strategy="steps")
        args = CoSupConfig(output_dir=str(place / "run"), use_cpu=True, **options)
        data = dict(train_dataset=tiny_instances(8), passages=tiny_passages(8))
        trainer = CoSupTrainer(self.models[version], args, **data)
        trainer.create_optimizer_and_scheduler(4)
        trainer._steps = version
        trainer._save_checkpoint(trainer.model, None)

    def read(self, place: Path) -> int:
        if not last_checkpoint(place / "run"):
            raise ValueError("none")
        folder = files.content(place / "run/checkpoint-0")
        version = GenCtxModel.from_pretrained(place / "run/checkpoint-0").config.max_length - 64
        moments = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"][0]["lr"]
        steps = json.loads((folder / "cosup_interval.json").read_text())["steps"]
        assert moments == (version + 1) * 1e-3 and steps == version
        return version


WRITERS = {kind.__name__.lower(): kind for kind in (Text, Jsonl, Folder, Index, Approximate, Pair, Checkpoint)}


def in_a_child(work) -> tuple[int, str]:
    """How the work ended in a process of its own, and what it raised."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        tqdm.set_lock(threading.RLock())  # its parent's is shared, and kept for ever if this process is killed
        try:
            work()
            os._exit(0)
        except OSError as error:
            os.write(writes, f"{error}".encode())
            os._exit(1)
        except BaseException:
            os.write(writes, traceback.format_exc().encode())
            os._exit(2)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        said = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def killed_at(touch: int, work) -> int:
    """The work, killed when it is about to touch a file or folder for the so-manieth time; how it ended."""
    count = 0

    def hook(event, arguments):
        nonlocal count
        if event in TOUCHES and not (event == "open" and str(arguments[0]).startswith(("/proc", "/sys", sys.prefix))):
            count += 1
            if count == touch:
                os.kill(os.getpid(), signal.SIGKILL)

    def run():
        sys.addaudithook(hook)
        work()

    status, said = in_a_child(run)
    assert status in (0, -signal.SIGKILL), said
    return status


def left_behind(place: Path) -> list[str]:
    return [str(path) for path in place.rglob("*") if files.is_part(path.name)]


@pytest.mark.parametrize("first", [False, True], ids=["over", "new"])
@pytest.mark.parametrize("name", WRITERS)
def test_killed_anywhere_it_leaves_the_old_or_the_new(name, first, tmp_path):
    writer = WRITERS[name]()
    step = {"index": 3, "approximate": 5, "pair": 23, "checkpoint": 37}.get(name, 1)
    touch, seen = 1, set()
    while True:
        place = tmp_path / str(touch)
        place.mkdir()
        if not first:
            writer.write(place, 0)
        status = killed_at(touch, lambda place=place: writer.write(place, 1))
        try:
            seen.add(writer.read(place))
        except (ValueError, OSError):
            assert first, f"killed at touch {touch}"
            seen.add(None)
        writer.write(place, 1)
        assert writer.read(place) == 1 and not left_behind(place), f"killed at touch {touch}"
        if status == 0:
            break
        touch += step
    assert seen == {None if first else 0, 1} and touch > 5


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_the_old_and_is_said(name, tmp_path):
    writer = WRITERS[name]()
    writer.write(tmp_path, 0)
    sizes = sorted({path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} - {0})
    for limit in [0, 1, *(size - 1 for size in sizes[:: max(1, len(sizes) // 6)]), sizes[-1] // 2, sizes[-1] - 1]:

        def write(limit=limit):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            writer.write(tmp_path, 1)

        status, said = in_a_child(write)
        assert status == 1 and str(tmp_path) in said, (limit, said)
        assert ".part" not in said or "faiss" in said, said
        assert writer.read(tmp_path) == 0 and not left_behind(tmp_path), limit


@pytest.mark.parametrize("name", ["text", "folder", "index", "pair"])
def test_who_reads_beside_two_who_write_sees_one_version(name, tmp_path):
    writer = WRITERS[name]()
    writer.write(tmp_path, 0)
    enough = multiprocessing.get_context("fork").Event()
    children = []
    for first in (0, 1):
        child = os.fork()
        if not child:
            try:
                for count in itertools.count(first):
                    if enough.is_set():
                        os._exit(0)
                    writer.write(tmp_path, count % 2)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    seen, start = set(), time.monotonic()
    try:
        while (passed := time.monotonic() - start) < 1 or (len(seen) < 2 and passed < 60):
            seen.add(writer.read(tmp_path))
    finally:
        enough.set()
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert seen == {0, 1}
    writer.write(tmp_path, 1)
    assert writer.read(tmp_path) == 1 and not left_behind(tmp_path)


def test_the_parts_of_a_writer_at_work_stay(tmp_path):
    with files.replaced(tmp_path / "a") as part:
        part.write_text("new")
        files.write_text(tmp_path / "b", "")
        files.write_text(tmp_path / "a", "other")
        assert part.read_text() == "new"
    assert (tmp_path / "a").read_text() == "new" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_what_somebody_else_named_alike_stays(tmp_path):
    names = [".a.part", ".next", ".cosup-next.part", ".a.ABCDEFGH.part", ".a.abcdefgh.part.txt"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / ".a.abcdefgh.part").mkdir()
    files.write_text(tmp_path / "a", "")
    assert sorted(os.listdir(tmp_path)) == sorted([*names, "a"])


@pytest.mark.parametrize("name", WRITERS)
def test_links_stay_links(name, tmp_path):
    writer, elsewhere, place = WRITERS[name](), tmp_path / "elsewhere", tmp_path / "place"
    elsewhere.mkdir()
    place.mkdir()
    writer.write(elsewhere, 0)
    for path in elsewhere.iterdir():
        (place / path.name).symlink_to(path)
    writer.write(place, 1)
    assert all(path.is_symlink() for path in place.iterdir()) and writer.read(elsewhere) == writer.read(place) == 1


def test_a_link_within_a_folder_stays(tmp_path):
    writer = Pair()
    writer.write(tmp_path, 0)
    weights, big = tmp_path / "pair/gen/model.safetensors", tmp_path / "big"
    weights.rename(big)
    weights.symlink_to(big)
    writer.write(tmp_path, 1)
    assert weights.is_symlink() and weights.samefile(big) and writer.read(tmp_path) == 1


def test_permissions_stay(tmp_path):
    Text().write(tmp_path, 0)
    new = stat.S_IMODE((tmp_path / "text").stat().st_mode)
    (tmp_path / "plain").touch()
    assert new == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    (tmp_path / "text").chmod(0o600)
    Text().write(tmp_path, 1)
    assert stat.S_IMODE((tmp_path / "text").stat().st_mode) == 0o600


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reads = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write_text(tmp_path / "pipe", "text")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and os.read(reads, 9) == b"text"
    os.close(reads)


def test_a_file_where_a_folder_is_wanted_is_named(tmp_path):
    (tmp_path / "file").touch()
    for write in (lambda path: files.write_text(path / "a", ""), lambda path: shared(tiny_gen()).save_pretrained(path)):
        with pytest.raises(OSError, match=f"{tmp_path}/file"):
            write(tmp_path / "file")


def test_an_error_of_what_is_written_is_passed_on(tmp_path):
    def items():
        yield Passage("a", "", "text")
        raise KeyError("mine")

    Jsonl().write(tmp_path, 0)
    with pytest.raises(KeyError, match="mine"):
        write_jsonl(tmp_path / "passages.jsonl", items())
    assert Jsonl().read(tmp_path) == 0 and os.listdir(tmp_path) == ["passages.jsonl"]


def test_no_links_between_disks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    writer = Folder()
    writer.write(tmp_path, 0)
    writer.write(tmp_path, 1)
    assert writer.read(tmp_path) == 1 and json.loads((tmp_path / "folder/key").read_text()) == 1


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """A power cut may keep a renaming and lose what was written before it."""
    flushed, fsync, rename = set(), os.fsync, Path.rename

    def flush(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def named(path, target):
        files_of = [each for each in (path, *path.rglob("*")) if path.name == "folder"]
        assert {each.stat().st_ino for each in files_of} <= flushed
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", named)
    for version in (0, 1):
        Folder().write(tmp_path, version)
        Text().write(tmp_path, version)
        assert (tmp_path / "text").stat().st_ino in flushed and tmp_path.stat().st_ino in flushed


def test_a_child_process_does_not_keep_a_lock(tmp_path):
    """As workers that load data, which are forked while something is written."""
    with files.updated(tmp_path / "folder") as part:
        part.mkdir()
    lock = files._lock(tmp_path / "folder")
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    files._unlock(lock)
    assert files._lock(tmp_path / "folder", wait=False) is not None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_folder_in_the_place_of_a_file_is_told_before_anything_is_changed(tmp_path):
    writer = Pair()
    writer.write(tmp_path, 0)
    (tmp_path / "pair/README.md").unlink()
    (tmp_path / "pair/README.md").mkdir()
    for _ in range(2):
        with pytest.raises(OSError, match=f"{tmp_path}/pair/README.md"):
            writer.write(tmp_path, 1)
        assert writer.read(tmp_path) == 0 and not left_behind(tmp_path)


def test_what_is_in_force_is_no_error_and_is_put_into_place_later(tmp_path, monkeypatch):
    writer = Folder()
    writer.write(tmp_path, 0)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        writer.write(tmp_path, 1)
    assert writer.read(tmp_path) == 1 and left_behind(tmp_path)
    writer.write(tmp_path, 0)
    assert writer.read(tmp_path) == 0 and not left_behind(tmp_path)


def test_an_update_that_a_stranger_left_writes_nothing_outside(tmp_path):
    """A folder of somebody else's may hold an update, and links in the places of its files."""
    mine = tmp_path / "mine"
    mine.write_text("mine")
    Folder().write(tmp_path, 0)
    (tmp_path / "folder/x").symlink_to(mine)
    (tmp_path / "folder/.cosup-next").mkdir()
    (tmp_path / "folder/.cosup-next/x").write_text("theirs")
    Folder().write(tmp_path, 1)
    assert mine.read_text() == "mine" and not left_behind(tmp_path)


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_standard_output_is_written_to(kind, tmp_path):
    """A pipe has no path, and a file that output goes to is not replaced."""
    (tmp_path / "file").touch()
    path = tmp_path / "file"
    reads, writes = os.pipe() if kind == "pipe" else (os.open(path, os.O_RDONLY), os.open(path, os.O_WRONLY))

    def write():
        os.dup2(writes, 1)
        files.write_text("/dev/stdout", "text")

    assert in_a_child(write) == (0, "") and os.read(reads, 9) == b"text"
    os.close(reads)
    os.close(writes)


def test_nothing_of_the_tokenizer_of_before_stays(tmp_path):
    old, new = Pair().models
    old.gen_tokenizer.chat_template = "old"
    old.save_pretrained(tmp_path)
    for name in ("LICENSE.md", "notes.json", "data.bin"):
        (tmp_path / "gen" / name).write_text("a user's")
    new.save_pretrained(tmp_path)
    assert GenCtxModel.from_pretrained(tmp_path).gen_tokenizer.chat_template is None
    assert all((tmp_path / "gen" / name).exists() for name in ("LICENSE.md", "notes.json", "data.bin"))
