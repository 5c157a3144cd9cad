"""Checkpoints in parts (torch.distributed.checkpoint), read without running code that they contain.

torch reads the table of contents of such a folder (`.metadata`) with pickle, which can call any function. Here an
unpickler reads it that admits only the classes of that table; values other than tensors are read with `weights_only`.
"""

import io
import math
import pickle
import warnings
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from cosup.files import readable

_METADATA = ".metadata"
_RECORDS = (
    "Metadata",
    "TensorStorageMetadata",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "TensorProperties",
    "MetadataIndex",
    "StorageMeta",
    "_StorageInfo",
)
_TABLE = {
    "torch.distributed.checkpoint.metadata": (*_RECORDS, "_MEM_FORMAT_ENCODING"),
    "torch.distributed.checkpoint.filesystem": _RECORDS,
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
}
_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")  # the folder that it was saved to


def names(folder: Path) -> set[str]:
    """Names of the saved tensors and values. Raises ValueError, naming the file, if their table is unreadable."""
    return set(_Reader(folder).read_metadata().state_dict_metadata)


def load(state: dict[str, Any], folder: Path, *, no_dist: bool = False) -> None:
    """Fill `state` in place. The number of processes may differ from that of saving; each reads its own shards.

    Args:
        no_dist: This process loads alone, without collectives.

    Raises:
        ValueError: A part is damaged, missing or of another shape; the error names the folder.
    """
    with readable(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is")  # a single process loads
        try:
            dcp.load(state, storage_reader=_Reader(folder), planner=_Planner(), no_dist=no_dist)
        except CheckpointException as error:  # derives from BaseException
            failure, _ = next(iter(error.failures.values()))
            reason = str(failure) or type(failure).__name__
            raise ValueError(f"{folder}: {reason}") from error


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        path = Path(self.path, _METADATA)
        with readable(path):
            metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()  # reads end where the file does
            if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
                raise ValueError(f"wanted Metadata of a dict, got {type(metadata).__name__}")
            for name, tensor in metadata.state_dict_metadata.items():
                if isinstance(tensor, TensorStorageMetadata) and not _is_covered(tensor):
                    raise ValueError(f"{name}: wanted chunks that cover {list(tensor.size)}, each number once")
            for info in metadata.storage_data.values():
                if Path(info.relative_path).name != info.relative_path:
                    raise ValueError(f"wanted the name of a file of this folder, got {info.relative_path!r}")
                size = Path(self.path, info.relative_path).stat().st_size
                if not 0 <= info.offset <= info.offset + info.length <= size:
                    part = f"{info.length} bytes from {info.offset}"
                    raise ValueError(f"wanted a part of the {size} bytes of {info.relative_path}, got {part}")
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
            return metadata


class _Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict[name], torch.Tensor):
            raise ValueError(f"{name}: wanted a tensor, got a value that is none")
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # the base class would unpickle anything
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _is_covered(tensor: TensorStorageMetadata) -> bool:
    """Whether the chunks lie within the tensor, do not overlap, and leave nothing out; else memory stays unread."""
    spans = []
    for chunk in tensor.chunks:
        span = [(start, start + length) for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(start < 0 or end < start or end > size for (start, end), size in zip(span, tensor.size, strict=True)):
            return False
        if math.prod(chunk.sizes):
            spans.append(span)
    overlap = any(
        all(a[0] < b[1] and b[0] < a[1] for a, b in zip(*pair, strict=True)) for pair in combinations(spans, 2)
    )
    covered = sum(math.prod(end - start for start, end in span) for span in spans)
    return not overlap and covered == math.prod(tensor.size)


class _Unpickler(pickle._Unpickler):  # the one in Python, whose steps can be overridden
    stack: list[Any]
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def load_bytearray8(self) -> None:
        """Refused: it takes as much memory as the file says, before anything is read."""
        raise ValueError("wanted the table of contents of tensors, got a bytearray")

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8  # type: ignore[assignment]

    def load_build(self) -> None:
        """Set attributes of instances alone: those of a class or function would change the whole process."""
        if type(self.stack[-2]).__name__ not in _RECORDS:
            raise ValueError(f"wanted the table of contents of tensors, got attributes of {type(self.stack[-2])}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build  # type: ignore[assignment]

    def find_class(self, module: str, name: str) -> Any:
        if name in _TABLE.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return PurePosixPath
        raise ValueError(f"wanted the table of contents of tensors, got {module}.{name}")
