"""Losses over several processes give what one process gives, with uneven parts, and ranks without a target or query."""

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


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_contrastive_equals_one_process(world):
    ranks.run(ranks.contrastive_equals_one_process, world)


def test_contrastive_of_own_gradients_and_own_candidates():
    ranks.run(ranks.contrastive_of_own_gradients_and_own_candidates, 2)


def test_bad_contrastive_options_are_refused():
    ranks.run(ranks.bad_contrastive_options_are_refused, 2)


@pytest.mark.parametrize("world", [2, 3])
def test_pairs_equal_one_process(world):
    ranks.run(ranks.pairs_equal_one_process, world)
