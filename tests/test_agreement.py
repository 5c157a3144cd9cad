"""Where one rank fails or differs, all raise the same at once, and no later call meets an earlier one."""

import failing_ranks
import pytest
import ranks


@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_fails(world):
    ranks.run(failing_ranks.one_fails, world)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_one_differs(world):
    ranks.run(failing_ranks.one_differs, world)
