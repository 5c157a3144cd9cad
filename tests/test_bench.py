"""The benchmarks, end to end at tiny shapes: a result for every method, whatever it does. No times are compared."""

import json
import os
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from typer.testing import CliRunner

from cosup import cli, linear_cross_entropy
from cosup.bench import hidden_states, measure, patched_model, peers, report, suite
from cosup.bench.suite import Subject
from tiny import tiny_folder, tiny_gen, tiny_tokenizer

SHAPE = ["--shape", "24", "8", "60", "--rounds", "2"]
TIMES = ("seconds", "forward_seconds")
ALL_PEERS = peers.PEERS
ERRORS = ("dx_error", "dw_error", "dw_row_error")


def run(*arguments):
    result = CliRunner().invoke(cli.app, ["bench", *(str(argument) for argument in arguments)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # peers for CUDA then count as absent
    few = ("plain", "CCE exact")
    monkeypatch.setattr(peers, "PEERS", {name: peers.PEERS[name] for name in few})
    return tmp_path / "results"


def problems(results):
    (path,) = results.glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text())["problems"]


def rows_of(problem):
    return {row["method"]: row for row in problem["rows"]}


@pytest.mark.parametrize("command, message", [
    ("linear_cross_entropy --shape 0 8 8", "--shape: wanted an integer of at least 1, got '0'"),
    ("linear_cross_entropy --shape -1 8 8", "--shape"),
    ("linear_cross_entropy --rounds 0", "--rounds: wanted an integer of at least 1, got '0'"),
    ("info_nce --shape 8 4 8", "--shape: wanted at least as many candidates as queries, got [8, 4, 8]"),
    ("info_nce --dtype int8", "--dtype: invalid choice: 'int8'"),
    ("large-pool --shape 8 4 8", "--shape: wanted at least as many candidates as queries, got [8, 4, 8]"),
    ("ranks --rows 8 4 8", "--rows: wanted at least as many candidates as queries, got [8, 4, 8]"),
    ("patched-model --width 7", "--width: wanted a multiple of 64, got 7"),
])  # fmt: skip
def test_bad_options_are_refused_and_no_results_written(command, message, results):
    result = CliRunner().invoke(cli.app, ["bench", *command.split()])
    assert result.exit_code == 2 and message in result.output
    assert not results.exists()


def test_every_method_of_linear_cross_entropy_has_time_memory_and_error(results, monkeypatch):
    slow = "torch.compile"
    monkeypatch.setattr(peers, "PEERS", {name: peer for name, peer in ALL_PEERS.items() if name != slow})
    output = run("linear_cross_entropy", *SHAPE, "--shape", 7, 4, 33)
    first, second = problems(results)
    assert [problem["size"][k] for problem in (first, second) for k in "NDV"] == [24, 8, 60, 7, 4, 33]
    rows = rows_of(first)
    chunked = ["torch chunked"] if hasattr(F, "linear_cross_entropy") else []  # from torch 2.13 on
    assert {"three torch.mm", "three GEMMs", "cosup", "plain", *chunked} <= set(rows)
    assert chunked or first["absent"]["torch chunked"] == "not installed (torch >= 2.13 has it)"
    for name, row in rows.items():
        assert row["failed"] is None and row["peak_bytes"] > 0 and row["ratio"] > 0 and name in output
        assert row["flop_per_second"] == pytest.approx(6 * 24 * 8 * 60 / min(row["seconds"]))
        for times in TIMES if name in peers.PEERS or name == "cosup" else ["seconds"]:
            assert len(row[times]) == 2
    for name in ("cosup", "plain", *chunked):
        assert all(0 <= rows[name][error] < 1e-5 for error in ERRORS)


def test_every_method_of_info_nce_has_time_memory_and_error(results):
    run("info_nce", "--shape", 12, 20, 8, "--rounds", 1)
    (problem,) = problems(results)
    for row in (rows_of(problem)[name] for name in ("cosup", "plain")):
        assert row["peak_bytes"] > 0 and all(len(row[times]) == 1 for times in TIMES)
        assert all(row[error] < 1e-5 for error in ERRORS)
    assert problem["absent"]["sentence-transformers"] == "takes one candidate to a query"


def test_the_peers_of_symmetric_info_nce_compute_the_same(results):
    run("info_nce", "--shape", 12, 12, 8, "--rounds", 1, "--symmetric")
    (problem,) = problems(results)
    others = {"sentence-transformers", "the same, cached", "open_clip"} - set(problem["absent"])
    assert others and problem["size"]["symmetric"]
    for name in others | {"cosup"}:
        row = rows_of(problem)[name]
        assert not row["failed"] and all(row[error] < 1e-5 for error in ERRORS), name


def test_ignored_labels_are_timed_beside_none_ignored(results):
    output = run("linear_cross_entropy", *SHAPE, "--ignored", 0.75)
    row = rows_of(problems(results)[0])["cosup"]
    assert len(row["dense_seconds"]) == 2 and row["dense_ratio"] > 0 and "none ignored" in output
    assert all(row[error] < 1e-5 for error in ERRORS)


def test_an_absent_peer_is_skipped_with_the_reason(results, monkeypatch):
    def missing():
        raise ImportError("no package 'elsewhere'")

    monkeypatch.setitem(peers.PEERS, "elsewhere", peers.Peer(missing))
    output = run("linear_cross_entropy", *SHAPE)
    (problem,) = problems(results)
    assert "elsewhere" not in rows_of(problem) and "elsewhere: skipped: not installed (no package" in output
    assert problem["absent"]["CCE exact"] == "needs CUDA"


@pytest.mark.parametrize("when", ["imported", "first called", "called again", "its memory is gone"])
def test_a_peer_that_raises_is_recorded_and_the_others_go_on(results, monkeypatch, when):
    calls = []

    def make():
        if when == "imported":
            raise RuntimeError("no [b]driver[/b]")
        return loss

    def loss(x, w, target):
        calls.append(1)
        if when == "its memory is gone":
            raise torch.OutOfMemoryError
        if when == "first called" or len(calls) > 3:
            raise RuntimeError("no [b]driver[/b]")
        return peers.plain(x, w, target)

    monkeypatch.setitem(peers.PEERS, "broken", peers.Peer(make))
    output = run("linear_cross_entropy", *SHAPE)
    rows = rows_of(problems(results)[0])
    said = "out of memory" if when == "its memory is gone" else "RuntimeError: no [b]driver[/b]"
    assert rows["broken"]["failed"] == said and f"broken: failed: {said}" in output
    assert all(row["failed"] is None for name, row in rows.items() if name != "broken")


def test_a_measurement_ends_with_its_time():
    """The first round is finished; a method that is not yet begun says so."""
    x, w = torch.randn(20, 8).requires_grad_(), torch.randn(30, 8).requires_grad_()
    problem = measure.Problem(x, w, torch.randint(30, (20,)), peers.plain)

    def ending(x, w, target):
        now[0] = 10.0
        return peers.plain(x, w, target)

    now = [0.0]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(measure.time, "monotonic", lambda: now[0])
        losses = {"in time": peers.plain, "the last": ending, "late": peers.plain}
        rows = {row["method"]: row for row in measure.measure(problem, {}, losses, 3, until=5.0)}
    assert rows["late"]["failed"] == "TimeoutError: no time left" and not rows["late"]["seconds"]
    assert [len(rows[name]["seconds"]) for name in ("in time", "the last")] == [1, 1]


def test_the_error_column_shows_a_wrong_gradient():
    class Wrong(torch.autograd.Function):
        """The identity; 1 % of each entry is missing from its gradient, or its small entries are."""

        @staticmethod
        def forward(ctx, z, drop_below):
            ctx.drop_below = drop_below
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            return (0.99 * grad if ctx.drop_below is None else grad.where(grad.abs() >= ctx.drop_below, 0)), None

    def wrong(drop_below):
        return lambda x, w, target: F.cross_entropy(Wrong.apply(x @ w.mT, drop_below), target)

    x, w = torch.randn(20, 8).requires_grad_(), torch.randn(3000, 8).mul(1e-3).requires_grad_()
    problem = measure.Problem(x, w, torch.randint(10, (20,)), peers.plain)
    losses = {"cosup": linear_cross_entropy, "share": wrong(None), "dropped": wrong(1e-3)}
    rows = {row["method"]: row for row in measure.measure(problem, {}, losses, 1)}
    assert all(rows["cosup"][error] < 1e-5 for error in ERRORS)
    assert all(rows["share"][error] == pytest.approx(0.01, rel=1e-3) for error in ERRORS)
    assert rows["dropped"]["dw_row_error"] > 0.99  # nearly all rows of w get nothing, which dw_error hides
    assert 1e-4 < rows["dropped"]["dw_error"] < 0.1


def test_hidden_states_of_a_model_are_what_it_computes_its_loss_from(results, tmp_path):
    gen, tokenizer = tiny_gen(), tiny_tokenizer()
    folder = tiny_folder(tmp_path / "gen", gen, tokenizer)
    text = "The hat number 1 is red. It stands alone. " * 5
    (tmp_path / "text.txt").write_text(text)
    file = tmp_path / "made" / "states.safetensors"
    assert "40 tokens" in run("hidden-states", folder, tmp_path / "text.txt", file, "--tokens", 40)
    held = load_file(file)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:41])
    with torch.no_grad():
        want = gen(ids[None], labels=ids[None]).loss
    torch.testing.assert_close(linear_cross_entropy(held["x"], held["w"], held["target"]), want)

    run("linear_cross_entropy", "--hidden-states", file, "--rounds", 1)
    (problem,) = problems(results)
    assert [problem["size"][k] for k in "NDV"] == [40, 32, 300] and problem["size"]["operands"] == file.name
    assert all(rows_of(problem)["cosup"][error] < 1e-4 for error in ERRORS)


def test_a_file_without_operands_is_refused(tmp_path):
    torch.save({"x": torch.ones(3, 2), "w": torch.ones(5, 4), "target": torch.zeros(3).long()}, tmp_path / "a.pt")
    torch.save({"x": torch.ones(3, 2)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"want x \[N, D\].*got \[3, 2\], \[5, 4\]"):
        hidden_states.read(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="got none named 'w'"):
        hidden_states.read(tmp_path / "b.pt")


# ---- scripts over whole machines


def test_a_step_over_ranks_is_set_beside_its_model(results):
    output = run("ranks", "--ranks", 1, 2, "--rows", 16, 32, 8, "--rounds", 1)
    one, two = problems(results)
    assert [problem["size"]["ranks"] for problem in (one, two)] == [1, 2] and "model ms" in output
    assert [row["method"] for row in one["rows"] + two["rows"]] == ["all_gather", "all_gather", "ring"]
    for row in one["rows"] + two["rows"]:
        assert row["step_seconds"][0] > 0 and row["model_seconds"] > 0 and row["step_bytes"] > 0


def test_a_patched_model_takes_the_same_steps(results):
    output = run("patched-model", "--vocabulary", 300, "--batch", 2, 8, "--layers", 1, "--width", 64, "--steps", 2)
    (problem,) = problems(results)
    plain, patched = problem["rows"]
    assert patched["loss"] == pytest.approx(plain["loss"], rel=1e-5) and len(plain["step_seconds"]) == 2
    assert patched["plain_ratio"] == pytest.approx(min(patched["step_seconds"]) / min(plain["step_seconds"]))
    assert all(0 < row["step_bytes"] < row["resident_bytes"] for row in (plain, patched)) and "resident MB" in output


def test_a_model_whose_process_ends_is_a_row(results, tmp_path, monkeypatch):
    (tmp_path / "ends.py").write_text("raise MemoryError")
    monkeypatch.setattr(patched_model, "__file__", str(tmp_path / "ends.py"))  # what its processes run
    run("patched-model", "--batch", 2, 8)
    assert [row["failed"] for row in problems(results)[0]["rows"]] == ["its process ended in step 1"] * 2


def test_a_large_pool_says_what_the_process_held(results):
    run("large-pool", "--shape", 8, 64, 16)
    (row,) = problems(results)[0]["rows"]
    assert row["seconds"][0] > 0 and row["resident_bytes"] > 1e7


# ---- everything


def killed_or_measured(command, arguments, out, measured=suite._measure):
    if command == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return measured(command, arguments, out)


def test_everything_goes_on_where_a_subject_fails(tmp_path, monkeypatch):
    """Each in a process of its own: one is ended from outside, one too large, one called wrongly, one right."""
    monkeypatch.setattr(suite, "_measure", killed_or_measured)
    monkeypatch.setattr(suite, "subjects", lambda: [
        Subject("killed", "killed", "", ""),
        Subject("too large", "large-pool", "", "--shape 8 10000000000000 16"),
        Subject("wrong", "large-pool", "", "--shape 8 many 16"),
        Subject("right", "large-pool", "--shape 8 64 16", "--shape 8 128 16", cpu_only=True),
    ])  # fmt: skip
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, ["bench", "--full", "--out", str(out)])
    assert result.exit_code == 1, result.output
    lines = (out / "report.md").read_text().splitlines()
    state = {line.split(" | ")[0].strip("| "): line.split(" | ")[1] for line in lines if " | " in line}
    assert state["killed"].startswith("failed: BrokenProcessPool")
    assert state["too large"].startswith("failed: RuntimeError: ") and "memory" in state["too large"]
    assert state["wrong"].startswith("failed: ValueError: wrong arguments: --shape 8 many 16")
    assert state["right"].endswith(" s |")
    text = "\n".join(lines)
    assert f"`cosup bench --full --out {out}`" in text and torch.__version__.split("+")[0] in text
    assert "`cosup bench large-pool --shape 8 128 16`" in lines and "![right](large_pool_cpu.png)" in lines
    (problem,) = problems(out)
    assert problem["size"]["M"] == 128
    assert f"| cosup | {1e3 * problem['rows'][0]['seconds'][0]:.1f} | " in "\n".join(lines)


@pytest.mark.parametrize("full, pool", [(False, 64), (True, 128)])
def test_everything_in_its_quick_or_published_shapes(full, pool, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "subjects", lambda: [Subject("a", "large-pool", "--shape 8 64 16", "--shape 8 128 16")])
    run(*["--full"] * full, "--out", tmp_path)
    assert problems(tmp_path)[0]["size"]["M"] == pool


def test_a_row_of_ours_that_failed_fails_its_subject_and_a_peers_does_not():
    def problem(**failed):
        return {"rows": [{"method": name, "failed": why} for name, why in failed.items()]}

    assert suite._failure({"problems": [problem(cosup=None, plain="out of memory")]}) is None
    assert suite._failure({"problems": [problem(cosup=None), problem(cosup="no", plain=None)]}) == "cosup: no"


def test_every_subject_is_a_command_and_quick_shapes_follow_the_threads(monkeypatch):
    names = {command.name for command in cli.bench.registered_commands}
    assert {subject.command for subject in suite.subjects()} <= names
    for threads in (1, 2, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        rows = [int(subject.quick.split()[1]) for subject in suite.subjects()[:4]]
        assert rows[0] == min(512 * threads, 2048) and rows[2] == min(2048 * threads, 8192)


def test_full_beside_a_command_is_refused():
    result = CliRunner().invoke(cli.app, ["bench", "--full", "ranks"])
    assert "--full: wanted without a command, got ranks" in str(result.exception)


def test_the_rounds_that_count():
    """Of a CPU the quickest, of a GPU the median; of the bare products the quicker ones."""
    rounds = {"mm": [2.0, 3.0, 9.0], "gemm": [1.0, 4.0, 5.0], "cosup": [6.0, 1.0, 12.0]}
    rows = [{"method": name, "peak_bytes": 9, "seconds": s, "host_seconds": [0.1]} for name, s in rounds.items()]
    found = {}
    for place in ("cuda", "cpu"):
        summed = report.summarise([row.copy() for row in rows], size={}, products=("mm", "gemm"), flop=12,
                                  gradient_bytes=1, stated_bytes=1, absent={})  # fmt: skip
        found[place] = [(row["ratio"], row["flop_per_second"]) for row in summed["rows"]]
        rows = [{key: value for key, value in row.items() if key != "host_seconds"} for row in rows]
    assert found == {"cuda": [(1, 4), (4 / 3, 3), (2, 2)], "cpu": [(2, 6), (1, 12), (1, 12)]}


def test_a_report_names_absent_peers_and_leaves_out_empty_columns():
    row = {"method": "cosup", "failed": None, "seconds": [0.5], "workspace_bytes": 2e6}
    run = {"title": "t", "problems": [{"size": {"N": 3}, "rows": [row], "absent": {"elsewhere": "not installed"}}]}
    section = suite._section(Subject("t", "info_nce", "", ""), ["--shape", "3"], run)
    assert "| method | fwd+bwd ms | spread | workspace MB |\n" in section
    assert "elsewhere: skipped: not installed" in section
