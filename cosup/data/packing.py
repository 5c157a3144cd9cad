"""Which examples share a row, and where each of their tokens then stands.

row            a0 a1 a2 a3  b0 b1  c0 c1 c2  padding      no longer than the capacity
position_ids    0  1  2  3   0  1   0  1  2   0  1        0 begins an example; what fills up the row is one of its own
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of indices into `lengths`, each row's sum at most `capacity`: one after another into the first with room."""
    assert max(lengths, default=0) <= capacity
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        place = next((row for row, free in enumerate(room) if length <= free), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(capacity)
        rows[place].append(index)
        room[place] -= length
    return rows


def restarting_positions(lengths: Sequence[Sequence[int]]) -> Tensor:
    """[rows, longest row] int64: a token's place in its own example, of examples of these lengths in each row."""
    width = max(sum(row) for row in lengths)
    filled = [[*row, width - sum(row)] for row in lengths]
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in filled])
