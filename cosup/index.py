"""The nonparametric table at rest: the vectors of a corpus, its passages beside them.

    score[q, m] = <x[q], w[m]>        x, w of unit length where `normalize`        exact for the factory "Flat"

"Flat" is a tensor that torch searches; every other factory is an index of FAISS, which is imported for it alone.

A saved index is one folder: vectors.safetensors ("Flat") or index.faiss, passages.parquet (row number = vector number)
and manifest.json, which holds the fingerprint of the model that made the vectors and the sha256 of the two others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from cosup import files
from cosup.data.schema import Passage
from cosup.nearest import home, nearest

if TYPE_CHECKING:
    import faiss

FORMAT_VERSION = 1
FLAT = "Flat"
_FLAT, _FAISS, _PASSAGES, _MANIFEST = "vectors.safetensors", "index.faiss", "passages.parquet", "manifest.json"
_FILES = (_FLAT, _FAISS, _PASSAGES, _MANIFEST)
_FIELDS = {"format_version": int, "fingerprint": str, "dim": int, "pooling": str, "normalize": bool, "count": int}
_FIELDS |= {"factory": str, "sha256": dict}


class PassageIndex(Protocol):
    """What searches passages, wherever their vectors are: what generation and evaluation need."""

    normalize: bool

    def __len__(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def passages(self) -> Sequence[Passage]: ...

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, list[list[Passage]]]: ...


Index = TypeVar("Index", bound=PassageIndex)


class Encoder(Protocol):
    """What an index needs of a model."""

    config: Any  # pooling, normalize
    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def eval(self) -> Any: ...

    def passage_batch(self, passages: Sequence[Passage]) -> dict[str, Tensor]: ...

    def embed_passages(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor: ...

    def fingerprint(self) -> str: ...


class SequenceIndex:
    """Passages and their vectors, searched by inner product. Made by `build` or `load`."""

    def __init__(
        self,
        vectors: Tensor | faiss.Index,
        passages: list[Passage],
        *,
        fingerprint: str,
        pooling: str,
        normalize: bool,
        factory: str,
    ) -> None:
        self.vectors = vectors  # [M, D] float32 where the factory is "Flat"
        self.passages = passages  # passages[m] belongs to vector m
        self.fingerprint, self.pooling, self.normalize, self.factory = fingerprint, pooling, normalize, factory

    def __len__(self) -> int:
        return len(self.passages)

    @property
    def dim(self) -> int:
        return self.vectors.shape[1] if isinstance(self.vectors, Tensor) else self.vectors.d

    @classmethod
    def build(
        cls,
        passages: Iterable[Passage],
        embed: Callable[[list[Passage]], Tensor],
        *,
        fingerprint: str,
        pooling: str,
        normalize: bool,
        factory: str = FLAT,
        batch_size: int = 64,
    ) -> SequenceIndex:
        """Embed the passages batch by batch, in order.

        Args:
            embed: up to batch_size passages -> [P, D], any float dtype, any device.
            factory: "Flat", exact, or a FAISS index factory string. One that has to be trained ("IVF64,Flat") is
                trained on all vectors, which are kept until then (4 * M * D bytes, as many as "Flat" holds anyway).

        Raises ValueError for an empty corpus, an id that comes twice, vectors of a wrong shape or not finite (naming
        the passage), a factory that FAISS does not know or cannot train on so few passages; RuntimeError for a factory
        other than "Flat" where FAISS is not installed.
        """
        if factory != FLAT:
            _faiss(f"factory: {factory!r}")
        kept: list[Passage] = []
        waiting: list[np.ndarray] = []  # until the index can be trained; all of "Flat"
        index: faiss.Index | None = None
        for batch, block_PD in embedded_batches(passages, embed, normalize, batch_size):
            kept += batch
            if index is None and factory != FLAT:
                index = _empty(block_PD.shape[1], factory)
            if index is not None and index.is_trained:
                index.add(block_PD)
            else:
                waiting.append(block_PD.copy())  # `embed` may give the same memory each time
        if index is not None and waiting:
            corpus_MD = np.concatenate(waiting)
            try:
                index.train(corpus_MD)
            except RuntimeError as error:
                raise ValueError(f"factory: {factory!r} cannot be trained on {len(kept)} passages: {error}") from error
            index.add(corpus_MD)
        return cls(
            torch.from_numpy(np.concatenate(waiting)) if index is None else index,
            kept,
            fingerprint=fingerprint,
            pooling=pooling,
            normalize=normalize,
            factory=factory,
        )

    @classmethod
    def from_model(
        cls, model: Encoder, passages: Iterable[Passage], *, factory: str = FLAT, batch_size: int = 64
    ) -> SequenceIndex:
        """The index of a `GenCtxModel` over passages, embedded by length so that batches hold little padding."""
        return build_with(model, passages, partial(cls.build, factory=factory, batch_size=batch_size))

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, list[list[Passage]]]:
        """The k passages of the highest score, best first, for each query.

        queries: [Q, D] float -> scores [Q, k] float32 on the CPU, passages Q lists of k. "Flat" moves to the
        queries' device, and stays there, if half of its free memory holds it; else it is searched where it is. Of equal
        scores the earlier passage comes first. An index in cells (IVF) that finds fewer than k in those it looks at
        first looks at all.

        Raises ValueError for queries of another shape or not finite, and for k outside 1..len(self).
        """
        queries_QD = checked_queries(self, queries, k)
        if isinstance(self.vectors, Tensor):
            self.vectors = self.vectors.to(home(self.vectors, queries_QD.device))
            scores, rows = nearest(queries_QD.to(self.vectors.device), self.vectors, k)
        else:
            scores, rows = self._by_faiss(self.vectors, queries_QD.cpu().numpy(), k)
        return scores, [[self.passages[m] for m in row] for row in rows.tolist()]

    def _by_faiss(self, vectors: faiss.Index, queries_QD: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
        scores, rows = vectors.search(queries_QD, k)
        cells = _faiss().try_extract_index_ivf(vectors)
        if (rows < 0).any() and cells is not None:
            nprobe, cells.nprobe = cells.nprobe, cells.nlist
            scores, rows = vectors.search(queries_QD, k)
            cells.nprobe = nprobe
        if (rows < 0).any():
            raise ValueError(f"k: wanted at most what {self.factory!r} finds for every query, got {k}")
        return torch.from_numpy(scores), torch.from_numpy(rows)

    def save(self, folder: str | Path) -> None:
        """Write the index as `folder`, in place of an index that is there.

        The replacement is atomic: if saving fails or is killed, `load(folder)` returns the old index.
        Raises ValueError if `folder` holds anything that is not an index, OSError if it cannot be written.
        """
        folder = Path(folder)
        strange = _strange(folder)
        if strange is not None:
            raise ValueError(f"folder: wanted a new folder or an index, got {folder} with {strange!r} in it")
        with files.updated(folder, obsolete=lambda folder: (folder / name for name in _FILES)) as part:
            part.mkdir()
            vectors_file = _write(self.vectors, part)
            columns = {name: [getattr(p, name) for p in self.passages] for name in ("id", "title", "text")}
            pq.write_table(pa.table(columns), part / _PASSAGES)
            manifest = {
                "format_version": FORMAT_VERSION,
                "fingerprint": self.fingerprint,
                "dim": self.dim,
                "pooling": self.pooling,
                "normalize": self.normalize,
                "count": len(self),
                "factory": self.factory,
                "sha256": {name: files.sha256_of(part / name) for name in (vectors_file, _PASSAGES)},
            }
            (part / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, fingerprint: str | None) -> SequenceIndex:
        """Read a saved index; both files are checked against the manifest before they are opened.

        Args:
            fingerprint: of the model that will search (`GenCtxModel.fingerprint()`); None: not checked, at your own
                risk.

        Raises ValueError for a missing, truncated or changed file, a manifest of another format, an index of another
        model, and parts that do not belong together; RuntimeError for vectors in index.faiss where FAISS is not
        installed. The manifest guards against damage, not against a forger.
        """
        return files.read(folder, _MANIFEST, lambda place: cls._read_in(place, fingerprint))

    @classmethod
    def _read_in(cls, folder: Path, fingerprint: str | None) -> SequenceIndex:
        manifest = _manifest(folder)
        check_fingerprint(folder, fingerprint, manifest["fingerprint"])
        vectors_file = _FAISS if _FAISS in manifest["sha256"] else _FLAT
        for name in (vectors_file, _PASSAGES):
            wanted = manifest["sha256"].get(name)
            got = files.sha256_of(folder / name) if (folder / name).is_file() else "no file"
            if got != wanted:
                raise ValueError(f"{folder / name}: damaged or changed: wanted sha256 {wanted}, got {got}")
        if vectors_file == _FAISS:
            _faiss(f"{folder / _FAISS}")
        with files.readable(folder / vectors_file):
            vectors = _read(folder / vectors_file, manifest["factory"])
        with files.readable(folder / _PASSAGES):
            rows = pq.read_table(folder / _PASSAGES, columns=["id", "title", "text"]).to_pylist()
        count, dim = vectors.shape if isinstance(vectors, Tensor) else (vectors.ntotal, vectors.d)
        counts = {"manifest": manifest["count"], vectors_file: count, _PASSAGES: len(rows)}
        if len(set(counts.values())) != 1 or not rows:
            raise ValueError(f"{folder}: wanted as many vectors as passages, and one or more, got {counts}")
        if dim != manifest["dim"]:
            raise ValueError(f"{folder}: wanted vectors of {manifest['dim']}, got {dim}")
        return cls(
            vectors,
            [Passage(**row) for row in rows],
            fingerprint=manifest["fingerprint"],
            pooling=manifest["pooling"],
            normalize=manifest["normalize"],
            factory=manifest["factory"],
        )


def embedded_batches(
    passages: Iterable[Passage], embed: Callable[[list[Passage]], Tensor], normalize: bool, batch_size: int
) -> Iterator[tuple[list[Passage], np.ndarray]]:
    """The passages batch by batch with their vectors [P, D] float32, all checked; at least one batch."""
    if batch_size < 1:
        raise ValueError(f"batch_size: wanted at least 1, got {batch_size}")
    passages = iter(passages)
    seen: set[str] = set()
    dim = None
    while batch := list(islice(passages, batch_size)):
        for passage in batch:
            if passage.id in seen:
                raise ValueError(f"passages: id {passage.id!r} comes twice")
            seen.add(passage.id)
        with torch.no_grad():
            block_PD = _prepared(embed(batch), "embed", normalize).cpu().numpy()
        if len(block_PD) != len(batch):
            raise ValueError(f"embed: wanted {len(batch)} vectors for {len(batch)} passages, got {len(block_PD)}")
        bad = np.flatnonzero(~np.isfinite(block_PD).all(axis=1))
        if len(bad):
            raise ValueError(f"embed: the vector of passage {batch[bad[0]].id!r} is not finite")
        dim = dim or block_PD.shape[1]
        if block_PD.shape[1] != dim:
            raise ValueError(f"embed: wanted vectors of {dim}, as before, got {block_PD.shape[1]}")
        yield batch, block_PD
    if not seen:
        raise ValueError("passages: wanted at least one, got none")


def build_with(model: Encoder, passages: Iterable[Passage], build: Callable[..., Index]) -> Index:
    """What `build` makes of the passages as the model embeds them, by length so that batches hold little padding."""
    training = model.training
    model.eval()
    try:
        return build(
            sorted(passages, key=lambda passage: len(passage.text)),
            lambda batch: model.embed_passages(**model.passage_batch(batch)),
            fingerprint=model.fingerprint(),
            pooling=model.config.pooling,
            normalize=model.config.normalize,
        )
    finally:
        model.train(training)


def checked_queries(index: PassageIndex, queries: Tensor, k: int) -> Tensor:
    """The queries [Q, D] as the index compares them, float32; ValueError for what `search` does not take."""
    if not 1 <= k <= len(index):
        raise ValueError(f"k: wanted 1 to {len(index)}, the size of the corpus, got {k}")
    queries_QD = _prepared(queries, "queries", index.normalize)
    if queries_QD.shape[1] != index.dim:
        raise ValueError(f"queries: wanted [Q, {index.dim}], got {list(queries_QD.shape)}")
    if not queries_QD.isfinite().all():
        raise ValueError("queries: wanted finite vectors, got NaN or infinity")
    return queries_QD


def _prepared(vectors: Tensor, name: str, normalize: bool) -> Tensor:
    if not isinstance(vectors, Tensor) or vectors.ndim != 2 or not vectors.is_floating_point():
        got = f"{vectors.dtype} {list(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f"{name}: wanted a float tensor [rows, D], got {got}")
    vectors = vectors.detach().float()
    return (F.normalize(vectors, dim=1) if normalize else vectors).contiguous()


def _faiss(what: str = "the index") -> Any:
    try:
        import faiss
    except ImportError as error:
        raise RuntimeError(f"{what} needs FAISS: pip install 'cosup[faiss]'") from error
    return faiss


def _empty(dim: int, factory: str) -> faiss.Index:
    faiss = _faiss()
    try:
        return faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"factory: wanted a FAISS factory string for {dim} dimensions, got {factory!r}") from error


def _write(vectors: Tensor | faiss.Index, folder: Path) -> str:
    """The name of the file that they are in."""
    if isinstance(vectors, Tensor):
        save_file({FLAT: vectors}, folder / _FLAT)
        return _FLAT
    _faiss().write_index(vectors, str(folder / _FAISS))
    return _FAISS


def _read(path: Path, factory: str) -> Tensor | faiss.Index:
    if path.name == _FLAT:
        return load_file(path)[FLAT]
    faiss = _faiss()
    index = faiss.read_index(str(path))
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(f"{path}: wanted inner products, got another metric")
    if factory == FLAT:  # saved when FAISS searched "Flat" too
        return torch.from_numpy(index.reconstruct_n(0, index.ntotal))
    return index


def _strange(folder: Path) -> str | None:
    """Something in the folder that `save` did not put there, or None."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        return folder.name
    found = (file.name for file in folder.iterdir())
    return next((name for name in found if name not in _FILES and not files.is_part(name)), None)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        with files.readable(path):
            manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}: wanted an index, got no readable {_MANIFEST}: {error}") from error
    return checked_manifest(path, manifest, _FIELDS)


def checked_manifest(place: object, manifest: Any, fields: dict[str, type]) -> dict[str, Any]:
    """The manifest, of this format and with these fields; ValueError names its place."""
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{place}: wanted format_version {FORMAT_VERSION}, got {version!r}")
    for field, kind in fields.items():
        if not isinstance(manifest.get(field), kind):
            raise ValueError(f"{place}: {field}: wanted {kind.__name__}, got {manifest.get(field)!r}")
    return manifest


def check_fingerprint(place: object, wanted: str | None, got: str) -> None:
    """ValueError, naming the place, for an index of another model than wanted; None: of any."""
    if wanted is not None and wanted != got:
        advice = "build it again with this model"
        raise ValueError(f"{place}: wanted an index of the model {wanted[:12]}, got one of {got[:12]}; {advice}")
