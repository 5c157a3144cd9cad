"""The plan keeps its budget, prefers whole rows, and says what it needs when nothing fits."""

import re

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from cosup import walk
from cosup.plan import Cost, Strategy, enough, plan, used
from cosup.steps import RATES, Moves, seconds, steps
from cosup.walk import Need

WIDE = Cost(strip=0, features=768, of_x=768, of_w=768, least_rows=64, row_step=1, merged_cols=1, tile=4, dots=0,
            coef=0, chain=256, packed=0, product=0, row=60, column=0, block_row=0, put_row=0, table_row=0,
            query_row=0)  # fmt: skip
moves = st.builds(Moves, features=st.integers(1, 10_000), item=st.sampled_from([2, 4]), tile=st.sampled_from([2, 4]),
                  of_x=st.integers(0, 10_000), of_w=st.integers(0, 10_000),
                  few=st.sampled_from([0, 1 << 23]), rates=st.sampled_from([*RATES.values()]))  # fmt: skip
costs = st.builds(Cost, strip=st.sampled_from([0, 1 << 20]), features=st.integers(0, 10_000),
                  of_x=st.integers(0, 10_000), of_w=st.integers(0, 10_000), chain=st.just(256),
                  least_rows=st.integers(1, 2000), row_step=st.sampled_from([1, 256]),
                  merged_cols=st.sampled_from([1, 128]), tile=st.sampled_from([4, 8]),
                  dots=st.sampled_from([0, 2, 4, 20]), coef=st.sampled_from([0, 2]),
                  packed=st.sampled_from([0, 4]),
                  product=st.sampled_from([0, 4, 6]), row=st.integers(0, 80),
                  column=st.integers(0, 40), block_row=st.integers(0, 10_000),
                  put_row=st.integers(0, 5_000),
                  table_row=st.integers(0, 5_000), query_row=st.integers(0, 5_000),
                  few=st.sampled_from([0, 1 << 23]), second=st.sampled_from([0, 64]),
                  strips_alone=st.booleans(), moves=st.none() | moves)  # fmt: skip


@given(st.integers(0, 10**6), st.integers(1, 10**6), costs, st.booleans(), st.booleans(), st.integers(0, 1 << 32))
def test_budget_is_kept_and_stated(n, m, cost, grads, known, budget):
    try:
        p = plan(n, m, cost, grads=grads, weights_known=known, workspace_bytes=budget)
    except ValueError as error:
        assert "workspace_bytes" in str(error)
        return
    assert p.workspace_bytes <= budget
    assert min(n, 1) <= p.block_rows <= n and 1 <= p.strip_cols <= p.block_cols <= m
    if p.strategy is Strategy.GRADS_IN_FORWARD:
        assert known and grads
        assert cost.strips_alone or (p.block_cols == m and (p.block_rows == n or not cost.column))
    else:
        assert not (known and grads and cost.strips_alone)


@given(st.integers(1, 10**5), st.integers(1, 10**5), costs, st.integers(0, 1 << 24))
def test_stated_need_is_enough(n, m, cost, budget):
    """So it is beside any budget."""
    cost = cost._replace(row=max(cost.row, 1))
    with pytest.raises(ValueError, match=f"for {n} rows and {m} columns, got 0") as refused:
        plan(n, m, cost, grads=True, weights_known=True, workspace_bytes=0)
    (least,) = map(int, re.findall(r"at least (\d+)", str(refused.value)))
    assert least <= used(n, m, 1, min(m, 16), cost, True)
    for room in (least, least + budget):
        assert plan(n, m, cost, grads=True, weights_known=True, workspace_bytes=room).workspace_bytes <= room


@given(st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**5), st.integers(1, 10**5), costs)
def test_gradients_take_memory_where_they_are_asked(n, m, rows, cols, cost):
    rows, cols = min(rows, n), min(cols, m)
    without = cost._replace(of_x=0, of_w=0, coef=0, put_row=0, table_row=0, query_row=0, few=0, second=0)
    assert used(n, m, rows, cols, cost, False) == used(n, m, rows, cols, without, False)
    with_sums, none = (used(n, m, rows, cols, cost._replace(second=size), True) for size in (64, 0))
    assert with_sums - none == 64 * (rows + cols)


def test_strategies():
    def strategy(budget, cost=WIDE, **asked):
        return plan(
            2048, 50257, cost, **{"grads": True, "weights_known": True, **asked}, workspace_bytes=budget
        ).strategy

    enough = used(2048, 50257, WIDE.least_rows, 50257, WIDE, True)
    assert strategy(enough) is Strategy.GRADS_IN_FORWARD
    assert strategy(enough - 1) is Strategy.RECOMPUTE
    assert strategy(enough, weights_known=False) is Strategy.RECOMPUTE
    assert strategy(enough, grads=False) is Strategy.STATISTICS
    assert strategy(enough - 1, cost=WIDE._replace(strips_alone=True)) is Strategy.GRADS_IN_FORWARD


@pytest.mark.parametrize("m, need, budget, sigmoid", [
    (8192, Need(x=True), 1_900_000, False), (1000, Need(x=True, w=True), 8_500_000, False),
    (8192, Need(x=True), 1_900_000, True),
])  # fmt: skip
def test_whole_rows_where_slabs_need_more(m, need, budget, sigmoid):
    """A slab needs the sum of all of x's gradient; whole rows need it of one block."""
    x = torch.empty(4096, 1024, dtype=torch.bfloat16)
    cost = walk.cost(x, "native", gathered=False, sigmoid=sigmoid, need=need)
    p = plan(4096, m, cost, grads=True, weights_known=True, workspace_bytes=budget)
    assert p.strategy is Strategy.GRADS_IN_FORWARD and p.block_rows >= 30


def test_blocks_are_even():
    p = plan(2048, 50257, WIDE, grads=True, weights_known=True, workspace_bytes=256 << 20)
    assert p.block_rows == 1024  # 1,335 rows would fit; two blocks of 1,024 do the same in equal parts


def test_rows_are_whole_tiles_of_the_products():
    """Several blocks: multiples of the step, as even as those allow; one block, or less than a step: as they come."""
    stepped = WIDE._replace(row_step=256)
    rows = [plan(n, 50257, stepped, grads=True, weights_known=True, workspace_bytes=b << 20).block_rows
            for n, b in [(2000, 256), (2048, 150), (2048, 135), (2000, 1024), (2000, 40)]]  # fmt: skip
    assert rows == [1024, 768, 512, 2000, 207]


@given(st.integers(1, 10**5), st.integers(1, 10**5), costs, st.booleans(), st.integers(0, 1 << 30))
def test_a_budget_that_nobody_gave_is_never_refused(n, m, cost, known, budget):
    room = enough(n, m, cost, True, budget)
    assert plan(n, m, cost, grads=True, weights_known=known, workspace_bytes=room).workspace_bytes <= room
    with pytest.raises(ValueError) as refused:
        plan(n, m, cost._replace(row=max(cost.row, 1)), grads=True, weights_known=known, workspace_bytes=0)
    (least,) = map(int, re.findall(r"at least (\d+)", str(refused.value)))
    assert budget <= room <= max(budget, min(2 * least, max(4 * budget, least + budget)))  # a part of what is free


WIDE_MOVES = Moves(features=768, item=2, tile=4, few=0, gathered=False, counted=False, rounded=False,
                   symmetric=False, of_x=768, of_w=768, rates=RATES["cuda", 2])  # fmt: skip


@given(st.integers(1, 10**5), st.integers(1, 10**5), costs, moves, st.booleans(), st.integers(1 << 20, 1 << 34))
@example(2048, 50257, WIDE, WIDE_MOVES, True, 100 << 20)  # slabs fit too, and would take longer than whole rows
def test_blocks_are_those_that_take_the_least_time(n, m, cost, moves, known, budget):
    """No more than by the count of rows, whose plan is one of the two that are compared."""
    options = {"grads": True, "weights_known": known, "workspace_bytes": enough(n, m, cost, True, budget)}
    timed, counted = (plan(n, m, cost._replace(moves=by), **options) for by in (moves, None))

    def time(p):
        sweeps = 1 if p.strategy is Strategy.GRADS_IN_FORWARD else 2
        return seconds(steps(n, m, p.block_rows, p.block_cols, moves, sweeps=sweeps), moves.rates)

    assert timed == counted if cost.strips_alone else time(timed) <= time(counted)


# what `walk.cost` gives for bfloat16 operands on CUDA
SHAPES_3U = [(8192, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 151936), (4096, 4096, 128256),
             (1024, 4096, 128256)]  # fmt: skip


@pytest.fixture
def as_cuda(monkeypatch):
    """Tensors of the device "meta" are planned for as those of CUDA."""
    for name in ("LEAST_ROWS", "ROW_STEP", "FEW", "MOST_WORKSPACE"):
        monkeypatch.setattr(walk, name, {"meta": getattr(walk, name)["cuda"]})


@pytest.mark.parametrize("n, d, m", SHAPES_3U)
@pytest.mark.parametrize("backend, rank", [("triton", 0), (walk.NARROW, 0), ("triton", 16)])
def test_published_shapes_take_three_products_by_default(n, d, m, backend, rank, as_cuda):
    """With an adapter of the head too."""
    x = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
    cost = walk.cost(x, backend, gathered=True, more_features=rank)
    p = plan(n, m, cost, grads=True, weights_known=True, workspace_bytes=walk.MOST_WORKSPACE["meta"])
    assert p.strategy is Strategy.GRADS_IN_FORWARD


@pytest.mark.parametrize("n, d, m", [(65536, 4096, 128256), (131072, 2048, 151936)])
@pytest.mark.parametrize("free", [8 << 30, 80 << 30])
def test_long_batches_are_not_refused_by_default(n, d, m, free, as_cuda, monkeypatch):
    """The float32 sum of x's gradient alone is over a gigabyte in some plans."""
    monkeypatch.setattr(walk, "_free_bytes", lambda device: free)
    monkeypatch.setattr(walk, "_workspaces", {})
    budget = walk.default_workspace(torch.device("meta"))
    cost = walk.cost(torch.empty(n, d, dtype=torch.bfloat16, device="meta"), "triton", gathered=True)
    room = enough(n, m, cost, True, budget)
    assert plan(n, m, cost, grads=True, weights_known=True, workspace_bytes=room).workspace_bytes <= room


@pytest.mark.parametrize("free, mib", [(8, 512), (20, 1280), (40, 2560), (78.9, 4096), (140, 4096)])
def test_default_workspace_of_a_gpu(free, mib, monkeypatch):
    monkeypatch.setattr(walk, "_free_bytes", lambda device: int(free * 2**30))
    monkeypatch.setattr(walk, "_workspaces", {})
    assert walk.default_workspace(torch.device("cuda")) >> 20 == mib


@pytest.mark.parametrize("free, budget", [(0, 16), (1 << 30, 64), (3 << 30, 128), (1 << 40, 256)])
def test_default_workspace(free, budget, monkeypatch):
    """A sixteenth of the free memory, in MiB; within bounds, and the same for all of a process."""
    monkeypatch.setattr(walk, "_workspaces", {})
    monkeypatch.setattr(walk, "_free_bytes", lambda device: free)
    assert walk.default_workspace(torch.device("cpu")) == budget << 20
    monkeypatch.setattr(walk, "_free_bytes", lambda device: free // 4)
    assert walk.default_workspace(torch.device("cpu")) == budget << 20
    monkeypatch.undo()
    assert walk._free_bytes(torch.device("cpu")) > 1 << 20


@pytest.mark.parametrize("line, folder, limit, usage, cache", [
    ("4:memory:/pod/run", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
     "total_inactive_file"),
    ("4:hugetlb,memory:/pod/run", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
     "total_inactive_file"),
    ("0::/pod/run", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
])  # fmt: skip
@pytest.mark.parametrize("groups, free", [
    ({}, 1000),
    ({"pod/run": ("9000", 100, 0)}, 1000),
    ({"pod/run": ("500", 300, 100)}, 300),
    ({"pod": ("500", 300, 0), "pod/run": ("9000", 100, 0)}, 200),
    ({"": ("500", 300, 0)}, 200),  # a container's own, seen as the root
    ({"other": ("500", 300, 0)}, 1000),
    ({"pod/run": ("max", 300, 0)}, 1000),
    ({"pod/run": ("500", 600, 0)}, 0),
])  # fmt: skip
def test_free_memory_is_within_the_limits_of_control_groups(line, folder, limit, usage, cache, groups, free, tmp_path):
    """In KiB: limit, usage and reclaimable cache of each group."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n")
    strange = b"9:name=systemd:/\n\nx\n3:cpu,cpuacct:/pod/run\n7:pids:/\xff\n"
    (tmp_path / "proc/self/cgroup").write_bytes(strange + line.encode() + b"\n")
    for name, (most, taken, reclaimable) in groups.items():
        group = tmp_path / folder / name
        group.mkdir(parents=True, exist_ok=True)
        (group / limit).write_text(most if most == "max" else f"{int(most) << 10}\n")
        (group / usage).write_text(f"{taken << 10}\n")
        (group / "memory.stat").write_text(f"cache 7\n{cache} {reclaimable << 10}\nactive_file 9\n")
    assert walk._free_bytes(torch.device("cpu"), tmp_path) == free << 10


def test_a_limit_without_its_usage_is_none(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("1000\n")
    assert walk._free_bytes(torch.device("cpu"), tmp_path) // walk.FREE_SHARE == walk.MOST_WORKSPACE["cpu"]


def test_free_memory_where_nothing_says_it(tmp_path):
    assert walk._free_bytes(torch.device("cpu"), tmp_path) // walk.FREE_SHARE == walk.MOST_WORKSPACE["cpu"]
