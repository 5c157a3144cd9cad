"""An index of passages in Milvus: what `SequenceIndex` does, for a corpus that one machine's memory does not hold.

    score[q, m] = <x[q], w[m]>        x, w of unit length where `normalize`        exact: the vectors' index is "FLAT"

A collection is one index. It holds of each passage its number (row, the primary key), id, title, text and vector, and
in its property "cosup" the manifest, as JSON: format, model, count, and whether the build was finished.

Source: Milvus's limits, https://milvus.io/docs/limitations.md.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pymilvus import DataType, MilvusClient, MilvusException
from torch import Tensor

from cosup.data.schema import Passage
from cosup.index import (
    FORMAT_VERSION,
    Encoder,
    build_with,
    check_fingerprint,
    checked_manifest,
    checked_queries,
    embedded_batches,
)

T = TypeVar("T")

_MANIFEST = "cosup"
_FIELDS = {"format_version": int, "fingerprint": str, "dim": int, "pooling": str, "normalize": bool}
_FIELDS |= {"count": int, "finished": bool}
_STRINGS = ("id", "title", "text")
_LONGEST = 65_535  # bytes of a string
_DEEPEST = 16_384  # neighbours of a query
_AT_ONCE = 128  # rows of a request: of 3 * 65,535 + 4 * 32,768 bytes at most, 42 MB; Milvus takes and gives 64 MB


class MilvusIndex:
    """Passages and their vectors in Milvus, searched by inner product. Made by `build`, `from_model` or `connect`.

    What the server refuses or cannot do once it is reached is pymilvus's own MilvusException.
    """

    def __init__(self, client: MilvusClient, collection: str, manifest: dict[str, Any]) -> None:
        self.client, self.collection = client, collection
        self.fingerprint: str = manifest["fingerprint"]
        self.pooling: str = manifest["pooling"]
        self.normalize: bool = manifest["normalize"]
        self.dim: int = manifest["dim"]
        self._count: int = manifest["count"]

    def __len__(self) -> int:
        return self._count

    @property
    def passages(self) -> list[Passage]:
        """In the order of the build; read from Milvus into memory each time."""
        return self._read(range(len(self)))

    @classmethod
    def build(
        cls,
        passages: Iterable[Passage],
        embed: Callable[[list[Passage]], Tensor],
        *,
        uri: str,
        collection: str,
        fingerprint: str,
        pooling: str,
        normalize: bool,
        batch_size: int = 64,
        token: str | None = None,
    ) -> "MilvusIndex":
        """Embed the passages batch by batch, in order, into a new collection. Of the passages only ids stay in memory.

        Args:
            embed: up to batch_size passages -> [P, D], any float dtype, any device.
            uri: a server ("http://host:19530", and "/database" behind it where it is not the default), or a local file
                that ends with ".db" (milvus-lite).
            collection: a name that is free there.
            token: "user:password" or an API key; None: the server asks for none.

        A build that fails takes its collection away again; one that was killed leaves it, and `connect` refuses it.

        Raises ValueError for a collection that exists, a server that is not reached, an empty corpus, an id that comes
        twice, an id, title or text of more than 65,535 bytes in UTF-8, and vectors of a wrong shape or not finite
        (naming the passage).
        """
        client = _client(uri, collection, token)
        if client.has_collection(collection):
            raise ValueError(f"collection: wanted a new one, got {collection!r}, which exists")
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "pooling": pooling,
            "normalize": normalize,
            "count": 0,
            "finished": False,
        }
        made = False
        try:
            for batch, block_PD in embedded_batches(_storable(passages), embed, normalize, batch_size):
                if not made:
                    manifest["dim"], made = block_PD.shape[1], True
                    _create(client, collection, manifest)
                rows = [
                    {"row": row, "id": passage.id, "title": passage.title, "text": passage.text, "vector": vector_D}
                    for row, (passage, vector_D) in enumerate(zip(batch, block_PD, strict=True), manifest["count"])
                ]
                for part in _parts(rows):
                    client.insert(collection, part)
                manifest["count"] += len(batch)
            manifest["finished"] = True
            client.alter_collection_properties(collection, {_MANIFEST: json.dumps(manifest)})
        except BaseException:
            if made:
                with suppress(MilvusException):
                    client.drop_collection(collection)
            raise
        return cls(client, collection, manifest)

    @classmethod
    def from_model(
        cls,
        model: Encoder,
        passages: Iterable[Passage],
        *,
        uri: str,
        collection: str,
        batch_size: int = 64,
        token: str | None = None,
    ) -> "MilvusIndex":
        """The index of a `GenCtxModel` over passages, embedded by length so that batches hold little padding.

        Their order by length keeps all passages in memory meanwhile, though not their vectors: `build` takes a stream.
        Raises what `build` does, for strings too long before anything is embedded.
        """
        passages = list(_storable(passages))
        build = partial(cls.build, uri=uri, collection=collection, batch_size=batch_size, token=token)
        return build_with(model, passages, build)

    @classmethod
    def connect(cls, uri: str, collection: str, fingerprint: str | None, *, token: str | None = None) -> "MilvusIndex":
        """An index that was built.

        Args:
            fingerprint: of the model that will search (`GenCtxModel.fingerprint()`); None: not checked, at your own
                risk.

        Raises ValueError for a server that is not reached, a file that is not there, a collection that is not there or
        no index of this format, a build that was not finished, an index of another model, and another number of
        passages than was built.
        """
        if uri.endswith(".db") and not Path(uri).exists():  # it would be made
            raise ValueError(f"uri: wanted a local file that exists, got {uri}")
        client = _client(uri, collection, token)
        if not client.has_collection(collection):
            raise ValueError(f"collection: wanted one that exists, got {collection!r}")
        place = f"collection {collection!r}"
        try:
            manifest = json.loads(client.describe_collection(collection)["properties"][_MANIFEST])
        except (KeyError, ValueError) as error:
            raise ValueError(f"{place}: wanted an index, got no readable property {_MANIFEST!r}") from error
        manifest = checked_manifest(place, manifest, _FIELDS)
        if not manifest["finished"]:
            raise ValueError(f"{place}: its build was not finished; drop it and build it again")
        check_fingerprint(place, fingerprint, manifest["fingerprint"])
        client.load_collection(collection)
        count = client.query(collection, output_fields=["count(*)"])[0]["count(*)"]
        if count != manifest["count"]:
            raise ValueError(f"{place}: wanted {manifest['count']} passages, as built, got {count}")
        return cls(client, collection, manifest)

    def search(self, queries: Tensor, k: int = 1) -> tuple[Tensor, list[list[Passage]]]:
        """The k passages of the highest score, best first, for each query.

        queries: [Q, D] float -> scores [Q, k] float32 on the CPU, passages Q lists of k.

        Raises ValueError for queries of another shape or not finite, for k outside 1..len(self) or above 16,384, and
        where passages were taken away since.
        """
        queries_QD = checked_queries(self, queries, k)
        if k > _DEEPEST:
            raise ValueError(f"k: wanted at most {_DEEPEST}, as Milvus does, got {k}")
        found: list[Any] = []  # Q lists of hits
        for part in _parts(list(queries_QD.cpu().numpy())):
            found += self.client.search(self.collection, data=part, limit=k, output_fields=["row"])
        if any(len(hits) < k for hits in found):
            raise self._changed()
        rows = sorted({hit["row"] for hits in found for hit in hits})
        passages = dict(zip(rows, self._read(rows), strict=True))
        scores = torch.tensor([[hit["distance"] for hit in hits] for hits in found], dtype=torch.float32)
        return scores.reshape(-1, k), [[passages[hit["row"]] for hit in hits] for hits in found]

    def _read(self, rows: Sequence[int]) -> list[Passage]:
        found = {}
        for part in _parts(rows):
            for entity in self.client.get(self.collection, ids=list(part), output_fields=["row", *_STRINGS]):
                found[entity["row"]] = Passage(*(entity[name] for name in _STRINGS))
        if len(found) < len(rows):
            raise self._changed()
        return [found[row] for row in rows]

    def _changed(self) -> ValueError:
        return ValueError(f"collection {self.collection!r}: wanted {len(self)} passages, as built, got fewer")


def _client(uri: str, collection: str, token: str | None) -> MilvusClient:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", collection):
        rule = "at most 255 letters, digits and underscores, no digit first"
        raise ValueError(f"collection: wanted {rule}, got {collection!r}")
    try:
        return MilvusClient(uri, token=token or "")
    except MilvusException as error:
        raise ValueError(f"uri: wanted a Milvus server or a local file *.db, got no answer: {error.message}") from error


def _create(client: MilvusClient, collection: str, manifest: dict[str, Any]) -> None:
    schema = client.create_schema()
    schema.add_field("row", DataType.INT64, is_primary=True)
    for name in _STRINGS:
        schema.add_field(name, DataType.VARCHAR, max_length=_LONGEST)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=manifest["dim"])
    index = client.prepare_index_params("vector", index_type="FLAT", metric_type="IP")
    client.create_collection(
        collection,
        schema=schema,
        index_params=index,
        properties={_MANIFEST: json.dumps(manifest)},
        consistency_level="Strong",  # a search sees all that was written before it
    )


def _storable(passages: Iterable[Passage]) -> Iterator[Passage]:
    for passage in passages:
        for name in _STRINGS:
            size = len(getattr(passage, name).encode())
            if size > _LONGEST:
                whose = f"in the {name} of {passage.id[:99]!r}"
                raise ValueError(f"passages: wanted at most {_LONGEST} bytes in UTF-8, got {size} {whose}")
        yield passage


def _parts(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """As many rows at once as a request may hold."""
    return (rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE))
