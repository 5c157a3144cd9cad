"""Atomic writes: a file or folder is replaced only once the new content is complete and flushed to disk.

    .name.xxxxxxxx.part/name    temporary folder beside the target, where the new content is written
    file, new folder            renamed to the target
    existing folder             renamed to .cosup-next inside the target; from then on `read` uses that, until every
                                file of it has been linked into its final place

If the process is killed, or the disk is full, readers find either the old or the new content. A temporary folder that a
killed process left is removed by the next write beside it: its lock was released when the process ended. Symbolic links
are kept: the file that they point to is replaced.
"""

import errno
import hashlib
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
except ImportError:  # Windows: temporary folders of killed processes stay
    fcntl = None  # type: ignore[assignment]

_NEXT = ".cosup-next"

T = TypeVar("T")


@contextmanager
def replaced(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write a file to; it replaces `path` when the block ends without an error.

    Its parent folder is private to this writer and is removed with everything left in it.

    Raises:
        OSError: `path` cannot be written; the error names it.
    """
    path = Path(path)
    if path.parts[:2] in (("/", "dev"), ("/", "proc")) or (path.exists() and not path.is_file() and not path.is_dir()):
        yield path  # a device or pipe
        return
    path = _target(path)
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _part(path.parent, path.name) as part:
            yield part
            _take(part, path)


def write_text(path: str | Path, text: str) -> None:
    """Replace the file by this text, in UTF-8."""
    with replaced(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def updated(
    folder: str | Path,
    obsolete: Callable[[Path], Iterable[Path]] = lambda folder: (),
    keeps: Callable[[Path], bool] = lambda path: False,
) -> Iterator[Path]:
    """Yield a temporary path to create a folder at; when the block ends, its files replace those of `folder` at once.

    The parent folder of the path is private to this writer, as for `replaced`.

    Args:
        folder: Files in it that the new folder does not have are kept.
        obsolete: Lists the files of `folder` to remove if the new folder does not have them.
        keeps: Tells whether an existing file is kept even if the new folder has it.

    Raises:
        OSError: `folder` cannot be written; the error names it.
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
                target = folder / path.relative_to(part)
                if target.exists() and target.is_dir() != path.is_dir():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
            if place != folder:
                try:
                    part.rename(folder)
                except OSError:  # another process created it meanwhile
                    pass
                else:
                    _flush(folder.parent)
                    return
            lock = _lock(folder)
            try:
                # finish the update of a killed process, or of a stranger: nothing outside the folder
                _settle(folder, obsolete, lambda path: keeps(path) or not path.is_relative_to(folder))
                part.rename(folder / _NEXT)
                _flush(folder)
                with suppress(OSError):  # the new content is in force; the next write puts it into place
                    _settle(folder, obsolete, keeps)
            finally:
                _unlock(lock)


def read(folder: str | Path, key: str, reader: Callable[[Path], T]) -> T:
    """Return reader(path) for a folder that `updated` writes, repeated if another process replaced it meanwhile.

    Args:
        key: Name of a file that every write of this folder has.
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
            if lock is None:
                lock = _lock(folder, shared=True)  # keeps writers waiting during the next attempt
    finally:
        _unlock(lock)


def content(folder: Path) -> Path:
    """The path to read a folder from: .cosup-next if an update was killed before all files were in place."""
    return folder / _NEXT if (folder / _NEXT).is_dir() else folder


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn any error raised while `path` is read into a ValueError that names it."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path}: unreadable: {str(error) or type(error).__name__}") from error


def sha256_of(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_part(name: str) -> bool:
    """Whether this is the name of a temporary folder, or of .cosup-next."""
    return name == _NEXT or re.fullmatch(r"\..*\.[a-z0-9_]{8}\.part", name) is not None


def _target(path: str | Path) -> Path:
    return Path(os.path.realpath(path))


@contextmanager
def _part(place: Path, name: str) -> Iterator[Path]:
    """Yield a path in a new, locked temporary folder of `place`; the folder is removed when the block ends."""
    _tidy(place)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name[:60]}.", suffix=".part", dir=place))
        with suppress(FileNotFoundError):
            lock = _lock(folder)
            if folder.exists():  # otherwise another process removed it before it was locked
                break
            _unlock(lock)
    try:
        yield folder / name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _unlock(lock)


def _tidy(folder: Path) -> None:
    """Remove temporary folders of killed processes."""
    with suppress(OSError):
        for path in [path for path in folder.iterdir() if path.name != _NEXT and is_part(path.name)]:
            with suppress(OSError):
                lock = _lock(path, wait=False)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    _unlock(lock)


def _lock(folder: Path, *, shared: bool = False, wait: bool = True) -> int | None:
    """Lock a folder until `_unlock` or the end of this process. Returns None if it cannot be locked."""
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except OSError:  # held by another process, or the file system has no locks
        os.close(descriptor)
        return None
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        fcntl.flock(lock, fcntl.LOCK_UN)  # a child process may still hold the descriptor
        os.close(lock)


def _settle(folder: Path, obsolete: Callable[[Path], Iterable[Path]], keeps: Callable[[Path], bool]) -> None:
    """Link the files of .cosup-next into their final places, then remove it. It stays complete until then."""
    new = folder / _NEXT
    if not new.is_dir():
        return
    names = [path.relative_to(new) for path in new.rglob("*") if not path.is_dir()]
    for name in names:
        target = _target(folder / name)
        if not keeps(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _part(target.parent, target.name) as part:
                try:
                    os.link(new / name, part)
                except OSError:  # on another disk, or the file system has no hard links
                    shutil.copy2(new / name, part)
                _take(part, target)
    for path in list(obsolete(folder)):
        name = path.relative_to(folder)
        if name not in names and not is_part(name.parts[0]):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                if path.parent != folder:
                    path.parent.rmdir()
    with _part(folder, folder.name) as part:
        new.rename(part)


def _take(part: Path, path: Path) -> None:
    """Rename a file to `path`, keeping the permissions of the file that is there."""
    if path.exists():
        shutil.copymode(path, part)
    _flush(part)
    part.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    with suppress(PermissionError):  # Windows cannot open folders
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _state(folder: Path, key: str) -> tuple[Path, Any]:
    """The path to read a folder from, and a value that changes with every write."""
    place = content(folder)
    try:
        stat = (place / key).stat()
    except OSError:
        return place, None
    return place, (stat.st_ino, stat.st_mtime_ns)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Make errors of writing name the requested path instead of the temporary one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None and not any(is_part(part) for part in Path(os.fsdecode(error.filename)).parts):
            raise
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except (SafetensorError, RuntimeError) as error:  # safetensors; torch.save and FAISS
        number = re.search(r"os error (\d+)", str(error))
        if number is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        if isinstance(error, SafetensorError) or "PytorchStreamWriter" in str(error) or ".part/" in str(error):
            raise OSError(f"{path}: {error}") from error
        raise
