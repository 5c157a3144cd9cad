"""Written whole or not at all: a file or a folder gets its name when it is done, and on the disk.

    .name.xxxxxxxx.part/name    written here, beside its place, and flushed
    a file, a new folder        renamed into its place
    a folder that is there      renamed to .next within it: from then on that is what it holds, and what `read` reads,
                                until the last of its files is in its own place

So whoever is killed leaves the old or the new, on a full disk too, and a .part, which the next one to write there takes
away: its lock went with its writer. Links stay links: what they point to is written.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows: parts of killed writers stay
    fcntl = None  # type: ignore[assignment]

_NEXT = ".next"

T = TypeVar("T")


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """A path to write a file to, which takes the place of `path` when the block ends without an error.

    The folder that it is in is this writer's alone, and goes with all that is left in it.

    Raises OSError naming `path` where it cannot be written.
    """
    path = _target(path)
    if path.exists() and not path.is_file() and not path.is_dir():  # a device, a pipe
        yield path
        return
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part(path.parent, path.name) as part:
            yield part
            _take(part, path)


def write_text(path: str | Path, text: str) -> None:
    """The text in UTF-8, as a file that is whole or as it was before."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def updated(
    folder: str | Path,
    goes: Callable[[Path], Iterable[Path]] = lambda folder: (),
    stays: Callable[[Path], bool] = lambda path: False,
) -> Iterator[Path]:
    """A path to make a folder at, whose files become those of `folder`, all at once, when the block ends without error.

    Another folder around it is this writer's alone, as for `replaced`.

    Args:
        folder: other files in it stay.
        goes: gives the files of the folder that go where the new one has none such.
        stays: whether this file is left as it is, whatever is new.

    Raises OSError naming `folder` where it cannot be written.
    """
    folder = _target(folder)
    with _naming(folder):
        place = folder if folder.exists() else folder.parent
        place.mkdir(parents=True, exist_ok=True)
        _tidy(folder.parent)
        with _part(place, folder.name) as part:
            yield part
            for path in (part, *part.rglob("*")):
                _flush(path)
            if place != folder:
                with suppress(OSError):  # another writer made it in the meantime
                    part.rename(folder)
                    _flush(folder.parent)
                    return
            lock = _lock(folder)
            try:
                _settle(folder, goes, stays)  # what a killed writer left to do
                part.rename(folder / _NEXT)
                _flush(folder)
                _settle(folder, goes, stays)
            finally:
                _unlock(lock)


def read(folder: str | Path, key: str, reader: Callable[[Path], T]) -> T:
    """What reader(path) makes of a folder that `updated` wrote, of one state of it, whoever writes beside.

    key: the name of a file that every write has.
    """
    folder, lock = Path(folder), None
    try:
        while True:
            state = _state(folder, key)
            try:
                found = reader(state[0])
            except Exception:
                if state == _state(folder, key):
                    raise
            else:
                if state == _state(folder, key):
                    return found
            lock = lock or _lock(folder, shared=True)  # it was written meanwhile: now writers wait
    finally:
        _unlock(lock)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What reading `path` raises, for whichever reason, is a ValueError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path}: unreadable: {str(error) or type(error).__name__}") from error


def is_part(name: str) -> bool:
    """Whether a file of this name is a write that is not done."""
    return name == _NEXT or re.fullmatch(r"\..*\.[a-z0-9_]{8}\.part", name) is not None


def _target(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


@contextmanager
def _part(place: Path, name: str) -> Iterator[Path]:
    """A new path within `place`; whatever is there when the block ends is taken away."""
    _tidy(place)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name[:60]}.", suffix=".part", dir=place))
        with suppress(FileNotFoundError):
            lock = _lock(folder)
            if folder.exists():  # else another one tidied up before it was locked
                break
            _unlock(lock)
    try:
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _tidy(folder: Path) -> None:
    """Take away the parts that killed writers left in a folder."""
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name != _NEXT and is_part(path.name)]:
            with suppress(OSError):
                lock = _lock(path, wait=False)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    _unlock(lock)


def _lock(folder: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Lock a folder until it is unlocked or this process ends; None: it cannot be. FileNotFoundError: it is gone."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # another one has it, or the file system has no locks
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _settle(folder: Path, goes: Callable[[Path], Iterable[Path]], stays: Callable[[Path], bool]) -> None:
    """Put the files of .next into their places. It stays whole until the last is there: they are linked, not moved."""
    new = folder / _NEXT
    if not new.is_dir():
        return
    names = [path.relative_to(new) for path in new.rglob("*") if not path.is_dir()]
    for name in names:
        target = _target(folder / name)
        if not stays(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _part(target.parent, target.name) as part:
                try:
                    os.link(new / name, part)
                except OSError:  # another disk, or one without links
                    shutil.copy2(new / name, part)
                _take(part, target)
    for path in list(goes(folder)):
        name = path.relative_to(folder)
        if name not in names and not is_part(name.parts[0]):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds more
                if path.parent != folder:
                    path.parent.rmdir()
    with _part(folder, folder.name) as part:
        new.rename(part)


def _take(part: Path, path: Path) -> None:
    """Rename a file to a path, and with the permissions of the one that is there."""
    if path.exists():
        shutil.copymode(path, part)
    _flush(part)
    part.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Have it on the disk."""
    with suppress(PermissionError):  # folders, on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _state(folder: Path, key: str) -> tuple[Path, Any]:
    """Where the files of a folder are, and which write they are of."""
    place = folder / _NEXT if (folder / _NEXT).is_dir() else folder
    try:
        stat = (place / key).stat()
    except OSError:
        return place, None
    return place, (stat.st_ino, stat.st_mtime_ns)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What cannot be written is an OSError that names the path asked for, not that of its part."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.filename is not None and not any(is_part(part) for part in Path(os.fsdecode(error.filename)).parts):
            raise
        if error.errno is None:
            raise OSError(f"{path}: {error}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error
