"""The sdist holds the clone; a wheel made of it works in a clean environment that has no compiler."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.release
ROOT = Path(__file__).parents[1]
NOT_SHIPPED = {".gitignore", ".ci/run"}
TOOLS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make")


def run(*command: object, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    tree = folder / "tree"  # without egg-info: files that it lists go into the sdist too
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "__pycache__", "site"))
    # elsewhere: the folder build/ of the clone is not the package build
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, tree, cwd=folder)
    (path,) = folder.glob("cosup-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, sdist)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory) -> Path:
    """An environment of the wheel alone, which finds its dependencies where this one has them."""
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (packages,) = folder.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith("site-packages")]  # their own .pth files stay unread
    (packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")
    return folder


def test_the_sdist_holds_every_file_of_the_clone(sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert set(run("git", "ls-files", cwd=ROOT).splitlines()) - held == NOT_SHIPPED


def test_the_wheel_is_of_a_platform_and_holds_the_library_and_every_module(wheel):
    assert "-py3-none-" in wheel.name and not wheel.name.endswith("-any.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {"cosup/kernels/libcosup_cpu.so", "cosup/kernels/libcosup_cpu.dylib"} & held
    assert "cosup/py.typed" in held
    folders = {"cosup": "cosup", "kernels": "cosup/kernels", "bench": "cosup/bench"}
    for folder, installed in folders.items():
        for path in ROOT.glob(f"{folder}/**/*.py"):
            assert f"{installed}/{path.relative_to(ROOT / folder)}" in held


def test_the_wheel_asks_for_what_pyproject_says(wheel):
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = run(sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--no-index", "--ignore-installed",
               "--quiet", "--report", "-", wheel)  # fmt: skip
    metadata = json.loads(said)["install"][0]["metadata"]
    asked = {Requirement(line) for line in metadata["requires_dist"] if "extra ==" not in line}
    assert asked == {Requirement(line) for line in project["dependencies"]}
    assert set(metadata["provides_extra"]) == set(project["optional-dependencies"])
    assert metadata["requires_python"] == project["requires-python"]


def test_the_wheel_works_without_clone_and_compiler(clean, tmp_path):
    for name in ("smoke.py", "tiny.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path)
    path = str(clean / "bin")
    assert not [tool for tool in TOOLS if shutil.which(tool, path=path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COSUP"))}
    said = run(clean / "bin/python", tmp_path / "smoke.py", cwd=tmp_path, env=environment | {"PATH": path})
    found = json.loads(said.splitlines()[-1])
    assert Path(found["cosup"]).is_relative_to(clean) and found["kernels"].startswith("native, ")
