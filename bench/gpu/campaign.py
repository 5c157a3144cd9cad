"""A campaign on a GPU: every stage in a process of its own, all figures in one file, from which it can be resumed.

    cosup bench gpu [--minutes 8] [--only STAGE ...] [--resume FILE] [--out DIR] [--tune]

Correctness comes first, and its stages run side by side, which compiles every kernel; a stage that measures time runs
alone. A stage that fails, hangs or takes its CUDA context down costs itself alone. What does not fit the minutes is
named. Without a GPU every stage runs on small shapes, Triton's kernels in their interpreter: a rehearsal, whose times
mean nothing.

Each line of gpu.jsonl is one JSON object: a figure of a stage; a ``record`` of ``report.summarise``; or a stage's end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from cosup.bench import report
from cosup.bench.gpu.recorder import Recorder, lines_of, text_of
from cosup.doctor import version
from cosup.files import write_text

ROOM = 10_000  # characters of the table that is printed last
SLOWER = 5  # times a stage's limit where there is no GPU
WORKERS = 8  # stages side by side, at most
DONE, NO_TIME = "done", "no time left"
SOFTWARE = ("torch", "triton", "transformers")
PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl", "inf-cl")
ATTENTION = ("flash-attn", "flash-attn-4")


class Stage(NamedTuple):
    name: str
    function: str  # module and name
    limit: int  # seconds, after which it is ended
    estimate: int  # seconds that it needs: it is not begun with less
    arguments: tuple[Any, ...] = ()
    alone: bool = True  # it measures time
    packages: tuple[str, ...] = ()  # on whose versions it depends beside SOFTWARE


SHAPES = {"llama": (8192, 4096, 128256), "gemma": (8192, 2304, 256000), "few-rows": (1024, 4096, 128256),
          "half": (4096, 4096, 128256),
          "qwen": (16384, 2048, 151936), "fewest-rows": (512, 4096, 128256)}  # fmt: skip
MET = ("llama", "gemma", "few-rows")  # of these, where the peers are met


CORRECT, SPEED, VARIANTS = (f"cosup.bench.gpu.{name}" for name in ("correct", "speed", "variants"))


def _correct(name: str, limit: int, estimate: int, *arguments: Any, stage: str | None = None) -> Stage:
    return Stage(f"correct.{stage or name}", f"{CORRECT}.{name}", limit, estimate, arguments, alone=False)


STAGES = (
    Stage("machine", f"{SPEED}.machine", 40, 5),
    _correct("suite", 150, 40),
    *(Stage(f"ahead.{name}", f"{SPEED}.ahead", 150, 30, (shape, name in MET), alone=False)
      for name, shape in SHAPES.items()),
    Stage("ahead.info_nce", f"{SPEED}.ahead_of_pools", 90, 20, alone=False),
    _correct("products", 60, 10),
    *(_correct("losses", 150, 40, dtype, room, stage=f"losses.{dtype}.{room}")
      for dtype in ("bfloat16", "float16", "float32") for room in ("whole-rows", "slabs")),
    *(_correct(name, 90, 15)
      for name in ("patched", "graph", "compiled", "ranks", "quiet", "generation", "devices")),
    _correct("full", 90, 15)._replace(alone=True),  # its tiles are most of the card's memory
    Stage("ceilings", f"{SPEED}.ceilings", 60, 10),
    *(Stage(f"losses.{name}", f"{SPEED}.losses", 200, 50, (SHAPES[name], True), packages=PEERS) for name in MET),
    Stage("info_nce.rows", f"{SPEED}.contrastive", 180, 40, (False,), packages=PEERS),
    Stage("info_nce.symmetric", f"{SPEED}.contrastive", 180, 40, (True,), packages=PEERS),
    *(Stage(f"losses.{name}", f"{SPEED}.losses", 90, 15, (shape, False))
      for name, shape in SHAPES.items() if name not in MET),
    Stage("kernels", f"{VARIANTS}.kernels", 60, 15),
    Stage("variants", f"{VARIANTS}.variants", 90, 25),
    Stage("ignored", f"{SPEED}.ignored", 60, 20),
    Stage("profile", f"{SPEED}.profile", 60, 10),
    Stage("pair", f"{SPEED}.pair", 90, 25),
    Stage("patched-model", f"{SPEED}.patched", 90, 25),
    Stage("attention", f"{SPEED}.attention", 90, 25, packages=ATTENTION),
    Stage("pool", f"{SPEED}.pool", 90, 25),
    Stage("pool.million", f"{SPEED}.million", 90, 25),
    _correct("sanitizer", 120, 20)._replace(alone=True),
    Stage("bad-target", f"{CORRECT}.bad_target", 30, 5),
)  # fmt: skip
TUNING = (
    *(Stage(f"tune.{kernel}", f"{VARIANTS}.tune", 90, 30, (kernel,))
      for kernel in ("rows", "gradient", "columns", "product")),
    Stage("tune.peers", f"{SPEED}.searching", 300, 60, packages=PEERS),
)  # fmt: skip


def run(arguments: Sequence[str] | None = None) -> bool:
    """Returns whether nothing was wrong and nothing failed; what found no time is no failure."""
    names = ", ".join(stage.name for stage in STAGES)
    parser = argparse.ArgumentParser("cosup bench gpu", description=f"{__doc__}\nStages: {names}",
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--minutes", type=float, default=8.0, help="for all of it (%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="these, by the start of their names")
    parser.add_argument("--resume", type=Path, metavar="FILE",
                        help="gpu.jsonl of an earlier run: its stages are skipped where device, driver, versions and\n"
                             "the sources of cosup are the same")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("cosup-bench"), help="folder of gpu.jsonl (%(default)s)")
    parser.add_argument("--tune", action="store_true", help="also search the kernels' sizes: tuned.json; and a peer's")
    args = parser.parse_args(arguments)
    stages = [*STAGES[:-1], *(TUNING if args.tune else ()), STAGES[-1]]
    unknown = [o for o in args.only if not any(_asked(stage.name, o) for stage in stages)]
    if unknown:
        parser.error(f"--only: wanted some of {names}, got {unknown[0]}")
    if args.minutes <= 0:
        parser.error(f"--minutes: wanted more than 0, got {args.minutes}")
    if args.resume and not args.resume.is_file():
        parser.error(f"--resume: wanted a file, got {args.resume}")
    chosen = [stage for stage in stages if not args.only or any(_asked(stage.name, o) for o in args.only)]
    return _Campaign(args.out, args.minutes, args.resume).run(chosen)


def _asked(name: str, asked: str) -> bool:
    return name == asked or name.startswith(asked + ".")


class _Campaign:
    def __init__(self, out: Path, minutes: float, resume: Path | None) -> None:
        self.began = time.monotonic()
        self.end = self.began + 60 * minutes
        self.gpu = gpu()
        self.base = identity(self.gpu)
        earlier = lines_of(resume) if resume else []
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "gpu.jsonl"
        failed = {line["stage"] for line in earlier if line.get("failed")}
        ended = [line for line in earlier if line.get("end") == DONE and line["stage"] not in failed]
        same = {line["stage"]: line["of"] for line in ended}
        self.done = {stage.name for stage in (*STAGES, *TUNING) if same.get(stage.name) == self.of(stage)}
        kept = [line for line in earlier if line["stage"] in self.done]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        os.environ.setdefault("TRITON_INTERPRET", str(int(self.gpu is None)))  # before anything imports triton
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # for each of several stages at once
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # else who asks for CUDA before a fork breaks it
        self.processes = multiprocessing.get_context("forkserver")  # torch is imported once, CUDA started by each
        self.processes.set_forkserver_preload(["cosup.bench.gpu.preload"])
        self.running: dict[BaseProcess, tuple[Stage, float, float]] = {}

    def of(self, stage: Stage) -> str:
        """What a stage's figures are of."""
        known = self.base | {name: version(name) for name in stage.packages}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def run(self, stages: Sequence[Stage]) -> bool:
        self._write({"stage": "campaign", "name": "identity", **self.base})
        for stage in stages:
            if stage.name in self.done:
                continue
            while self.running and (stage.alone or len(self.running) >= min(WORKERS, os.cpu_count() or 1)):
                self._reap()
            left = self.end - time.monotonic()
            if left < stage.estimate:
                self._ended(stage, NO_TIME, 0.0)
                continue
            print(f"== {stage.name}, {left:.0f} s left", flush=True)
            limit = min(stage.limit * (1 if self.gpu else SLOWER), left)
            process = self.processes.Process(target=perform, args=(stage, self.path, limit, self.gpu is None))
            process.start()
            self.running[process] = stage, time.monotonic(), limit
            while stage.alone and self.running:
                self._reap()
        while self.running:
            self._reap()
        lines = lines_of(self.path)
        print("\n" + table(lines), flush=True)
        print(f"{time.monotonic() - self.began:.0f} s; all figures: {self.path}", flush=True)
        ends = [line["end"] for line in lines if "end" in line]
        return all(end in (DONE, NO_TIME) for end in ends) and not any(_bad(line) for line in lines)

    def _reap(self) -> None:
        """Take leave of the stages that have ended, or whose time is over."""
        time.sleep(0.05)
        for process, (stage, began, limit) in list(self.running.items()):
            seconds = time.monotonic() - began
            if process.exitcode is None and seconds < limit:
                continue
            over = process.exitcode is None
            assert process.pid is not None
            with suppress(ProcessLookupError):  # it has none yet, or it and what it has started are gone
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
            del self.running[process]
            verdict = "out of time" if over else DONE if process.exitcode == 0 else f"failed ({process.exitcode})"
            self._ended(stage, verdict, seconds)

    def _ended(self, stage: Stage, verdict: str, seconds: float) -> None:
        self._write({"stage": stage.name, "end": verdict, "seconds": round(seconds, 1), "of": self.of(stage)})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as lines:
            lines.write(json.dumps(line) + "\n")


def perform(stage: Stage, path: Path, seconds: float, small: bool) -> None:
    """A stage, in a process of its own."""
    campaign = multiprocessing.parent_process()
    assert campaign is not None
    os.setpgid(0, 0)
    threading.Thread(target=_end_with, args=(campaign,), daemon=True).start()
    recorder = Recorder(stage.name, path, time.monotonic() + seconds, small)

    def whole() -> dict[str, Any]:
        module, _, name = stage.function.rpartition(".")
        getattr(import_module(module), name)(recorder, *stage.arguments)
        return {"ended": True}

    sys.exit(0 if recorder.figure("stage", whole, show=False) else 1)


def _end_with(campaign: BaseProcess) -> None:
    campaign.join()
    os.killpg(0, signal.SIGKILL)


def gpu() -> tuple[str, str] | None:
    """Name and driver of the first GPU, asked without starting CUDA; None: there is none."""
    if shutil.which("nvidia-smi") is not None:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True)
        if found.returncode == 0 and found.stdout.strip():
            name, driver = found.stdout.splitlines()[0].split(", ")
            return name, driver
    if Path("/dev/nvidia0").exists():
        raise RuntimeError("there is a GPU, but nvidia-smi does not name it")
    return None


def identity(card: tuple[str, str] | None) -> dict[str, Any]:
    """Device, driver, versions and sources: figures are comparable where these agree."""
    device, driver = card or (report.device_name("cpu"), None)
    versions = {name: version(name) for name in SOFTWARE}
    return {"device": device, "driver": driver, "python": platform.python_version(), **versions, "sources": sources()}


def sources() -> str:
    """sha256 of the sources of kernels/, cosup/ and bench/, wherever they are installed."""
    digest = hashlib.sha256()
    for name in ("cosup", "cosup.kernels", "cosup.bench"):
        root = Path(import_module(name).__path__[0])
        for path in sorted(p for kind in ("*.py", "*.cpp", "*.sh") for p in root.rglob(kind)):
            inside = path.relative_to(root)
            if name != "cosup" or inside.parts[0] not in ("kernels", "bench"):  # where they lie in it
                digest.update(f"{name} {inside.as_posix()} ".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """What ended how, then what is wrong, then the figures in the order of the stages, until the room is filled."""
    right = Counter(line["stage"] for line in lines if line.get("wrong") == 0)
    ends = [line for line in lines if "end" in line]
    found = "; ".join(f"{e['stage']} {e['end']}, {e['seconds']:.0f} s, {right[e['stage']]} right" for e in ends)
    found = found.replace(", 0 right", "")
    bad = [line for line in lines if _bad(line)]
    if bad:
        found += "\nWRONG OR FAILED, publish no speed of it:"
    order = {stage.name: place for place, stage in enumerate((*STAGES, *TUNING))}
    rest = [line for line in lines if line.get("show") and ("wrong" not in line or "ms" in line) and not _bad(line)]
    rest.sort(key=lambda line: order[line["stage"]])
    for place, line in enumerate([*bad, *rest]):
        text = "\n" + text_of(line)
        if len(found) + len(text) > ROOM:
            return found + f"\n... {len(bad) + len(rest) - place} more in the file"
        found += text
    return found


def _bad(line: dict[str, Any]) -> bool:
    return bool(line.get("failed") or line.get("wrong"))
