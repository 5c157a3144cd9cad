"""CoSupTrainer in two processes does what one does with the batches of both."""

import functools
import subprocess
import sys

import pytest
import ranks
import torch
import train_ranks

pytestmark = pytest.mark.usefixtures("one_thread")
WORLD = 2
NSP, QUERIES = 2, 4  # of a row


@pytest.fixture(scope="module")
def started():
    """Processes for all runs; others where one has failed."""
    held = []

    def start():
        if not held or not held[-1].is_alive:
            held.append(ranks.Started(WORLD))
        return held[-1]

    yield start
    for processes in held:
        processes.end()


@pytest.fixture
def several(started, tmp_path):
    """What a run gave, rank by rank."""

    def run(name):
        started().run(train_ranks.save, name, tmp_path)
        return results(name, tmp_path)

    return run


def results(name, folder):
    return [torch.load(folder / f"{name}.{rank}", weights_only=False) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What a run gave in one process; made once."""
    return functools.cache(lambda name: train_ranks.RUNS[name](tmp_path_factory.mktemp("alone"), 1))


def assert_same(several, alone):
    """In float64, but for Llama's norm, which is in float32 and so rounds by the shape of the batch."""
    for result in several:
        rows, wanted = (torch.tensor(part["rows"], dtype=torch.float64) for part in (result, alone))
        torch.testing.assert_close(rows, wanted, rtol=1e-6, atol=0)
        assert result["train_loss"] == pytest.approx(alone["train_loss"], rel=1e-6)
        for part, moved in alone["moved"].items():
            assert (result["moved"][part] - moved).norm() <= 1e-6 * moved.norm() + 1e-8, part


def test_the_loss_over_ranks_is_that_of_all_rows(several, alone):
    """Each rank has the loss, and the gradients of its rows; those of the head are summed."""
    wanted, (*of_rows, of_head), counts = alone("loss")
    found = several("loss")
    for losses, _, _ in found:
        torch.testing.assert_close(losses, wanted)
    for gradients, want in zip(zip(*(grads[:3] for _, grads, _ in found), strict=True), of_rows, strict=True):
        torch.testing.assert_close(torch.cat(gradients), want)
    torch.testing.assert_close(sum(grads[3] for _, grads, _ in found), of_head)
    assert [sum(ours) for ours in zip(*(here for _, _, here in found), strict=True)] == counts


@pytest.mark.parametrize("name", ["joint", "nsp", "ntp", "paper", "accumulated"])
@pytest.mark.filterwarnings("ignore:negatives do not accumulate")
def test_a_step_of_several_is_the_step_of_one(name, several, alone):
    """Weights, losses, hits, queries and tokens; ranks differ in all their numbers."""
    whole = alone(name)
    assert_same(several(name), whole)
    trained = {part for part, moved in whole["moved"].items() if moved.norm() > 1e-3}
    assert trained == ({"gen"} if name == "ntp" else {"gen", "ctx", "projection", "log_temperature"})


@pytest.mark.release
def test_as_users_start_it(alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    subprocess.run([*command, train_ranks.__file__, str(tmp_path), "joint"], check=True, timeout=150)
    assert_same(results("joint", tmp_path), alone("joint"))


def test_a_rank_without_a_query_takes_part(several, alone):
    whole = alone("idle")
    assert [row[QUERIES] for row in whole["rows"]] == [6, 6, 0]
    assert_same(several("idle"), whole)


@pytest.mark.parametrize("name", ["packed", "packed idle", "sharded packed"])
def test_packed_rows_of_each_rank_take_the_steps_of_unpacked(name, several, alone):
    assert_same(several(name), alone("idle" if "idle" in name else "joint"))


@pytest.mark.parametrize("name", ["cached", "cached idle", "cached accumulated"])
@pytest.mark.filterwarnings("ignore:negatives do not accumulate")
def test_micro_batches_on_each_rank_give_the_gradients_of_the_whole(name, several, alone):
    without = {"cached": "joint", "cached idle": "idle", "cached accumulated": "accumulated"}[name]
    assert_same(several(name), alone(without))


@pytest.mark.parametrize("name", ["further", "cached further"])
def test_further_candidates_count_once(name, several, alone):
    """Queue and extra passages: each vector once among all ranks, positives that come again left out."""
    whole = alone("further")
    found = several(name)
    assert_same(found, whole)
    for result in found:
        torch.testing.assert_close(result["queue"], whole["queue"])
        assert len(result["queue"][1]) == 13


def test_further_candidates_are_shared_out(several):
    """Each by one rank where all ranks see it; where a query sees its own rank's only, all of the queue by each."""
    here, there = several("given exact")
    assert (here["queue"], there["queue"]) == ({-1, -3, -5}, {-2, -4, -6})
    assert (len(here["extra"]), len(there["extra"])) == (3, 2)
    assert len({*here["extra"], *there["extra"]} - set(range(8))) == 5  # none that either's batch holds
    here, there = several("given local")
    assert here["queue"] == there["queue"] == {-1, -2, -3, -4, -5, -6}
    assert len(set(here["extra"])) == len(set(there["extra"])) == 5
    assert len({*here["extra"], *there["extra"]}) > 7  # draws of their own


@pytest.mark.filterwarnings("ignore:negatives do not accumulate")
def test_a_query_sees_what_gather_says(several, alone):
    """local: as in one process that accumulates both batches. detached: the first step's losses are those of exact."""
    assert_same(several("local"), alone("halves"))
    detached, exact = several("detached")[0], several("joint")[0]
    assert detached["rows"][0][:6] == pytest.approx(exact["rows"][0][:6])
    assert (detached["moved"]["ctx"] - exact["moved"]["ctx"]).norm() > 0.01 * exact["moved"]["ctx"].norm()
    assert abs(several("local")[0]["rows"][0][NSP] - exact["rows"][0][NSP]) > 0.01


SHARDED = {
    "sharded": "joint", "sharded ntp": "ntp", "sharded idle": "idle", "sharded cached idle": "idle",
    "sharded cached accumulated": "accumulated", "sharded queue": "queue",
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.filterwarnings("ignore:negatives do not accumulate")
def test_sharded_weights_take_the_same_steps(name, several, alone):
    """FSDP2: each rank holds a part of all weights, and gathers those of a layer when it comes to it."""
    found = several(name)
    assert_same(found, alone(SHARDED[name]))
    layers = [f"{part}.{i}" for part in ("gen.model.layers", "ctx.encoder.layer") for i in range(2)]
    assert {*layers, ""} < set(found[0]["units"])


@pytest.mark.parametrize("wrapped", ["", "sharded "])
@pytest.mark.parametrize("name", ["evaluation of 5", "evaluation of 1"])
def test_held_out_losses_do_not_depend_on_the_number_of_processes(name, wrapped, several, alone):
    whole = alone(name)
    for result in several(wrapped + name):
        assert result == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize("name", ["resumed", "sharded resumed", "sharded resumed in parts"])
def test_a_resumed_run_goes_on_bit_for_bit(name, several):
    """Its checkpoints are saved pairs."""
    found = several(name)
    for result in found:
        assert result["logs"][0] == result["logs"][1] == found[0]["logs"][0]
        assert [log["step"] for log in result["logs"][0]] == [3, 6]
        for kind in ("weights", "queue"):
            for a, b, c in zip(*(each.values() for each in (*result[kind], found[0][kind][0])), strict=True):
                assert torch.equal(a, b) and torch.equal(a, c)
        for tensor, weights in result["weights"][0].items():
            assert torch.equal(result["saved"][tensor], weights)
        weights = {name for name in result["files"] if name.endswith((".safetensors", ".bin", ".distcp"))}
        if name == "sharded resumed in parts":  # no rank wrote the whole
            kinds = ("optimizer_0", "pytorch_model_fsdp_0")
            parts = {f"checkpoint-7/{kind}/__{rank}_0.distcp" for kind in kinds for rank in range(WORLD)}
            assert weights == {"checkpoint-7/cosup_queue.safetensors", *parts}
    assert not torch.equal(found[0]["random"], found[1]["random"])


def test_a_checkpoint_in_parts_becomes_a_plain_folder(several):
    for result in several("sharded across"):
        plain, checkpoint = result["read"]
        assert plain.keys() == checkpoint.keys() == result["weights"].keys()
        for name, tensor in result["weights"].items():
            assert torch.equal(plain[name], tensor) and torch.equal(checkpoint[name], tensor)
        wanted = "fsdp_config: wanted state_dict_type SHARDED_STATE_DICT as in "
        assert [message.startswith(wanted) for message in result["told"]] == [True, True]


def test_what_several_processes_cannot_have_is_refused(several):
    unused, uneven, dispatched, sharded, packed = several("refused")[0]
    assert "micro_batch_size: wanted None with packing over several processes, got 1" in packed
    assert unused == "ddp_find_unused_parameters: wanted False over several processes, got True"
    assert "even_batches=True, dispatch_batches unset, got even_batches=False, dispatch_batches=None" in uneven
    assert "got even_batches=True, dispatch_batches=True" in dispatched
    assert sharded == "fsdp: wanted version 2 on GPUs, got version none on cpu"
    extra, empty = several("sharded refused")[0]
    assert extra == "extra_passages: wanted 0 with fsdp, got 2"
    assert empty == "fsdp_config: wanted cpu_ram_efficient_loading False, got True"
