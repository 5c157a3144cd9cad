"""The C++ tile kernels of ``kernels/cpu``, loaded once and called on the memory of CPU tensors.

Formula, names and the meaning of every argument: ``cosup.kernels.reference``. Tiles are float32.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from cosup.kernels.reference import ColumnState, RowState

INSTRUCTION_SETS = ("plain", "avx2", "avx512")  # bit numbers of cosup_instruction_sets()


def _load() -> ctypes.CDLL | None:
    for path in sorted(Path(__file__).parent.glob("*cosup_cpu.*")):
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    return None


LIBRARY = _load()  # None where it was not built or cannot be loaded
# What the library has and this machine runs, best last; empty without the library.
AVAILABLE = tuple(s for i, s in enumerate(INSTRUCTION_SETS) if LIBRARY and LIBRARY.cosup_instruction_sets() >> i & 1)


def tile_stats(dot_RS: Tensor, state: RowState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
               softcap=0.0, soft_S=None, margin=0.0, limit_R=None, own_R=None,
               instruction_set: str | None = None):  # fmt: skip
    assert own_R is None
    R, S = dot_RS.shape
    _function("tile_stats", instruction_set)(
        _at(dot_RS), R, S, dot_RS.stride(0), *(_at(field) for field in state), col0, _at(target_R), _at(scale),
        _at(bias_S), _at(row_id_R), _at(col_id_S), softcap, _at(soft_S), margin, _at(limit_R), torch.get_num_threads(),
    )  # fmt: skip


def column_stats(dot_RS: Tensor, state: ColumnState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
                 softcap=0.0, soft_S=None, margin=0.0, limit_R=None, own_R=None,
                 instruction_set: str | None = None):  # fmt: skip
    assert own_R is None
    R, S = dot_RS.shape
    _function("column_stats", instruction_set)(
        _at(dot_RS), R, S, dot_RS.stride(0), *(_at(field) for field in state), col0, _at(target_R), _at(scale),
        _at(bias_S), _at(row_id_R), _at(col_id_S), softcap, margin, _at(limit_R), torch.get_num_threads(),
    )  # fmt: skip


def tile_grad(dot_RS: Tensor, out_RS: Tensor, shift_R, a_R, b_R, col0, target_R, scale, bias_S=None, row_id_R=None,
              col_id_S=None, softcap=0.0, soft_S=None, margin=0.0, limit_R=None, own_R=None, e_R=None, h_R=None,
              col_shift_S=None, col_a_S=None, instruction_set: str | None = None):  # fmt: skip
    R, S = dot_RS.shape
    assert own_R is None and out_RS.stride() == dot_RS.stride()
    _function("tile_grad", instruction_set)(
        _at(dot_RS), _at(out_RS), R, S, dot_RS.stride(0), _at(shift_R), _at(a_R), _at(b_R), col0, _at(target_R),
        _at(scale), _at(bias_S), _at(row_id_R), _at(col_id_S), softcap, _at(soft_S), margin, _at(limit_R), _at(e_R),
        _at(h_R), _at(col_shift_S), _at(col_a_S), torch.get_num_threads(),
    )  # fmt: skip


def sigmoid_stats(dot_RS: Tensor, state: RowState, col0, target_R, scale, bias_S=None, row_id_R=None, col_id_S=None,
                  *unused, instruction_set: str | None = None):  # fmt: skip
    R, S = dot_RS.shape
    _function("sigmoid_stats", instruction_set)(
        _at(dot_RS), R, S, dot_RS.stride(0), _at(state.sum), _at(state.dot), _at(state.soft), col0, _at(target_R),
        _at(scale), _at(bias_S), _at(row_id_R), _at(col_id_S), torch.get_num_threads(),
    )  # fmt: skip


def sigmoid_grad(dot_RS: Tensor, out_RS: Tensor, shift_R, a_R, b_R, col0, target_R, scale, bias_S=None, row_id_R=None,
                 col_id_S=None, *unused, instruction_set: str | None = None):  # fmt: skip
    R, S = dot_RS.shape
    assert out_RS.stride() == dot_RS.stride()
    _function("sigmoid_grad", instruction_set)(
        _at(dot_RS), _at(out_RS), R, S, dot_RS.stride(0), _at(a_R), col0, _at(target_R), _at(scale), _at(bias_S),
        _at(row_id_R), _at(col_id_S), torch.get_num_threads(),
    )  # fmt: skip


POINTER, INT64, FLOAT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
ARGUMENTS = {
    "tile_stats": [POINTER, *3 * [INT64], *6 * [POINTER], INT64, *5 * [POINTER], FLOAT, POINTER, FLOAT, POINTER, INT],
    "column_stats": [POINTER, *3 * [INT64], *3 * [POINTER], INT64, *5 * [POINTER], FLOAT, FLOAT, POINTER, INT],
    "tile_grad": [POINTER, POINTER, *3 * [INT64], *3 * [POINTER], INT64, *5 * [POINTER], FLOAT, POINTER, FLOAT,
                  *5 * [POINTER], INT],
    "sigmoid_stats": [POINTER, *3 * [INT64], *3 * [POINTER], INT64, *5 * [POINTER], INT],
    "sigmoid_grad": [POINTER, POINTER, *3 * [INT64], POINTER, INT64, *5 * [POINTER], INT],
}  # fmt: skip


@functools.cache
def _function(kernel: str, instruction_set: str | None):
    function = getattr(LIBRARY, f"cosup_{kernel}_{instruction_set or AVAILABLE[-1]}")
    function.argtypes, function.restype = ARGUMENTS[kernel], None
    return function


def _at(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.ndim == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1
    return tensor.data_ptr()
