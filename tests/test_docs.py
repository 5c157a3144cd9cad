"""What the documentation shows runs as it stands: a page's blocks in their order, in one namespace."""

import inspect
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ranks
import torch
import torch.nn.functional as F

import cosup
from cosup.data import write_jsonl
from tiny import tiny_folder, tiny_gen, tiny_instances, tiny_passages

ROOT = Path(__file__).parents[1]
PAGES = {loss: ROOT / f"docs/{loss}.md" for loss in ("linear_cross_entropy", "info_nce", "sigmoid_loss")}
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    """Blocks whose fence says ``kind``, below as many empty lines as put errors on the page's own line."""
    text = page.read_text()
    found = [m for m in FENCE.finditer(text) if m[1].strip() == kind]
    return ["\n" * text.count("\n", 0, m.start(2)) + m[2] for m in found]


def run(page: Path, code: list[str]) -> None:
    namespace: dict = {"__name__": page.stem}
    for block in code:
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_page_runs(page):
    text = page.read_text()
    if "from trl" in text:
        pytest.importorskip("trl")  # it needs Python 3.11
    if "from cosup.integrations.milvus" in text:
        pytest.importorskip("pymilvus")
        pytest.importorskip("milvus_lite")
    run(page, blocks(page, "python"))


def test_lightning_snippet_runs(monkeypatch, tmp_path):
    """Lightning is no dependency: a plain module stands for its own."""
    monkeypatch.setitem(sys.modules, "lightning", SimpleNamespace(LightningModule=torch.nn.Module))
    page, namespace = ROOT / "docs/patch.md", {}
    for block in blocks(page, "python lightning"):
        exec(compile(block, str(page), "exec"), namespace)
    tiny_gen().save_pretrained(tmp_path)
    module, ids = namespace["Module"](tmp_path).train(), torch.arange(6)[None]
    module.training_step({"input_ids": ids, "labels": ids}, 0).backward()
    assert module.model(input_ids=ids, labels=ids).logits is None


def test_every_block_is_run():
    kinds = {m[1].strip() for page in (ROOT / "docs").glob("*.md") for m in FENCE.finditer(page.read_text())}
    assert not {kind for kind in kinds if kind.startswith("py")} - {"python", "python torchrun", "python lightning"}


def test_readme_runs(tmp_path, monkeypatch, capsys):
    """Its blocks in their order, with a tiny model and data where it says to give one's own."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "passages.jsonl", tiny_passages(8).values())
    write_jsonl(tmp_path / "train.jsonl", tiny_instances(8))
    gen = tiny_folder(tmp_path / "gen", tiny_gen())
    (yaml,) = blocks(ROOT / "README.md", "yaml")
    assert "gen: path/or/hub-id" in yaml and "max_steps: 100" in yaml
    yaml = yaml.replace("path/or/hub-id", str(gen)).replace("max_steps: 100", "max_steps: 2\nuse_cpu: true")
    (tmp_path / "train.yaml").write_text(yaml)

    head = torch.nn.Linear(16, 50, bias=False)
    namespace = {"F": F, "cosup": cosup, "model": SimpleNamespace(lm_head=head), "hidden": torch.randn(30, 16),
                 "scale": 0.5, "labels": torch.randint(50, (30,))}  # fmt: skip
    results = []
    for block in blocks(ROOT / "README.md", "python"):
        if "cosup.patch(model)" in block:
            namespace["model"] = tiny_gen()
        exec(compile(block, "README.md", "exec"), namespace)
        results.append({name: namespace.get(name) for name in ("loss", "accuracy", "stats", "model")})
    plain, ours, patched = results[:3]
    torch.testing.assert_close(ours["loss"], plain["loss"])
    assert ours["stats"].top1.float().mean() == plain["accuracy"]
    assert "forward" in patched["model"].__dict__
    assert (tmp_path / "pair/cosup_config.json").is_file() and "answer" in namespace


SCRIPTS = [page for page in sorted((ROOT / "docs").glob("*.md")) if blocks(page, "python torchrun")]


@pytest.mark.parametrize("page", SCRIPTS, ids=lambda page: page.name)
def test_script_over_processes_runs(page, tmp_path):
    """A block marked ``python torchrun`` is a script of its own."""
    (script,) = blocks(page, "python torchrun")
    end = "dist.destroy_process_group()"
    assert script.count(end) == 1
    script = script.replace(end, "dist.barrier(); __import__('os')._exit(0)")  # gloo's threads may abort what unwinds
    (tmp_path / "head.py").write_text(script)
    ranks.run_script(tmp_path / "head.py", 2)


@pytest.mark.parametrize("loss", PAGES)
def test_every_argument_has_its_line(loss):
    text = PAGES[loss].read_text()
    lines = {cells[1]: cells for cells in (re.split(r"\s*\|\s*", line) for line in text.splitlines()) if cells[1:]}
    for name, parameter in inspect.signature(getattr(cosup, loss)).parameters.items():
        default = parameter.default
        shown = "" if default is parameter.empty else f"`{default!r}`".replace("'", '"')
        assert f"`{name}`" in lines, f"no line for {name}"
        assert lines[f"`{name}`"][3] == shown, f"default of {name}"


def test_every_statistic_is_named():
    text = PAGES["linear_cross_entropy"].read_text()
    for name in (*cosup.RowStats._fields, *inspect.signature(cosup.linear_log_prob).parameters):
        assert f"`{name}`" in text, name
