"""Every planted bug is caught by the test that its table names: pytest --planted [-k WORD] [--seconds 90 --seed 1]"""

import time
from collections import Counter

import planted
import pytest

BUGS = planted.bugs()
BEGAN = time.monotonic()


@pytest.fixture(scope="session")
def tree(tmp_path_factory, pytestconfig):
    return planted.Tree(tmp_path_factory.mktemp("planted"), BEGAN + pytestconfig.getoption("--seconds"))


@pytest.mark.planted
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_is_caught(bug, tree):
    assert tree.catches(bug), f"survived {bug.caught_by}"


@pytest.mark.planted
def test_a_change_of_no_consequence_survives(tree):
    source = (planted.ROOT / "cosup/gemm.py").read_text()
    nothing = planted.Bug("nothing", "cosup/gemm.py", source, source + "\n", "tests/test_gemm.py")
    assert not tree.catches(nothing)
    assert (tree.root / nothing.file).read_text() == (planted.ROOT / nothing.file).read_text() == source


def test_every_bug_can_be_planted():
    """What stands before stands there once, and tests are named that exist."""
    for bug in BUGS:
        assert bug.planted_in((planted.ROOT / bug.file).read_text()) and bug.before != bug.after
        assert (planted.ROOT / bug.caught_by.split(" -k ")[0]).is_file(), bug
    assert not [name for name, count in Counter(bug.name for bug in BUGS).items() if count > 1]
