"""Bugs that tests must catch: each is planted in a copy of the tree, and the test that its table names is run there.

A table of tests/bugs/*.toml is a bug: its name, the file, what stands there before and after, and caught_by, the
arguments of pytest that select the test. The test runs in a process forked from one that has imported what takes
seconds, but nothing of cosup: that is imported from the copy.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
IMPORTED = ["pytest", "hypothesis", "triton", "transformers.trainer", "torch.distributed.tensor"]
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", ".gpu", ".*_cache", ".hypothesis", ".benchmarks", "__pycache__", "*.egg-info", "build", "dist",
    "demo", "cosup-bench",
)  # fmt: skip
LONGEST = 240  # seconds of a test, of which the longest takes 90 beside others: what waits would do so for ever
# Python finds the packages of the copy before those that are installed
FINDER = """
import sys
from importlib.util import spec_from_file_location

class Copy:
    FOLDERS = {"cosup": "cosup", "cosup.kernels": "kernels", "cosup.bench": "bench"}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in cls.FOLDERS:
            folder = %r + cls.FOLDERS[name]
            return spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])

sys.meta_path.insert(0, Copy)
"""


class Bug(NamedTuple):
    name: str
    file: str
    before: str
    after: str
    caught_by: str

    @property
    def is_native(self) -> bool:
        return self.file.endswith(".cpp")

    def planted_in(self, source: str) -> str:
        if source.count(self.before) != 1:
            raise ValueError(f"{self.name}: {self.file} has what stands before {source.count(self.before)} times")
        return source.replace(self.before, self.after)


def bugs() -> list[Bug]:
    files = [tomllib.loads(path.read_text()) for path in sorted(ROOT.glob("tests/bugs/*.toml"))]
    return [Bug(**table) for file in files for table in file["bug"]]


class Tree:
    """A copy of the tree, with one bug at a time, until a reading of ``time.monotonic``."""

    def __init__(self, folder: Path, until: float) -> None:
        self.until = until
        self.root, self.site, self.log = folder / "tree", folder / "site", folder / "log"
        self.temporary = folder / "temporary"
        shutil.copytree(ROOT, self.root, ignore=NOT_COPIED)
        if (ROOT / ".git").exists():  # what is there is what git knows
            subprocess.run("git init --quiet && git add --all", shell=True, check=True, cwd=self.root)
        self.site.mkdir()
        (self.site / "sitecustomize.py").write_text(FINDER % f"{self.root}/")
        self.passed: set[str] = set()  # without a bug

    def catches(self, bug: Bug) -> bool:
        """Whether the bug's test fails with it, and without it passes."""
        self.leave_out_if_late()
        with self.having(bug):
            if self.passes(bug.caught_by):
                return False
        if bug.caught_by not in self.passed:
            assert self.passes(bug.caught_by), f"{bug.caught_by} fails without a bug:\n{self.log.read_text()[-3000:]}"
            self.passed.add(bug.caught_by)
        return True

    def leave_out_if_late(self) -> None:
        if time.monotonic() > self.until:
            pytest.skip("no time left")

    @contextmanager
    def having(self, bug: Bug) -> Iterator[None]:
        path = self.root / bug.file
        source = path.read_text()
        try:
            path.write_text(bug.planted_in(source))
            if bug.is_native:
                self._build()
            yield
        finally:
            path.write_text(source)
            if bug.is_native:
                for library in ROOT.glob("kernels/*cosup_cpu.*"):
                    shutil.copy2(library, self.root / "kernels")

    def passes(self, caught_by: str) -> bool:
        """Whether the tests pass; where they neither pass nor fail, as where none is selected, an AssertionError."""
        process = multiprocessing.get_context("forkserver").Process(target=_run, args=(self, caught_by))
        process.start()
        process.join(min(LONGEST, max(0, self.until - time.monotonic())))
        if process.exitcode is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            self.leave_out_if_late()
            return False
        ended = {0: True, 1: False}.get(process.exitcode)
        assert ended is not None, f"{caught_by}: {process.exitcode}\n{self.log.read_text()[-3000:]}"
        return ended

    def _build(self) -> None:
        build, here = self.root / "build/native", f"-DCMAKE_INSTALL_PREFIX={self.root}/kernels"
        for command in (["cmake", "-G", "Ninja", "-S", self.root, "-B", build, here],
                        ["cmake", "--build", build, "--target", "install"]):  # fmt: skip
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


def _run(tree: Tree, caught_by: str) -> None:
    os.setpgid(0, 0)  # with what the test starts
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    with tree.log.open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(tree.root)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.environ |= {"PYTHONPATH": str(tree.site), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True  # a source of the same size in the same second would be taken for the one before
    sys.path[:] = [path for path in sys.path if path != str(ROOT / "tests")]
    exec(FINDER % f"{tree.root}/", {})
    _fork_server(tree.site / "server")
    path, _, word = caught_by.partition(" -k ")
    selected = [path, *(["-k", word] if word else [])]
    os._exit(pytest.main(["-x", "-q", "--release", "-p", "no:cacheprovider", "-p", "no:xdist",
                          "--basetemp", str(tree.temporary), *selected]))  # fmt: skip


def _fork_server(address: Path) -> None:
    """What the test forks its processes from, forked itself of this one: it need not import all again."""
    address.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen()
        ended, alive = os.pipe()
        process = os.fork()
        if not process:
            os.close(alive)
            forkserver.main(listener.fileno(), ended, [])
            os._exit(0)
        os.close(ended)
    server = forkserver._forkserver
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = str(address), alive, process


def _end_with(parent) -> None:
    parent.join()
    os.killpg(0, signal.SIGKILL)
