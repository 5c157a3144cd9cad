"""CandidateQueue: which vectors it holds, in one process and in several, and what they do in the loss."""

import pool_ranks
import pytest
import ranks
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from cosup import info_nce
from cosup.nn import CandidateQueue


@given(size=st.integers(1, 6), counts=st.lists(st.integers(0, 14), max_size=8))
def test_it_holds_the_last_vectors_with_their_ids(size, counts):
    """Empty, partly filled, full, and given more at once than it holds."""
    queue, seen = CandidateQueue(size, 2), torch.zeros(0)
    for count in counts:
        ids = len(seen) + torch.arange(count)
        queue.enqueue(torch.stack([ids + 0.5, -ids], dim=1), ids)
        seen = torch.cat([seen, ids])
        vectors, held = queue.candidates()
        assert sorted(held.tolist()) == seen[-size:].tolist()
        assert torch.equal(vectors, torch.stack([held + 0.5, -held], dim=1))


def test_a_saved_queue_goes_on_as_the_first():
    queue, again = CandidateQueue(5, 2), CandidateQueue(5, 2)
    queue.enqueue(torch.randn(7, 2), torch.arange(7))
    again.load_state_dict(queue.state_dict())
    for each in (queue, again):
        each.enqueue(torch.ones(2, 2), torch.tensor([7, 8]))
    torch.testing.assert_close(queue.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert sorted(again.candidates()[1].tolist()) == [4, 5, 6, 7, 8]


def test_its_candidates_are_negatives_but_for_the_positive_itself():
    """The loss of plain PyTorch, with passage 3 in the queue left out for the query that it is the answer to."""
    queue = CandidateQueue(4, 8)
    query, passages = (torch.randn(2, 8, requires_grad=True) for _ in range(2))
    ids, old = torch.tensor([3, 9]), torch.randn(3, 8, requires_grad=True)
    queue.enqueue(old, torch.tensor([5, 3, 6]))
    past, past_ids = queue.candidates()
    loss = info_nce(query, torch.cat([passages, past]), candidate_ids=torch.cat([ids, past_ids]), temperature=0.5)
    scores = F.normalize(query) @ F.normalize(torch.cat([passages, old.detach()])).T / 0.5
    scores[0, 3] = float("-inf")
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.tensor([0, 1])))
    queue.enqueue(passages, ids)  # before backward, as the trainer does
    loss.backward()
    assert old.grad is None and passages.grad.abs().sum() > 0
    assert not queue.vectors.requires_grad


def test_it_is_the_same_on_every_rank():
    ranks.run(pool_ranks.queue_is_the_same_on_every_rank, 2)


@pytest.mark.parametrize(
    "vectors, ids, message",
    [
        (torch.zeros(2, 3), torch.arange(2), r"vectors must be floating \[n, 2\], got torch.float32 \[2, 3\]"),
        (torch.zeros(2), torch.arange(2), r"vectors must be floating \[n, 2\], got torch.float32 \[2\]"),
        (torch.zeros(2, 2), torch.arange(3), r"ids must be int64 \[2\], got torch.int64 \[3\]"),
        (torch.zeros(2, 2), torch.zeros(2), r"ids must be int64 \[2\], got torch.float32 \[2\]"),
        (torch.zeros(2, 2, device="meta"), torch.arange(2), "want vectors and ids on cpu, got meta and cpu"),
    ],
)
def test_a_wrong_vector_is_told_and_changes_nothing(vectors, ids, message):
    queue = CandidateQueue(4, 2)
    with pytest.raises(ValueError, match=message):
        queue.enqueue(vectors, ids)
    assert len(queue.candidates()[1]) == 0


def test_a_wrong_size_is_told():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        CandidateQueue(0, 4)
    with pytest.raises(ValueError, match="width must be at least 1, got -1"):
        CandidateQueue(4, -1)
