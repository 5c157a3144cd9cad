"""`cosup bench gpu`: what a stage does harms no other, what is done is not done again, what is wrong is said first."""

import json
import os
import re
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from cosup import cli, linear_cross_entropy
from cosup.bench import peers
from cosup.bench.gpu import campaign, correct
from cosup.bench.gpu.campaign import STAGES, TUNING, Stage
from cosup.bench.gpu.recorder import Recorder, lines_of

ROOT = Path(__file__).parents[1]


def stage(name, *arguments, limit=30, estimate=0, **options):
    function = re.sub(r"\W.*", "", name)
    return Stage(name, f"gpu_stages.{function}", limit, estimate, arguments, **options)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs stages as on a GPU, whose name and driver are made up; returns whether all is well, and the lines."""
    monkeypatch.setattr(campaign, "gpu", lambda: ("a card", "1.2"))
    monkeypatch.setattr(campaign, "SLOWER", 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    out = tmp_path / "out"

    def started(*stages, options=()):
        monkeypatch.setattr(campaign, "STAGES", (*stages, stage("right", estimate=0)))
        well = campaign.run(["--out", str(out), *map(str, options)])
        return well, lines_of(out / "gpu.jsonl")

    started.file = out / "gpu.jsonl"
    return started


def ends(lines):
    return {line["stage"]: line["end"] for line in lines if "end" in line}


def test_a_stage_harms_no_other(run, capsys):
    well, lines = run(stage("wrong"), stage("raising"), stage("hanging", limit=5), stage("killed"),
                      stage("right.late", estimate=10_000))  # fmt: skip
    assert not well
    assert ends(lines) == {"wrong": "done", "raising": "failed (1)", "hanging": "out of time", "killed": "failed (-9)",
                           "right.late": "no time left", "right": "done"}  # fmt: skip
    said = {(line["stage"], line["name"]): line.get("failed") for line in lines if "name" in line}
    assert "ZeroDivisionError" in said["raising", "one"] and "no driver" in said["raising", "stage"]
    assert said["raising", "two"] is None and ("hanging", "times") in said
    table = capsys.readouterr().out.split("WRONG OR FAILED")[1]
    assert table.index("wrong value: wrong 2") < table.index("raising one: failed") < table.index("right speed: ms 1")
    assert "right times" not in table  # what is right is counted, not listed


def test_wrong_lines_alone_fail_a_campaign(run):
    assert run(stage("right.again"))[0]
    assert not run(stage("wrong"))[0]
    assert run(stage("right.late", estimate=10_000))[0]  # no time is no failure


def test_stages_of_times_run_alone_and_the_others_side_by_side(run):
    """Where two may run, the third could begin when the first has ended."""
    _, lines = run(stage("right.a", 4.0, alone=False), stage("right.b", 8.0, alone=False), stage("right.c", 0.5))
    spans = {line["stage"]: (line["began"], line["ended"]) for line in lines if line.get("name") == "times"}
    a, b, c = (spans[f"right.{name}"] for name in "abc")
    assert max(a[0], b[0]) < min(a[1], b[1]) and c[0] > max(a[1], b[1]) and spans["right"][0] > c[1]


def test_what_is_done_is_not_done_again(run, monkeypatch, capsys):
    stages = stage("right.peer", packages=("liger-kernel",)), stage("hanging", limit=1)

    def begun(*stages, options=("--resume", run.file)):
        lines = run(*stages, options=options)[1]
        return re.findall(r"^== (\S+),", capsys.readouterr().out, re.MULTILINE), lines

    def of_right(lines):
        return [line for line in lines if line["stage"].startswith("right")]

    names, first = begun(*stages, options=())
    assert names == ["right.peer", "hanging", "right"]
    names, second = begun(*stages)
    assert names == ["hanging"] and ends(second)["hanging"] == "out of time" and of_right(second) == of_right(first)
    same = campaign.identity(("a card", "1.2"))
    monkeypatch.setattr(campaign, "identity", lambda card: same)
    monkeypatch.setattr(campaign, "version", lambda name: "9.9")  # of Liger, that is
    assert begun(*stages[:1])[0] == ["right.peer"]
    monkeypatch.setattr(campaign, "identity", lambda card: {"sources": "others"})
    assert begun(*stages[:1])[0] == ["right.peer", "right"]


def test_the_identity_is_of_device_driver_versions_and_sources(monkeypatch, tmp_path):
    base = campaign.identity(("a card", "1.2"))
    assert base["device"] == "a card" and base["driver"] == "1.2"
    assert set(base) == {"device", "driver", "python", "torch", "triton", "transformers", "sources"}
    for name in ("cosup", "cosup.kernels", "cosup.bench"):  # a changed file anywhere is another tree
        module, copy = import_module(name), tmp_path / name
        copy.mkdir()
        (copy / "a.py").write_text("1")
        with monkeypatch.context() as patched:
            patched.setattr(module, "__path__", [str(copy)])
            one = campaign.sources()
            (copy / "a.py").write_text("2")
            assert campaign.sources() != one


@pytest.mark.parametrize("options, message", [
    ("--only nothing", "--only: wanted some of machine"), ("--minutes 0", "--minutes: wanted more than 0, got 0.0"),
    ("--resume nowhere", "--resume: wanted a file, got nowhere"),
])  # fmt: skip
def test_bad_options(options, message, tmp_path):
    result = CliRunner().invoke(cli.app, ["bench", "gpu", *options.split(), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and message in result.output and not (tmp_path / "out").exists()


def test_the_stages():
    """Each is a function; correctness before speed; what takes the CUDA context down last."""
    names = [stage.name for stage in (*STAGES, *TUNING)]
    assert len(set(names)) == len(names) and not [name for name in names if " " in name]
    for each in (*STAGES, *TUNING):
        module, _, name = each.function.rpartition(".")
        assert callable(getattr(import_module(module), name)) and each.estimate < each.limit
    right = [stage.name.startswith(("machine", "ahead", "correct")) for stage in STAGES[:-2]]
    assert right == sorted(right, reverse=True)
    assert [stage.name for stage in STAGES[-2:]] == ["correct.sanitizer", "bad-target"]


def test_nothing_that_is_imported_before_the_fork_starts_cuda():
    call = """
import torch
def started(*a, **k): raise SystemExit("CUDA was asked for")
for name in ("is_available", "device_count", "get_device_properties", "get_device_capability", "current_device"):
    setattr(torch.cuda, name, started)
import cosup.bench.gpu.preload
"""
    subprocess.run([sys.executable, "-c", call], check=True)


class Wrong(torch.autograd.Function):
    """The identity, 3 % of whose gradient is missing."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 0.97 * grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_gradient_is_said(dtype, tmp_path, monkeypatch):
    """Of a loss whose value is right; and one that is right in all is not blamed."""

    def wrong(x, w, t, **options):
        return linear_cross_entropy(Wrong.apply(x), w, t, **options)

    cases = {"wrong": (wrong, peers.plain), "right": (linear_cross_entropy, peers.plain)}
    monkeypatch.setattr(correct, "features", lambda *_: cases)
    file = tmp_path / "gpu.jsonl"
    correct.losses(Recorder("correct", file, time.monotonic() + 60, True), dtype, "slabs")
    said = {line["name"].split(",")[0]: line["wrong"] for line in lines_of(file)}
    assert said == {"wrong": 1, "right": 0}


def test_a_stage_ends_with_its_campaign(tmp_path):
    call = f"""
from cosup.bench.gpu import campaign
campaign.gpu = lambda: ("a card", "1.2")
campaign.STAGES = (campaign.Stage("hanging", "gpu_stages.hanging", 60, 0),)
campaign.run(["--out", {str(tmp_path)!r}])
"""
    started = subprocess.Popen([sys.executable, "-c", call], cwd=ROOT / "tests", stdout=subprocess.DEVNULL)
    file = tmp_path / "gpu.jsonl"
    while started.poll() is None and (not file.exists() or len(lines_of(file)) < 2):
        time.sleep(0.05)
    processes = psutil.Process(started.pid).children(recursive=True)
    started.kill()
    started.wait()
    assert processes and not psutil.wait_procs(processes, timeout=20)[1]


QUICK = ("machine", "correct.ranks", "correct.devices", "losses.few-rows", "ignored", "bad-target")


@pytest.mark.release
def test_a_killed_campaign_is_finished_by_a_second_call(tmp_path):
    """By the script for a bare machine, in a copy of the packages, without a GPU."""
    out = tmp_path / "out"
    environment = os.environ | {"OUT": str(out), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "bench/gpu.sh"), "--minutes", "5", "--only", *QUICK]
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    file = out / "gpu.jsonl"
    while first.poll() is None and (not file.exists() or len(ends(lines_of(file))) < 2):
        time.sleep(0.05)
    started = psutil.Process(first.pid).children(recursive=True)
    next(process for process in started if "cosup.bench.gpu" in process.cmdline()).kill()
    first.wait()
    half = lines_of(file)
    assert 2 <= len(ends(half)) < len(QUICK)
    kept = tmp_path / "half.jsonl"
    kept.write_text(file.read_text())
    found = subprocess.run([*command, "--resume", str(kept)], env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-3000:]
    whole = lines_of(file)
    assert ends(whole) == dict.fromkeys(QUICK, "done")
    assert {json.dumps(line) for line in half if "end" in line} <= {json.dumps(line) for line in whole}
    assert "target must be in" in found.stdout and sorted(p.name for p in out.iterdir()) == ["gpu.jsonl", "gpu.log"]
    assert not any(f"== {name}," in found.stdout for name in ends(half))
