"""The site: whole, true to the results, and built and read without the network."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cosup
from cosup import data
from cosup.bench import page, report

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"^::: (\S+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
FETCHED = re.compile(r"""<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=["']?(?:https?:)?//[^>]*>""")
FETCHED_BY_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)["']?(?:https?:)?//[^)]*""")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install '.[docs]'")
    if sys.version_info < (3, 11):
        pytest.skip("the site is built with Python 3.11: the last mkdocstrings for 3.10 does not go with its needs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    offline = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https", "all")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, **offline, "PYTHONSAFEPATH": "1", "NO_MKDOCS_2_WARNING": "1"})  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_is_in_the_reference():
    classes = dict(inspect.getmembers(cosup.nn, inspect.isclass))
    modules = {name for name, of in classes.items() if of.__module__ == "cosup.nn"}
    wanted = {f"cosup.{name}" for name in cosup.__all__ if name != "nn"}
    wanted |= {f"cosup.nn.{name}" for name in modules} | {f"cosup.data.{name}" for name in data.__all__}
    assert wanted <= set(NAMED)
    assert len(NAMED) == len(set(NAMED))


@pytest.mark.release
def test_every_name_of_the_reference_has_its_entry(site):
    html = (site / "api.html").read_text()
    for name in NAMED:
        assert f'id="{name}"' in html, name


def test_the_benchmarks_are_those_of_the_results():
    assert page.PAGE.read_text() == page.page(ROOT / "bench/results"), "run `python bench/page.py`"


def test_a_result_without_its_command_is_refused(tmp_path):
    (tmp_path / "some_cpu.json").write_text('{"title": "some", "problems": []}')
    with pytest.raises(ValueError, match="some_cpu.json: wanted the command that made it, got"):
        page.page(tmp_path)


def test_results_say_which_command_made_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bench/ranks.py", "--ranks", "2"])
    assert report.environment()["command"] == "python bench/ranks.py --ranks 2"
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/cosup", "bench", "info_nce"])
    assert report.environment()["command"] == "cosup bench info_nce"


@pytest.mark.release
def test_the_site_fetches_nothing(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > len([*(ROOT / "docs").glob("*.md")])  # and 404.html
    for path in pages:
        assert not FETCHED.findall(path.read_text()), path.name
    for path in [*pages, *site.rglob("*.css")]:
        assert not FETCHED_BY_STYLE.findall(path.read_text()), path.name


@pytest.mark.release
def test_no_markup_is_left_over(site):
    """Roles of docstrings, fences with the tests' marks, and links out of docs/ are written for other readers."""
    for path in site.glob("*.html"):
        html = path.read_text()
        for left in (":func:", ":class:", "```", "](../", "][cosup"):
            assert left not in html, f"{path.name} has {left}"
