"""Where one rank fails or differs, all raise the same at once, and no later call meets an earlier one."""

import failing_ranks
import failing_trainers
import pytest
import ranks

WORLDS = [2, *(pytest.param(world, marks=pytest.mark.release) for world in (3, 4))]


@pytest.mark.parametrize("world", WORLDS)
def test_one_fails(world):
    ranks.run(failing_ranks.one_fails, world, seconds=9)


@pytest.mark.parametrize("world", WORLDS)
def test_one_differs(world):
    ranks.run(failing_ranks.one_differs, world, seconds=9)


def test_what_may_differ():
    ranks.run(failing_ranks.what_may_differ, 3, seconds=9)


def test_one_message_a_call():
    ranks.run(failing_ranks.one_message_a_call, 2, seconds=9)


@pytest.mark.parametrize("world", WORLDS[:2])
def test_a_step_fails(world, tmp_path):
    started = ranks.Started(world)
    try:
        started.run(failing_trainers.one_fails, tmp_path, world, seconds=150)
        started.run(failing_trainers.one_differs, tmp_path / "differ", world, seconds=30)
    finally:
        started.end()
