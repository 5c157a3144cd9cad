"""The import direction is the data flow; kernels/ must not hide Hugging Face's `kernels`."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Every room, in the order of the data flow, and the rooms whose doors it may open.
MAY_IMPORT = {
    "kernels": {"kernels"},
    "steps": set(),
    "plan": {"steps"},
    "gemm": {"kernels", "plan"},
    "direct": set(),
    "agreement": set(),
    "distributed": {"kernels", "agreement"},
    "positives": set(),
    "walk": {"kernels", "steps", "plan", "gemm", "distributed", "positives"},
    "ring": {"kernels", "plan", "distributed", "walk"},
    "counting": {"kernels", "plan", "walk"},
    "ops": {"agreement", "counting", "direct", "kernels", "plan", "distributed", "positives", "walk", "ring"},
    "checks": set(),
    "softmax": {"agreement", "distributed", "walk", "direct", "ops", "checks"},
    "predict": {"checks", "ops", "plan", "softmax", "steps", "walk"},
    "contrastive": {"agreement", "walk", "direct", "ops", "distributed", "positives", "checks", "softmax"},
    "losses": {"agreement", "distributed", "checks", "softmax", "contrastive"},
    "nn": {"agreement", "losses", "contrastive"},
    "deferred": {"losses", "softmax"},
    "patching": {"deferred", "softmax"},
    "compat": {"compat", "agreement", "checks", "losses"},
    "gradcache": set(),
    "tokens": set(),
    "files": set(),
    "shards": {"files"},
    "cards": {"files"},
    "data": {"data", "tokens", "cards", "files"},
    "nearest": set(),
    "index": {"data", "files", "nearest"},
    "integrations": {"patching", "contrastive", "data", "index", "softmax"},
    "generate": {"tokens", "data", "index"},
    "pretrained": {"tokens"},
    "model": {"tokens", "cards", "files", "shards", "data", "generate", "pretrained"},
    "train": {"agreement", "walk", "losses", "contrastive", "nn", "gradcache", "tokens", "cards", "data", "files",
              "shards", "model"},
    "evaluate": {"losses", "tokens", "data", "files", "index", "generate", "model"},
    "doctor": {"kernels", "gemm", "walk"},
    "demo": {"data", "files", "index", "model", "train", "evaluate", "tokens", "generate"},
    "pools": {"data", "files", "index", "model", "train", "evaluate", "demo"},
    "cli": {"data", "files", "index", "model", "train", "evaluate", "tokens", "generate", "demo", "pools", "doctor",
            "bench", "integrations", "predict"},
}
FOLDERS = ("kernels", "data", "compat", "integrations")  # each is one room
FILES = [*ROOT.glob("kernels/*.py"), *ROOT.glob("cosup/[!_]*.py"), *ROOT.glob("cosup/*/*.py")]


def room(path: Path) -> str:
    return path.parent.name if path.parent.name in FOLDERS else path.stem


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            assert top not in ("kernels", "bench", "tests"), f"{path} imports {name}"
            assert top != "cosup" or rest[0] in MAY_IMPORT[room(path)], f"{path} imports {name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/*.py")), ids=lambda path: path.name)
def test_every_launch_is_on_the_device_of_its_tensors(path):
    """Triton launches on the current device, whichever holds the tensors."""

    def launches(node, guarded):
        guarded = guarded or isinstance(node, ast.With) and "torch.cuda.device_of(" in ast.unparse(node.items[0])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            yield node, guarded
        for child in ast.iter_child_nodes(node):
            yield from launches(child, guarded)

    tree = ast.parse(path.read_text())
    found = list(launches(tree, False))
    assert all(guarded for _, guarded in found), [ast.unparse(node.func) for node, guarded in found if not guarded]
    if path.name.startswith(("tile_", "row", "scale", "product", "target_")):
        assert found


def test_every_room_is_listed():
    assert {room(path) for path in FILES} <= set(MAY_IMPORT)


def test_the_command_starts_others_lazily():
    top = [n for n in ast.parse((ROOT / "cosup/cli.py").read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not [ast.unparse(n) for n in top if "cosup" in ast.unparse(n)]


def test_the_package_brings_neither_compiler_nor_transformers():
    """What takes seconds to import waits until it is called for."""
    call = "import sys, cosup; sys.exit(' '.join({'torch._dynamo', 'transformers', 'faiss'} & {*sys.modules}) or None)"
    subprocess.run([sys.executable, "-c", call], check=True)


def test_bare_kernels_stays_free():
    assert [n for n in ast.parse((ROOT / "kernels/__init__.py").read_text()).body if not isinstance(n, ast.Expr)] == []


def test_the_readme_names_every_file():
    """The tree there is a newcomer's first map."""
    tree = (ROOT / "README.md").read_text()
    names = {path.name for path in [*ROOT.glob("kernels/[!_]*.py"), *ROOT.glob("cosup/[!_]*.py")]}
    assert not {name for name in names if name not in tree}
