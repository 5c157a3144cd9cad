"""The command, from a user's own JSONL and model folders to an answer; and what it says of mistakes."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from cosup import cli, doctor, linear_cross_entropy, plan_for, walk
from cosup.data import write_jsonl
from cosup.kernels import native
from tiny import tiny_encoder, tiny_folder, tiny_gen, tiny_instances, tiny_passages, tiny_tokenizer


def run(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture
def command(monkeypatch, capfd):
    """The command as a shell starts it: its exit code, what it wrote, what it said of errors."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["cosup", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, *capfd.readouterr()

    return run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """JSONL of passages and instances, and a Gen and a Ctx of other family and width."""
    folder = tmp_path_factory.mktemp("user")
    write_jsonl(folder / "passages.jsonl", tiny_passages(24).values())
    write_jsonl(folder / "instances.jsonl", tiny_instances(24))
    tiny_folder(folder / "gen", tiny_gen(), tiny_tokenizer())
    tiny_folder(folder / "ctx", tiny_encoder(), tiny_tokenizer())
    return folder


def test_train_index_generate(files):
    pair, passages, instances = files / "pair", files / "passages.jsonl", files / "instances.jsonl"
    run("train", "--gen", files / "gen", "--ctx", files / "ctx", "--instances", instances, "--passages", passages,
        "--output_dir", pair, "--max_steps", 2, "--per_device_train_batch_size", 4, "--report_to", "none", "--use_cpu",
        "true", "--eval_instances", instances)  # fmt: skip
    assert "24 passages" in run("index", pair, passages, files / "index")
    question = "What of [b]this[/b] [/path] and [Ret]?"  # no markup of ours
    assert question in run("generate", pair, files / "index", question, "--max-new-tokens", 4)
    line = json.loads(run("generate", pair, files / "index", question, "--max-new-tokens", 4, "--json"))
    assert line["input"] == question


def test_eval(files):
    pytest.importorskip("bm25s")
    pair, passages, instances = files / "gen", files / "passages.jsonl", files / "instances.jsonl"
    assert "R@1" in run("eval", pair, instances, passages, "--answers", 2, "--out", files / "eval")
    assert json.loads((files / "eval/report.json").read_text())["instances"] == 24
    assert (files / "eval/retrieval.png").stat().st_size > 1000


def test_an_untrained_pair_is_told(files):
    output = run("index", files / "gen", files / "passages.jsonl", files / "fresh")
    assert "is no saved pair: a fresh one is made of it, which has not learned to retrieve" in output


def test_every_field_of_training_is_explained():
    output = run("train", "--fields")
    assert all(f"--{name}" in output for name in ("gen", "passages", "pooling", "nsp_weight", "max_passage_length"))


def test_doctor_names_the_paths():
    output = run("doctor")
    assert "torch" in output and ("native" in output or "PyTorch path" in output)


def test_doctor_says_the_same_as_one_json_object(command):
    code, out, _ = command("doctor", "--json")
    assert code == 0
    said = json.loads(out)  # nothing else is on stdout
    assert said == {f.name: {"state": f.state, "advice": f.advice} for f in doctor.examine()}
    assert set(said) == {
        "cosup", "python", *doctor.PACKAGES, "CPU kernels", "GPU", "GPU kernels", "workspace",
        "flash-attn-4", "flash-attn", "faiss-cpu", "bm25s", "gguf",
    }  # fmt: skip


def test_plan_says_the_same_as_one_json_object():
    arguments = ["plan", "8192", "4096", "128256", "--dtype", "bfloat16", "--device", "cuda", "--free", "79GiB"]
    found = json.loads(CliRunner().invoke(cli.app, [*arguments, "--json"]).stdout)
    assert found == plan_for(8192, 4096, 128256, free_bytes=79 << 30)._asdict()
    assert {"strategy", "block_rows", "block_cols", "holds_all_logits", "workspace_bytes", "bytes_moved", "launches",
            "time_over_products"} <= set(found)  # fmt: skip
    table = CliRunner().invoke(cli.app, arguments).stdout
    assert "gradients in forward, in tiles of 8,192 x 128,256, all logits at once" in table and "725 TFLOP/s" in table
    more = ["--loss", "info_nce", "--symmetric", "--workspace", "2GiB", "--reduction", "none", "--frozen", "weight"]
    found = json.loads(CliRunner().invoke(cli.app, ["plan", "4096", "64", "8192", *more, "--json"]).stdout)
    options = {"loss": "info_nce", "symmetric": True, "reduction": "none", "frozen": "weight"}
    assert found == plan_for(4096, 64, 8192, workspace_bytes=2 << 30, **options)._asdict()


@pytest.mark.parametrize("text, size", [("79GiB", 79 << 30), ("1.5MiB", 3 << 19), ("2 KiB", 2048), ("1048576", 2**20)])
def test_sizes(text, size):
    assert cli._size("--free", text) == size


@pytest.mark.parametrize("text", ["8GB", "GiB", "1.2.3GiB", "", "-1GiB", "9" * 400])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="--free must be a size as 79GiB"):
        cli._size("--free", text)


def test_a_mistake_is_one_line(files, command):
    data = ["--instances", files / "instances.jsonl", "--passages", files / "passages.jsonl"]
    code, out, errors = command("train", "--gen", "./nowhere/[a]", *data)
    assert code == 1
    assert errors.splitlines()[-1] == "error: gen: there is no folder './nowhere/[a]'"
    assert "Traceback" not in out + errors


def test_another_run_is_not_taken_up_unasked(files):
    (files / "old/checkpoint-4").mkdir(parents=True)
    arguments = ["train", "--gen", "x", "--instances", "x", "--passages", "x", "--output_dir", str(files / "old")]
    result = CliRunner().invoke(cli.app, arguments)
    assert "holds checkpoints; add --resume" in str(result.exception)


@pytest.mark.parametrize("left", [[], ["checkpoint-1"], [".checkpoint-1.abcdefgh.part/checkpoint-1"]])
def test_a_run_resumed_before_its_first_checkpoint_begins(left, files, tmp_path):
    """A job that is queued again says --resume always; it may have been killed while the first one was written."""
    out = tmp_path / "out"
    for folder in left:
        (out / folder).mkdir(parents=True)
    arguments = ["train", "--gen", files / "gen", "--instances", files / "instances.jsonl", "--passages"]
    arguments += [files / "passages.jsonl", "--output_dir", out, "--max_steps", 2, "--save_steps", 1, "--use_cpu", "1"]
    run(*arguments, "--resume")
    assert sorted(path.name for path in out.glob("*") if "checkpoint" in path.name) == ["checkpoint-1", "checkpoint-2"]
    run(*arguments, "--resume")
    assert json.loads((out / "checkpoint-2/trainer_state.json").read_text())["global_step"] == 2


@pytest.mark.parametrize("mistake", ["config", "text", "bytes", "offline", "package"])
def test_what_the_user_can_mend_is_one_line(mistake, files, command, monkeypatch, tmp_path):
    path = tmp_path / "file"
    path.write_bytes({"config": b"a: [1,\n b", "bytes": b"\x80"}.get(mistake, b"text \x80"))
    train = ["train", "--gen", files / "gen", "--instances", files / "instances.jsonl", "--passages"]
    train += [files / "passages.jsonl", "--output_dir", tmp_path / "out", "--use_cpu", "true"]
    if mistake in ("config", "bytes"):
        code, out, errors = command(*train, "--config", path)
    elif mistake == "text":
        code, out, errors = command("bench", "hidden-states", files / "gen", path, tmp_path / "x.safetensors")
    elif mistake == "package":
        code, out, errors = command(*train, "--deepspeed", path)
    else:
        offline = type("ConnectError", (Exception,), {"__module__": "httpx2"})("no network, " + str(path))
        monkeypatch.setattr("cosup.model.GenCtxModel.from_pretrained", lambda *_, **__: (_ for _ in ()).throw(offline))
        code, out, errors = command("index", files / "gen", files / "passages.jsonl", tmp_path / "x")
    assert code == 1 and "Traceback" not in out + errors and "error: " in errors
    assert mistake == "package" or str(path) in errors


@pytest.mark.parametrize("capability, runs", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_too_old_for_triton_takes_the_pytorch_path(capability, runs, monkeypatch):
    """An x that says it is on a GPU; no kernel is launched."""
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    assert walk.resolve("auto", x) == ("triton" if runs else "reference")
    walk._warn_slow.cache_clear()
    if runs:
        assert walk.resolve("fused", x) == "fused"
        assert doctor._triton() == doctor.Finding("GPU kernels", "Triton")
        return
    for backend in ("triton", "fused"):
        with pytest.raises(ValueError, match=f"'{backend}' does not run on cuda below compute capability 8.0 with"):
            walk.resolve(backend, x)
    with pytest.warns(UserWarning, match="slower PyTorch path.*cosup doctor"):
        walk.tile_kernels("reference", x)
    said = "PyTorch path: Triton needs compute capability 8.0, this GPU has 7.5"
    assert doctor._triton() == doctor.Finding("GPU kernels", said)


def test_without_native_kernels_one_warning_and_the_same_loss(monkeypatch):
    x, w, target = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    want = linear_cross_entropy(x, w, target)
    monkeypatch.setattr(native, "AVAILABLE", ())
    walk._warn_slow.cache_clear()
    with pytest.warns(UserWarning, match="slower PyTorch path.*cosup doctor"):
        torch.testing.assert_close(linear_cross_entropy(x, w, target), want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_cross_entropy(x, w, target)
