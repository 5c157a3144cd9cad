"""The head split among processes: they give what one gives, with uneven parts and a rank without targets."""

import pytest
import ranks


@pytest.mark.parametrize("world", [2, 3])
def test_vocabulary_parallel_equals_one_process(world):
    ranks.run(ranks.vocabulary_parallel_equals_one_process, world)


def test_log_prob_over_ranks():
    ranks.run(ranks.log_prob_over_ranks, 2)


def test_sixteen_bits_and_compile():
    ranks.run(ranks.sixteen_bits_and_compile, 2)


def test_bad_parts_are_refused():
    ranks.run(ranks.bad_parts_are_refused, 2)
