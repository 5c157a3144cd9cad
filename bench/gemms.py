"""The floor of both losses: their matrix products alone, in the row blocks of a plan, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from cosup import gemm
from cosup.plan import Plan, padded
from cosup.walk import NARROW


def torch_mm(x_ND: Tensor, w_MD: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """Tile = x w^T, dx = tile w, dw += tile^T x; the tile's contents never matter."""
    with torch.no_grad():
        tile_RM = torch.empty(block_rows, len(w_MD), dtype=x_ND.dtype, device=x_ND.device)
        dx_ND, dw_MD = torch.empty_like(x_ND), torch.empty_like(w_MD)
        for n in range(0, len(x_ND), block_rows):
            x_RD = x_ND[n : n + block_rows]
            z_RM = tile_RM[: len(x_RD)]
            torch.mm(x_RD, w_MD.mT, out=z_RM)
            torch.mm(z_RM, w_MD, out=dx_ND[n : n + block_rows])
            torch.mm(z_RM.mT, x_RD, out=dw_MD) if n == 0 else dw_MD.addmm_(z_RM.mT, x_RD)
        return dx_ND, dw_MD


def engine_gemms(x_ND: Tensor, w_MD: Tensor, plan: Plan, backend: str, sweeps: int = 1) -> tuple[Tensor, Tensor]:
    """The same by the engine's products, strip by strip as it takes them; with two sweeps, first all tiles alone."""
    m = len(w_MD)
    wide = x_ND.is_cuda and x_ND.element_size() < 4 and backend != NARROW
    with torch.no_grad():
        dtype = torch.float32 if wide else x_ND.dtype
        room_RM = torch.empty(plan.block_rows, padded(m), dtype=dtype, device=x_ND.device)
        tile_RM = room_RM.view(x_ND.dtype)[:, : padded(m)]
        dx_ND, dw_MD = torch.empty_like(x_ND), torch.empty_like(w_MD)
        if x_ND.is_cuda and plan.block_rows < len(x_ND):  # sums of several parts
            dw_MD = torch.empty_like(w_MD, dtype=torch.float32)
        strips = [slice(c, min(c + plan.strip_cols, m)) for c in range(0, m, plan.strip_cols)]
        starts = range(0, len(x_ND), plan.block_rows)
        for n, last in [(n, sweep == sweeps - 1) for sweep in range(sweeps) for n in starts]:
            x_RD = x_ND[n : n + plan.block_rows]
            for s in strips:
                gemm.dots(x_RD, w_MD[s], room_RM[: len(x_RD), s])
            for s in strips if last else []:
                gemm.add(dx_ND[n : n + len(x_RD)], tile_RM[: len(x_RD), s], w_MD[s], first=s.start == 0)
                gemm.add(dw_MD[s], tile_RM[: len(x_RD), s].mT, x_RD, first=n == 0)
        return dx_ND, dw_MD
