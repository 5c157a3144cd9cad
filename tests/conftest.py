"""Kernels run on the GPU where there is one, and through Triton's interpreter where there is none.

pytest [-n 2] [--release]             the tests; --release: also what only a release can break
pytest [-n 2] --planted [-k WORD]     the planted bugs of tests/bugs, each in a copy of the tree
"""

import gc
import multiprocessing
import os
import random
from pathlib import Path

import planted
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # the workers share the processors; before anything imports torch
import torch
from hypothesis import settings

gc.disable()  # until all is imported, which makes no garbage
HAS_GPU = torch.cuda.is_available()
os.environ.setdefault("TRITON_INTERPRET", str(int(not HAS_GPU)))  # before anything imports triton
if os.environ["TRITON_INTERPRET"] == "1":
    import interpreter

    interpreter.patch_once_a_launch()
    interpreter.look_dtypes_up_once()
    interpreter.make_types_once()
# by the process that those of the tests are forked from
IMPORTED = ["cosup.bench.gpu.preload", "cosup.train", "torch.distributed.tensor"]
# files whose tests share what takes long to make
SHARING = {"gpu_campaign", "milvus", "packaging", "patching_ranks", "site", "train_ranks", "triton_compile"}
settings.register_profile("quick", max_examples=60)
settings.register_profile("nightly", max_examples=500)
settings.load_profile("quick")  # pytest --hypothesis-profile nightly asks for the other


def pytest_addoption(parser):
    group = parser.getgroup("cosup")
    group.addoption("--release", action="store_true", help="also what only a release can break: packages, the site, "
                    "kernels compiled for six targets, all architectures of transformers")  # fmt: skip
    group.addoption("--planted", action="store_true", help="in place of the tests, the planted bugs that they catch")
    group.addoption("--seconds", type=float, default=float("inf"), help="--planted: end after so many")
    group.addoption("--seed", type=int, default=0, help="--planted: of the order in which they are begun")


def pytest_configure(config):
    multiprocessing.set_forkserver_preload(planted.IMPORTED if config.getoption("--planted") else IMPORTED)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are processors: tests of processes, servers and limits of time wait."""
    return min(8, len(os.sched_getaffinity(0)) + 1) if hasattr(os, "sched_getaffinity") else None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file to a worker where its tests share what takes long to make, else a test; other modes are xdist's own."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if Path(file).stem.removeprefix("test_") in SHARING else nodeid

    return Scheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_ignore_collect(collection_path, config):
    if config.getoption("--planted") and collection_path.name.startswith("test_"):
        return collection_path.name != "test_planted.py"


def pytest_collection_modifyitems(config, items):
    planted, release = config.getoption("--planted"), config.getoption("--release")
    kept: dict[bool, list] = {True: [], False: []}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        kept[("planted" in marks) == planted and (release or "release" not in marks)].append(item)
    config.hook.pytest_deselected(items=kept[False])
    items[:] = kept[True]
    if planted:
        random.Random(config.getoption("--seed")).shuffle(items)


def pytest_collection_finish():
    gc.freeze()  # what is imported stays: each collection of the garbage would look through it all, 0.2 s of a test
    gc.enable()


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--planted"):
        skipped = [report.nodeid.partition("[")[2] for report in terminalreporter.stats.get("skipped", [])]
        left_out = [name for name in skipped if name]
        terminalreporter.section(f"planted bugs, seed {config.getoption('--seed')}: {len(left_out)} left out")
        terminalreporter.line("; ".join(name.rpartition("]")[0] for name in sorted(left_out)))


@pytest.fixture
def device():
    return "cuda" if HAS_GPU else "cpu"


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def narrow_slabs(monkeypatch):
    """Small tables fit one slab and one strip whole; tests of the blocks want several of each."""
    monkeypatch.setattr("cosup.walk.LEAST_ROWS", {"cpu": 20, "cuda": 20})
    monkeypatch.setattr("cosup.plan.SLAB_HEIGHT", 1)
    monkeypatch.setattr("cosup.walk.STRIP", 256)


@pytest.fixture
def filthy_memory():
    """New memory is full of NaN, not of zeros by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread():
    """Sums are split by threads, and bits depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer_of(tmp_path):
    """Makes a trainer of a pair on the eight tiny instances, which saves nothing."""
    from cosup.train import CoSupConfig, CoSupTrainer
    from tiny import tiny_instances, tiny_passages

    def make(model, instances=None, **options):
        extra = {name: options.pop(name) for name in ("eval_dataset", "callbacks") if name in options}
        settings = dict(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1)
        args = CoSupConfig(**settings | options)
        given = tiny_instances(8) if instances is None else instances
        return CoSupTrainer(model, args, train_dataset=given, passages=tiny_passages(8), **extra)

    return make
