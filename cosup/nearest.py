"""The nearest of a table of vectors, exactly, by torch.

    rows[q] = the k rows m of the highest <x[q], w[m]>, best first; of equal scores the earlier row first

Q queries x of width D, M vectors w, in tiles of B queries and C vectors, so that memory is bounded but for the result.
A score and its row are one integer, so that no two are equal: its upper half orders as the float32 does, its lower half
is the larger, the earlier the row.
"""

import torch
from torch import Tensor

_QUERIES, _SCORES = 256, 1 << 22  # of a tile: with its keys and their order about 200 MB
_LAST_ROW = 2**32 - 1


def nearest(queries_QD: Tensor, vectors_MD: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and rows [Q, k] on the CPU. Both float32 and finite, on one device; k is at most M."""
    found = []
    for x_BD in queries_QD.split(_QUERIES):
        best_BK = torch.empty(len(x_BD), 0, dtype=torch.int64, device=x_BD.device)
        width = _SCORES // max(len(x_BD), 1)
        for start in range(0, len(vectors_MD), width):
            w_CD = vectors_MD[start : start + width]
            with torch.autocast(x_BD.device.type, enabled=False):
                z_BC = x_BD @ w_CD.mT + 0.0  # -0.0 becomes 0.0, which it equals
            row_C = torch.arange(start, start + len(w_CD), device=x_BD.device)
            key_BC = (_ordered(z_BC.view(torch.int32)).long() << 32) + (_LAST_ROW - row_C)
            best_BK = torch.cat([best_BK, key_BC], dim=1)
            best_BK = best_BK.topk(min(k, best_BK.shape[1])).values
        found.append(best_BK)
    key_QK = torch.cat(found).cpu()
    return _ordered((key_QK >> 32).int()).view(torch.float32), _LAST_ROW - (key_QK & _LAST_ROW)


def home(vectors_MD: Tensor, device: torch.device) -> torch.device:
    """Where queries of this device are to meet the vectors: there, if half of its free memory holds them."""
    if vectors_MD.device.type == "cpu" and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return device if vectors_MD.nbytes <= free // 2 else vectors_MD.device
    return vectors_MD.device


def _ordered(bits: Tensor) -> Tensor:
    """The bits of float32 as integers of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
