"""Several positives of a row: a list of pairs, whose logits are read out of the tiles that pass by, and whose gradient
coefficients are written into them before those are rounded.

Shape suffixes: P pairs, N rows of the problem, R rows of a block, S columns of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

POOLS = ("mean", "logsumexp")
READ_BY_HOST = {"cpu"}  # devices whose numbers the host may read without waiting


class Positives(NamedTuple):
    start: Tensor  # [N + 1] int64: pairs start[n] to start[n + 1] are row n's
    row: Tensor  # [P] int64, ascending
    col: Tensor  # [P] int64, among the columns of all ranks
    logit: Tensor  # [P], to be read by a sweep
    pool: str  # of POOLS: what becomes of a row's logits
    row0: int = 0  # first row of a block

    @classmethod
    def of(cls, start: Tensor, col: Tensor, logit: Tensor, pool: str) -> Positives:
        rows = torch.arange(len(start) - 1, device=col.device)
        return cls(start, torch.repeat_interleave(rows, start.diff(), output_size=len(col)), col, logit, pool)

    @property
    def counts(self) -> Tensor:
        """Of each row. [N]"""
        return self.start.diff()

    def pooled(self) -> Tensor:
        """Mean or logsumexp of each row's logits; 0 without one. [N]"""
        if self.pool == "mean":
            return self._sum(self.logit) / self.counts.clamp(min=1)
        top = self._highest(self.logit)
        top = torch.where(top == float("-inf"), 0.0, top)  # all are masked
        return torch.where(self.counts == 0, 0.0, top + self._sum(torch.exp(self.logit - top[self.row])).log())

    def weights(self) -> Tensor:
        """Derivative of each row's pooled logit by its logits: they sum to 1. [P]"""
        if self.pool == "mean":
            return (1 / self.counts.to(self.logit.dtype))[self.row]
        return torch.exp(self.logit - self.pooled()[self.row])

    def mean(self) -> Tensor:
        """Of each row's logits, by their weights; the pooled logit where none is finite. [N]"""
        if self.pool == "mean":
            return self.pooled()
        top = self._highest(self.logit)
        lag = self.logit - top[self.row]
        share = torch.exp(lag)
        total = self._sum(share)
        mean = top + self._sum(share * lag.masked_fill(share == 0, 0.0)) / total
        return torch.where((top == float("-inf")) | (total == 0), self.pooled(), mean)

    def best(self) -> Tensor:
        """Column of the first of each row's highest logits, or of one that is NaN; 0 without a positive. [N] int64"""
        logit, number = self.logit.nan_to_num(float("inf")), torch.arange(len(self.row), device=self.row.device)
        number = torch.where(logit == self._highest(logit)[self.row], number, len(number))
        first = torch.full_like(self.counts, len(number)).scatter_reduce(0, self.row, number, "amin")
        return torch.cat([self.col, self.col.new_zeros(1)])[first]

    def above(self, threshold: Tensor, target: Tensor) -> Tensor:
        """How many of each row are above its threshold, its target excepted. [N] int32"""
        higher = (self.logit > threshold[self.row]) & (self.col != target[self.row])
        return self._sum(higher.int())

    def block(self, r: slice) -> Positives:
        """Those of rows r alone, counted from there; but where the host waits for no device all, wherever they are."""
        if not host_reads(self.col):
            return self._replace(row0=r.start)
        start = self.start[r.start : r.stop + 1]
        pairs = slice(int(start[0]), int(start[-1]))
        return Positives(start - start[0], self.row[pairs] - r.start, self.col[pairs], self.logit[pairs], self.pool)

    def gradient(self, shift_R: Tensor, a_R: Tensor, b_R: Tensor, e_R: Tensor | None, soft: Tensor | None,
                 col0: int) -> Tensor:  # fmt: skip
        """The coefficients of a block's pairs, as ``tile_grad`` has them with one target; ``soft`` is of the columns
        from col0 on, and other pairs get any number. [P]"""
        row = (self.row - self.row0).clamp(0, len(a_R) - 1)
        coef = a_R[row] * torch.exp(self.logit - shift_R[row]) - b_R[row] * self.weights()
        if soft is not None and e_R is not None:
            coef = coef - e_R[row] * soft[(self.col - col0).clamp(0, len(soft) - 1)]
        return torch.where((a_R[row] == 0) & (b_R[row] == 0), 0.0, coef)

    def read(self, dot_RS: Tensor, first: int, scale: Tensor, bias_S: Tensor | None) -> None:
        """Take the logits of a block's pairs from a tile of inner products whose first column is ``first``."""
        which, row, col, inside = self._places(dot_RS, first)
        logit = _with_a_spare_column(dot_RS)[row, col].to(self.logit.dtype) * scale
        if bias_S is not None:
            logit = logit + bias_S[col.clamp(max=len(bias_S) - 1)]
        self.logit[which] = logit if inside is None else torch.where(inside, logit, self.logit)

    def write(self, coef_RS: Tensor, first: int, coef: Tensor) -> None:
        """Put the coefficients [P] of a block's pairs into a tile of them."""
        which, row, col, _ = self._places(coef_RS, first)
        _with_a_spare_column(coef_RS)[row, col] = coef[which].to(coef_RS.dtype)

    def _places(self, tile_RS: Tensor, first: int) -> tuple[Tensor | slice, Tensor, Tensor, Tensor | None]:
        """Which pairs a tile has, and where. Where the host waits for no device: all of them, which of them it has,
        and the spare column for the others."""
        row, col, (rows, cols) = self.row - self.row0, self.col - first, tile_RS.shape
        inside = (row >= 0) & (row < rows) & (col >= 0) & (col < cols)
        if host_reads(tile_RS):
            which = inside.nonzero().squeeze(1)
            return which, row[which], col[which], None
        return slice(None), torch.where(inside, row, 0), torch.where(inside, col, cols), inside

    def _sum(self, of_pairs: Tensor) -> Tensor:
        return of_pairs.new_zeros(len(self.start) - 1).index_add(0, self.row, of_pairs)

    def _highest(self, of_pairs: Tensor) -> Tensor:
        lowest = of_pairs.new_full((len(self.start) - 1,), float("-inf"))
        return lowest.scatter_reduce(0, self.row, of_pairs, "amax")


def host_reads(t: Tensor) -> bool:
    return t.device.type in READ_BY_HOST


def _with_a_spare_column(tile_RS: Tensor) -> Tensor:
    """The walk has one behind each tile where pairs that are elsewhere need a place."""
    if host_reads(tile_RS):
        return tile_RS
    return tile_RS.as_strided((tile_RS.shape[0], tile_RS.shape[1] + 1), tile_RS.stride(), tile_RS.storage_offset())
