"""The tile kernels in plain PyTorch: the specification, the oracle, and the path where nothing else runs.

A tile holds raw inner products ``dot[r, s] = <x[r], w[col0 + s]>``. Its logits are

    u[r, s] = scale * dot[r, s] + bias[s]
    z[r, s] = softcap * tanh(u / softcap)      (z = u without a softcap)
    z[r, s] = z[r, s] - margin * scale         where col0 + s == target[r]; margin 0 with a softcap
    z[r, s] = -inf                             elsewhere, if row_id[r] == col_id[s] or scale * dot[r, s] > limit[r]

Where the tile is rounded to 16 bits, own[r] is the target's inner product before that: it stands in the tile's place
for all that is asked but ``above``, which compares logits that are rounded alike.

Shape suffixes: R rows of the tile, S columns of the tile. Row statistics are float32 (float64 for float64 tiles).
Source: online softmax, Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class RowState(NamedTuple):
    """The running statistic of each row: what a sweep over the columns leaves behind.

    ``target`` may be filled beforehand with the target logit; ``above`` counts against that value until the tile
    holding the target is seen, and against the tile's own value from there on.
    """

    max: Tensor  # [N] largest logit so far
    sum: Tensor  # [N] sum of exp(z - max)
    dot: Tensor  # [N] sum of exp(z - max) * (z - max)
    target: Tensor  # [N] logit of the target without its margin, NaN until seen
    soft: Tensor  # [N] sum of soft[m] * z[m], for column weights soft
    above: Tensor  # [N] int32, columns other than the target whose logit is above it

    @classmethod
    def empty(cls, n: int, like: Tensor) -> RowState:
        dtype = torch.promote_types(like.dtype, torch.float32)
        # in one room, where each would be a launch; all are aligned alike, or kernels would be compiled anew
        fields = torch.zeros(6, -(-n // 4) * 4, dtype=dtype, device=like.device)[:, :n]
        top, total, dot, target, soft, above = fields
        top.fill_(float("-inf"))
        target.fill_(float("nan"))
        return cls(top, total, dot, target, soft, above.view(torch.int32)[:n])

    def rows(self, r: slice) -> RowState:
        return RowState(*(field[r] for field in self))

    def lse(self) -> Tensor:
        return self.max + self.sum.log()

    def entropy(self) -> Tensor:
        """-sum_m p log p = log(sum) - E[z - max]."""
        return self.sum.log() - self.dot / self.sum


class RowValues(NamedTuple):
    """What the statistic of a row says, all [N]."""

    nll: Tensor  # -log p of the target
    lse: Tensor  # log sum exp
    entropy: Tensor
    soft: Tensor  # as of the state
    max: Tensor  # as of the state
    sum: Tensor  # as of the state
    above: Tensor  # as of the state, but all other columns where nll is NaN
    excess: Tensor  # mean of z less the target's


class ColumnState(NamedTuple):
    """The running statistic of each column, over the rows."""

    max: Tensor  # [M] largest logit so far
    sum: Tensor  # [M] sum of exp(z - max)
    dot: Tensor  # [M] sum of exp(z - max) * (z - max)

    @classmethod
    def empty(cls, m: int, like: Tensor) -> ColumnState:
        return cls(*(torch.full((m,), v, dtype=like.dtype, device=like.device) for v in (float("-inf"), 0.0, 0.0)))

    def columns(self, c: slice) -> ColumnState:
        return ColumnState(*(field[c] for field in self))


def logits(dot_RS, col0, target_R, scale, bias_S, row_id_R, col_id_S, softcap, margin, limit_R, own_R=None):
    """The logits of a tile and the mask of each row's target, as the file's opening says."""
    column_S = torch.arange(col0, col0 + dot_RS.shape[1], device=dot_RS.device)
    hit_RS = column_S == target_R[:, None]
    wide_RS = dot_RS.to(torch.promote_types(dot_RS.dtype, torch.float32))
    scaled_RS = (wide_RS if own_R is None else torch.where(hit_RS, own_R[:, None], wide_RS)) * scale
    u_RS = scaled_RS if bias_S is None else scaled_RS + bias_S
    z_RS = softcap * torch.tanh(u_RS / softcap) if softcap else u_RS
    if limit_R is not None:
        z_RS = z_RS.masked_fill((scaled_RS > limit_R[:, None]) & ~hit_RS, float("-inf"))
    if row_id_R is not None:
        z_RS = z_RS.masked_fill((col_id_S == row_id_R[:, None]) & ~hit_RS, float("-inf"))
    return (torch.where(hit_RS, z_RS - margin * scale, z_RS) if margin else z_RS), hit_RS


def tile_stats(
    dot_RS, state: RowState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None, softcap=0.0, soft_S=None,
    margin=0.0, limit_R=None, own_R=None
):  # fmt: skip
    """Merge a tile into the running statistic of its rows, in place. The tile is left as it is."""
    features = (col0, target_R, scale, bias_S, row_id_R, col_id_S, softcap)
    z_RS, hit_RS = logits(dot_RS, *features, margin, limit_R, own_R)
    exact_RS = logits(dot_RS, *features, 0.0, limit_R, own_R)[0] if margin else z_RS
    rounded_RS = exact_RS if own_R is None else logits(dot_RS, *features, 0.0, limit_R)[0]
    here_R = hit_RS.any(1)
    of_target, rounded_R = (torch.where(hit_RS, z, 0.0).sum(1) for z in (exact_RS, rounded_RS))
    threshold_R = torch.where(here_R, rounded_R, state.target)
    state.above.add_(((z_RS > threshold_R[:, None]) & ~hit_RS).sum(1))
    state.target.copy_(torch.where(here_R, of_target, state.target))
    _merge_exponentials(state, z_RS)
    if soft_S is not None:
        soft_RS = times(soft_S, z_RS)
        masks = row_id_R is not None or limit_R is not None
        state.soft.add_((soft_RS.masked_fill(z_RS == float("-inf"), 0.0) if masks else soft_RS).sum(1))


def column_stats(
    dot_RS, state: ColumnState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None, softcap=0.0,
    soft_S=None, margin=0.0, limit_R=None, own_R=None
):  # fmt: skip
    """Merge a tile into the running statistic of its columns, in place; ``soft_S`` has no part in it."""
    z_RS, _ = logits(dot_RS, col0, target_R, scale, bias_S, row_id_R, col_id_S, softcap, margin, limit_R, own_R)
    _merge_exponentials(state, z_RS.mT)


def _merge_exponentials(state: RowState | ColumnState, z_RS: Tensor) -> None:
    new_R = torch.maximum(state.max, z_RS.amax(1))
    safe_R = torch.where(new_R == float("-inf"), 0.0, new_R)  # a tile of -inf alone
    e_RS = torch.exp(z_RS - safe_R[:, None])
    decay_R = torch.exp(state.max - safe_R)
    lag_R = torch.where(state.sum == 0, 0.0, state.sum * (state.max - safe_R))
    state.dot.add_(lag_R).mul_(decay_R).add_(torch.where(e_RS == 0, 0.0, e_RS * (z_RS - safe_R[:, None])).sum(1))
    state.sum.mul_(decay_R).add_(e_RS.sum(1))
    state.max.copy_(new_R)


def tile_grad(
    dot_RS, out_RS, shift_R, a_R, b_R, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None, softcap=0.0,
    soft_S=None, margin=0.0, limit_R=None, own_R=None, e_R=None, h_R=None, col_shift_S=None, col_a_S=None
):  # fmt: skip
    """The gradient of u: coefficients of a row times what stands in a column, times dz/du.

        out[r, s] = ((a[r] + h[r] (z - shift[r])) exp(z - shift[r]) + col_a[s] exp(z - col_shift[s])
                     - b[r] [col0 + s == target[r]] - e[r] soft[s]) dz/du

    With ``shift`` the row's maximum and ``a`` divided by the row's sum the first term is a multiple of the softmax,
    more exact than exp(z - lse). ``e`` serves label smoothing, ``h`` the entropy, ``col_a`` a softmax over the rows;
    None: 0. Without ``col_a``, rows with a == b == e == 0 are zero whatever their logits are. ``out_RS`` may share
    memory with ``dot_RS``; the target term is subtracted before rounding to its dtype.
    """
    z_RS, hit_RS = logits(dot_RS, col0, target_R, scale, bias_S, row_id_R, col_id_S, softcap, margin, limit_R, own_R)
    excess_RS = z_RS - shift_R[:, None]
    exp_RS = torch.exp(excess_RS)
    a_RS = a_R[:, None] if h_R is None else a_R[:, None] + h_R[:, None] * excess_RS
    c_RS = torch.where(exp_RS == 0, 0.0, a_RS * exp_RS) - torch.where(hit_RS, b_R[:, None], 0.0)
    if soft_S is not None:
        c_RS = c_RS - e_R[:, None] * soft_S
    if col_a_S is not None:
        c_RS = c_RS + col_a_S * torch.exp(z_RS - col_shift_S)
    if softcap:
        c_RS = c_RS * (1 - (z_RS / softcap) ** 2)
    if row_id_R is not None or limit_R is not None:
        c_RS = c_RS.masked_fill(z_RS == float("-inf"), 0.0)  # with a softcap the chain factor is infinite there
    if col_a_S is None:
        idle_R = (a_R == 0) & (b_R == 0) if soft_S is None else (a_R == 0) & (b_R == 0) & (e_R == 0)
        c_RS = torch.where(idle_R[:, None], 0.0, c_RS)
    out_RS.copy_(c_RS)


def row_values(state: RowState, columns: int, margin: float, scale: Tensor, skip: Tensor | None) -> RowValues:
    """What a statistic over so many columns says: of rows to skip, zeros.

        nll = lse - (target - margin * scale), with the two large numbers subtracted before the small ones are added
    """
    lag_R = (state.max - state.target) + margin * scale
    nll_R = state.sum.log() + lag_R
    above_R = torch.where(nll_R.isnan(), columns - 1, state.above)  # none is above a NaN: such a row is last, not first
    soft_R, top_R, total_R = (field.clone() for field in (state.soft, state.max, state.sum))  # apart from each other
    found = RowValues(nll_R, state.lse(), state.entropy(), soft_R, top_R, total_R, above_R,
                      lag_R + state.dot / state.sum)  # fmt: skip
    return found if skip is None else RowValues(*(f.masked_fill_(skip, 0) for f in found))


def times(weight: Tensor, value: Tensor) -> Tensor:
    """weight * value, but 0 where the weight is 0, were the value infinite or NaN; so is the gradient of the value."""
    return weight * value.masked_fill(weight == 0, 0.0)


def scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor in factor's dtype, but 0 where either is 0."""
    return torch.where(factor == 0, 0.0, times(grad.to(factor.dtype), factor))


def scale(grad: Tensor, factor: Tensor) -> None:
    """grad = scaled(grad, factor), a number on grad's device that is not rounded to grad's dtype; nothing where it is
    known to be 1."""
    number = factor.item() if factor.device.type == "cpu" else 0.0
    if number == 0 or not math.isfinite(number):
        grad.copy_(scaled(grad, factor))
    elif number != 1:
        grad.mul_(factor)


def target_dots(x_RD: Tensor, w_MD: Tensor, target_R: Tensor, col0: int) -> Tensor:
    """<x[r], w[target[r] - col0]>, summed in float32; [R]. 0 where the target is no row of w."""
    own_R = target_R - col0
    here_R = (own_R >= 0) & (own_R < len(w_MD))
    dot_R = (x_RD.float() * w_MD[torch.where(here_R, own_R, 0)].float()).sum(1)
    return torch.where(here_R, dot_R, 0.0)


def sigmoid_stats(
    dot_RS, state: RowState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None, *unused
):  # fmt: skip
    """Merge a tile into what the sigmoid loss sums over each row, in place: arguments as of :func:`tile_stats`, but
    without what comes after the ids, and with three fields of ``state``.

        sum   sum of softplus(y)                    y[r, s] = -z[r, s] where col0 + s == target[r], else z[r, s]
        soft  sum of g = sigma(z) - [target]        d sum / dz
        dot   sum of g (z - bias)                   of scale * dot alone: digits of a large bias would drown it

    Source: SigLIP, arXiv:2303.15343, algorithm 1.
    """
    y_RS, sign_RS = _signed_logits(dot_RS, col0, target_R, scale, bias_S, row_id_R, col_id_S)
    g_RS = sign_RS * torch.sigmoid(y_RS)
    state.sum.sub_(F.logsigmoid(-y_RS).sum(1))
    state.soft.add_(g_RS.sum(1))
    state.dot.add_((g_RS * dot_RS).sum(1) * scale)


def sigmoid_grad(
    dot_RS, out_RS, shift_R, a_R, b_R, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None, *unused
):  # fmt: skip
    """The gradient of u in the sigmoid loss: arguments as of :func:`tile_grad`, without ``shift`` and ``b``.

        out[r, s] = a[r] (sigma(z[r, s]) - [col0 + s == target[r]])      0 where masked, and where a[r] is 0

    ``out_RS`` may share memory with ``dot_RS``.
    """
    y_RS, sign_RS = _signed_logits(dot_RS, col0, target_R, scale, bias_S, row_id_R, col_id_S)
    a_RS = a_R[:, None]
    out_RS.copy_(torch.where(a_RS == 0, 0.0, a_RS * (sign_RS * torch.sigmoid(y_RS))))


def _signed_logits(dot_RS, col0, target_R, scale, bias_S, row_id_R, col_id_S):
    """y and its sign: -1 at the target, 1 elsewhere."""
    z_RS, hit_RS = logits(dot_RS, col0, target_R, scale, bias_S, row_id_R, col_id_S, 0.0, 0.0, None)
    sign_RS = torch.where(hit_RS, -1.0, 1.0).to(z_RS.dtype)
    return torch.where(hit_RS, -z_RS, z_RS), sign_RS
