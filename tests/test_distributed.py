"""Losses over several processes give what one process gives, with uneven parts, and ranks without a target or query."""

import functools
import itertools

import pytest
import ranks


@pytest.mark.parametrize("world", [2, 3])
def test_vocabulary_parallel_equals_one_process(world):
    ranks.run(ranks.vocabulary_parallel_equals_one_process, world)


def test_a_budget_that_nobody_gave_is_not_refused():
    ranks.run(ranks.a_budget_that_nobody_gave_is_not_refused, 2)


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


def test_ring_in_slabs():
    ranks.run(ranks.ring_in_slabs, 3)


def test_two_sweeps_have_the_same_logits():
    ranks.run(ranks.two_sweeps_have_the_same_logits, 2)


def test_memory_of_a_ring_does_not_grow_with_the_ranks(tmp_path):
    for world, layout in itertools.product((2, 4), ("ring", "all_gather")):
        ranks.run(functools.partial(ranks.peak_memory, layout=layout, folder=tmp_path), world)
    ring, gathered = ([max(int(path.read_text()) for path in tmp_path.glob(f"{layout}_{world}_*")) for world in (2, 4)]
                      for layout in ("ring", "all_gather"))  # fmt: skip
    assert ring[1] <= 1.02 * ring[0]
    assert gathered[1] > 1.4 * gathered[0] and gathered[1] > 1.2 * ring[1]  # which this test can see


def test_listed_positives_are_own_candidates():
    ranks.run(ranks.listed_positives_are_own_candidates, 2)


def test_an_infinite_loss_is_infinite_on_every_rank():
    ranks.run(ranks.an_infinite_loss_is_infinite_on_every_rank, 2)


def test_bad_contrastive_options_are_refused():
    ranks.run(ranks.bad_contrastive_options_are_refused, 2)


@pytest.mark.parametrize("world", [2, 3])
def test_pairs_equal_one_process(world):
    ranks.run(ranks.pairs_equal_one_process, world)
