"""The index finds what brute force finds, and what was saved comes back or is refused by name."""

import hashlib
import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosup import nearest
from cosup.data.schema import Passage
from cosup.index import SequenceIndex
from tiny import tiny_passages

needs_faiss = pytest.mark.skipif(find_spec("faiss") is None, reason="FAISS is not installed")
D = 8
PASSAGES = list(tiny_passages(40).values())


def vectors(seed: int = 0, rows: int = 40) -> Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, rows + 1)[:, None]


def build(table: Tensor | None = None, passages: list[Passage] = PASSAGES, **options) -> SequenceIndex:
    table = vectors() if table is None else table
    row_of = {passage.id: row for row, passage in enumerate(PASSAGES)}
    options = {"fingerprint": "f" * 64, "pooling": "mean", "normalize": True, "batch_size": 7} | options
    return SequenceIndex.build(passages, lambda batch: table[[row_of[p.id] for p in batch]], **options)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5), st.booleans(), st.integers(1, 50))
def test_search_is_brute_force(seed: int, size: int, k: int, queries: int, normalize: bool, batch_size: int):
    k = min(k, size)
    table, query = vectors(seed)[:size], vectors(seed + 100, queries) if queries else torch.zeros(0, D)
    index = build(table, PASSAGES[:size], normalize=normalize, batch_size=batch_size)
    x, w = (t.double().numpy() for t in (query, table))
    if normalize:
        x, w = (t / np.linalg.norm(t, axis=1, keepdims=True) for t in (x, w))
    wanted = x @ w.T
    order = np.argsort(-wanted, axis=1)[:, :k]
    scores, passages = index.search(query, k)
    assert scores.shape == (queries, k) and scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), np.take_along_axis(wanted, order, 1), rtol=1e-5, atol=1e-4)
    assert [[p.id for p in row] for row in passages] == [[PASSAGES[m].id for m in row] for row in order]


def test_passages_stream_in_batches_and_in_order():
    sizes, given_ids, taken = [], [], 0

    def corpus():
        nonlocal taken
        for passage in PASSAGES:
            taken += 1
            yield passage

    def embed(batch: list[Passage]) -> Tensor:
        assert taken == len(given_ids) + len(batch), "passages are taken no earlier than they are embedded"
        assert not torch.is_grad_enabled()
        sizes.append(len(batch))
        given_ids.extend(p.id for p in batch)
        return torch.randn(len(batch), D).bfloat16()

    index = SequenceIndex.build(corpus(), embed, fingerprint="f", pooling="last", normalize=True, batch_size=16)
    assert sizes == [16, 16, 8] and index.passages == PASSAGES and len(index) == 40 and index.dim == D


@pytest.mark.parametrize("tile", [(1, 1), (3, 7), (256, 1 << 22)])
@pytest.mark.parametrize(("queries", "size", "k"), [(5, 40, 3), (4, 40, 40), (1, 9, 5), (0, 40, 2)])
def test_of_equal_scores_the_earlier_comes_first(tile, queries: int, size: int, k: int, monkeypatch):
    """Small integers: products are exact, and many are equal, zero, or its negative."""
    monkeypatch.setattr(nearest, "_QUERIES", tile[0])
    monkeypatch.setattr(nearest, "_SCORES", tile[1])
    table, asked = (torch.randint(-2, 3, (rows, D)).float() * sign for rows, sign in ((size, 1), (queries, -0.5)))
    scores, rows = nearest.nearest(asked, table, k)
    wanted = (asked.double() @ table.double().T).numpy()
    order = np.argsort(-wanted, axis=1, kind="stable")[:, :k]
    assert (rows.numpy() == order).all() and (scores.numpy() == np.take_along_axis(wanted, order, 1)).all()


def test_a_product_that_vanishes_is_zero_whatever_its_sign():
    _, rows = nearest.nearest(torch.full((3, 1), -1e-30), torch.tensor([[1e-30], [0.0], [-1e-30]]), 3)
    assert rows.tolist() == [[0, 1, 2]] * 3


def test_search_is_in_float32_under_autocast():
    index, asked = build(), vectors(3)
    with torch.autocast("cpu", torch.bfloat16):
        scores, passages = index.search(asked, 5)
    wanted = index.search(asked, 5)
    assert torch.equal(scores, wanted[0]) and passages == wanted[1]


def test_vectors_move_to_the_queries_once_where_half_of_the_free_memory_holds_them(monkeypatch: pytest.MonkeyPatch):
    table, cpu, cuda = vectors(), torch.device("cpu"), torch.device("cuda", 0)
    for free, wanted in ((2 * table.nbytes - 1, cpu), (2 * table.nbytes, cuda)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        assert nearest.home(table, cuda) == wanted
    assert nearest.home(table, cpu) == cpu
    assert nearest.home(table.to("meta"), cuda) == torch.device("meta")  # where they went before


def test_embed_may_give_the_same_memory_each_time():
    table, buffer = vectors(), torch.empty(7, D)
    row_of = {passage.id: row for row, passage in enumerate(PASSAGES)}

    def embed(batch: list[Passage]) -> Tensor:
        return buffer[: len(batch)].copy_(table[[row_of[p.id] for p in batch]])

    options = {"fingerprint": "f", "pooling": "mean", "normalize": False, "batch_size": 7}
    assert torch.equal(SequenceIndex.build(PASSAGES, embed, **options).vectors, table)


@needs_faiss
@pytest.mark.parametrize(
    ("factory", "k", "recall"),
    [("IVF4,Flat", 40, 0.8), ("PCA4,IVF4,Flat", 40, 0.4), ("HNSW8", 5, 0.8), ("SQ8", 40, 0.8)],  # by chance: 0.025
)
def test_any_factory_trains_where_it_must_and_finds_k(factory: str, k: int, recall: float, tmp_path: Path):
    built = build(factory=factory)
    built.save(tmp_path / "index")
    for index in (built, SequenceIndex.load(tmp_path / "index", None)):
        assert (tmp_path / "index/index.faiss").is_file() and not isinstance(index.vectors, Tensor)
        scores, passages = index.search(vectors(), k)  # where all are asked for: more than one cell holds
        assert all(len({p.id for p in row}) == k for row in passages)
        assert (scores.diff(dim=1) <= 0).all() and index.factory == factory
        found = index.search(vectors(), k=1)[1]
        assert np.mean([row[0].id == passage.id for row, passage in zip(found, PASSAGES, strict=True)]) > recall


def test_a_saved_index_comes_back(tmp_path: Path):
    index = build(normalize=False)
    index.save(str(tmp_path / "deep" / "index"))
    again = SequenceIndex.load(tmp_path / "deep" / "index", fingerprint="f" * 64)
    assert again.passages == PASSAGES
    for name in ("fingerprint", "pooling", "normalize", "factory", "dim"):
        assert getattr(again, name) == getattr(index, name)
    query = vectors(3)
    assert torch.equal(again.search(query, 5)[0], index.search(query, 5)[0])
    files = ["manifest.json", "passages.parquet", "vectors.safetensors"]
    assert sorted(os.listdir(tmp_path / "deep" / "index")) == files
    assert os.listdir(tmp_path / "deep") == ["index"]
    manifest = json.loads((tmp_path / "deep/index/manifest.json").read_text())
    assert manifest["count"] == 40 and set(manifest["sha256"]) == {"vectors.safetensors", "passages.parquet"}


@needs_faiss
def test_a_flat_index_that_faiss_saved_is_read_as_a_table(tmp_path: Path):
    import faiss

    index = build()
    index.save(tmp_path / "index")
    (tmp_path / "index/vectors.safetensors").unlink()
    flat = faiss.IndexFlatIP(D)
    flat.add(index.vectors.numpy())
    faiss.write_index(flat, str(tmp_path / "index/index.faiss"))
    digest = hashlib.sha256((tmp_path / "index/index.faiss").read_bytes()).hexdigest()
    sha256 = json.loads((tmp_path / "index/manifest.json").read_text())["sha256"]
    sha256 = {"index.faiss": digest, "passages.parquet": sha256["passages.parquet"]}
    _manifest(sha256=sha256)(tmp_path / "index")
    again = SequenceIndex.load(tmp_path / "index", None)
    assert torch.equal(again.vectors, index.vectors) and again.passages == PASSAGES
    again.save(tmp_path / "index")
    assert (tmp_path / "index/vectors.safetensors").is_file() and not (tmp_path / "index/index.faiss").exists()


def test_saving_again_replaces(tmp_path: Path):
    build().save(tmp_path / "index")
    build(passages=PASSAGES[:9]).save(tmp_path / "index")
    assert len(SequenceIndex.load(tmp_path / "index", None)) == 9 and os.listdir(tmp_path) == ["index"]


@pytest.mark.parametrize("broken", ["save_file", "pq.write_table", "json.dumps"])
def test_an_interrupted_save_leaves_the_old_index(broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build().save(tmp_path / "index")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"cosup.index.{broken}", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build(passages=PASSAGES[:9]).save(tmp_path / "index")
    assert len(SequenceIndex.load(tmp_path / "index", None)) == 40 and os.listdir(tmp_path) == ["index"]


def test_save_keeps_off_folders_that_are_no_index(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="folder: wanted a new folder or an index, got .*letter.txt"):
        build().save(tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def _truncate(name: str):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


def _flip(name: str):
    def flip(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return flip


def _manifest(**changes):
    def change(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "no readable manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "wanted format_version 1, got None"),
        (_manifest(format_version=2), "wanted format_version 1, got 2"),
        (_manifest(dim=None), "dim: wanted int, got None"),
        (_manifest(normalize="yes"), "normalize: wanted bool, got 'yes'"),
        (_truncate("vectors.safetensors"), r"vectors.safetensors: damaged or changed: wanted sha256 \w+, got \w+"),
        (_truncate("passages.parquet"), "passages.parquet: damaged"),
        (_flip("vectors.safetensors"), "vectors.safetensors: damaged"),
        (_flip("passages.parquet"), "passages.parquet: damaged"),
        (lambda folder: (folder / "vectors.safetensors").unlink(), "vectors.safetensors: damaged .* got no file"),
        (lambda folder: (folder / "passages.parquet").unlink(), "passages.parquet: damaged .* got no file"),
        (_manifest(count=39), "as many vectors as passages.*39"),
        (_manifest(dim=9), "wanted vectors of 9, got 8"),
        (_manifest(sha256={}), "vectors.safetensors: damaged"),
    ],
)
def test_damage_is_named(damage, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    build().save(tmp_path / "index")
    damage(tmp_path / "index")
    if "damaged" in message:  # a file that is not the one that was saved is not opened
        monkeypatch.setattr("cosup.index.load_file", lambda path: pytest.fail("opened"))
        monkeypatch.setattr(pq, "read_table", lambda path, **options: pytest.fail("opened"))
    with pytest.raises(ValueError, match=message):
        SequenceIndex.load(tmp_path / "index", None)


def test_parts_of_two_indices_do_not_make_one(tmp_path: Path):
    """Checksums that fit, files that do not."""
    build().save(tmp_path / "index")
    build(passages=PASSAGES[:9]).save(tmp_path / "other")
    (tmp_path / "other/passages.parquet").replace(tmp_path / "index/passages.parquet")
    one, other = (json.loads((tmp_path / name / "manifest.json").read_text())["sha256"] for name in ("index", "other"))
    _manifest(sha256=one | {"passages.parquet": other["passages.parquet"]})(tmp_path / "index")
    with pytest.raises(ValueError, match="as many vectors as passages"):
        SequenceIndex.load(tmp_path / "index", None)


def test_an_index_of_another_model_is_refused(tmp_path: Path):
    build().save(tmp_path / "index")
    with pytest.raises(ValueError, match="wanted an index of the model aaaaaaaaaaaa, got one of ffffffffffff"):
        SequenceIndex.load(tmp_path / "index", fingerprint="a" * 64)


def _with_nan(row: int) -> Tensor:
    table = vectors()
    table[row, 3] = torch.nan
    return table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passages": []}, "passages: wanted at least one, got none"),
        ({"passages": [*PASSAGES, PASSAGES[5]]}, "passages: id 'p5' comes twice"),
        ({"table": _with_nan(17)}, "embed: the vector of passage 'p17' is not finite"),
        ({"table": vectors().long()}, r"embed: wanted a float tensor \[rows, D\], got torch.int64"),
        ({"batch_size": 0}, "batch_size: wanted at least 1, got 0"),
    ],
)
def test_bad_corpora(options, message: str):
    with pytest.raises(ValueError, match=message):
        build(**options)


@needs_faiss
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": _with_nan(17), "normalize": False, "factory": "IVF2,Flat"}, "'p17' is not finite"),
        ({"factory": "Flut"}, "factory: wanted a FAISS factory string for 8 dimensions, got 'Flut'"),
        ({"factory": "IVF64,Flat"}, "factory: 'IVF64,Flat' cannot be trained on 40 passages"),
    ],
)
def test_bad_factories(options, message: str):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_embed_must_give_a_vector_for_each_passage_all_of_one_width():
    options = {"fingerprint": "f", "pooling": "mean", "normalize": True, "batch_size": 32}
    with pytest.raises(ValueError, match="embed: wanted 32 vectors for 32 passages, got 1"):
        SequenceIndex.build(PASSAGES, lambda batch: torch.ones(1, D), **options)
    with pytest.raises(ValueError, match="embed: wanted vectors of 32, as before, got 8"):
        SequenceIndex.build(PASSAGES, lambda batch: torch.ones(len(batch), len(batch)), **options)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (vectors(), 41, "k: wanted 1 to 40, the size of the corpus, got 41"),
        (vectors(), 0, "k: wanted 1 to 40"),
        (vectors()[:, :5], 1, r"queries: wanted \[Q, 8\], got \[40, 5\]"),
        (vectors()[0], 1, r"queries: wanted a float tensor \[rows, D\], got torch.float32 \[8\]"),
        (_with_nan(0), 1, "queries: wanted finite"),
    ],
)
def test_bad_queries(queries: Tensor, k: int, message: str):
    with pytest.raises(ValueError, match=message):
        build().search(queries, k)
