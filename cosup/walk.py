"""The engine: visit the logits of x @ w.T tile by tile, keep the rows' statistics, and turn tiles into gradients.

    for a slab of columns, for a block of rows:
        GEMM the tile into one reused buffer, by strips of columns     1U
        stats   merge it into the rows' running statistic
        for a strip of columns:
            grad    turn it into coefficients in place, then two GEMMs: dx += c @ w, dw += c.T @ x     2U

Both losses, every strategy and every device run this one loop; ``plan`` decides the blocks, ``kernels`` do the tiles,
the vendor's library does the GEMMs. Shape suffixes: N rows, M columns, D features, r a block of rows, s a slab.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cosup import gemm
from cosup.distributed import Shard, merge, sum_over_ranks
from cosup.kernels import native, reference
from cosup.kernels.reference import ColumnState, RowState, RowValues, times
from cosup.plan import ALIGN, Cost, Plan, padded
from cosup.positives import Positives, host_reads
from cosup.steps import RATES, Moves

_CONTIGUOUS: Any = {"memory_format": torch.contiguous_format}
BACKENDS = ("auto", "reference", "native", "triton", "fused")
NARROW = "triton-16bit"  # Triton's kernels on tiles of the operands' own dtype
TRITON = ("triton", NARROW)
NARROW_SCALE = 33.4  # where it may be taken: a temperature of 0.03
FREE_SHARE = 16  # of the free memory a workspace takes one part, where none is given
LEAST_WORKSPACE, MOST_WORKSPACE = 16 << 20, {"cpu": 256 << 20, "cuda": 4 << 30}  # bytes, where none is given
# By the controllers of a line in /proc/self/cgroup (version 2, version 1): folder; limit, usage, and the page cache in
# that usage which can be reclaimed.
CGROUPS = {
    "": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on CPU tensors
HAS_TRITON = importlib.util.find_spec("triton") is not None
LEAST_CAPABILITY = (8, 0)  # of a GPU: what Triton supports, and its kernels here are compiled for in the tests
# 4 times the FLOP that a processor does while it moves a byte, about 16 and 250: for each column a block of R rows has
# 2 R D FLOP in a product, and moves 8 D bytes of the table's gradient. On CUDA ``cosup.steps`` says more.
LEAST_ROWS = {"cpu": 64, "cuda": 1024}
ROW_STEP = {"cuda": 256}  # rows of a block: whole tiles of the vendor's products
# Numbers of a 16-bit gradient up to which its product is summed in float32 apart: where a GPU has few tiles to make,
# cuBLAS splits their long sums among processors and joins the parts in 16 bits.
FEW = {"cuda": 1 << 23}
STRIP = 1 << 20  # elements multiplied at once on a CPU: about what its cache holds
COLUMN_PARTS = 8  # of ``tile_stats.MOST_PARTS``
FUSED_COLUMNS, FUSED_FIELDS = 128, 5  # of ``product_stats``: columns that share one statistic, and what that takes
REFERENCE_COPIES = 9  # tiles that the PyTorch kernels hold at once at most, by count of their temporaries
_workspaces: dict[torch.device, int] = {}  # bytes where no budget is given


class Problem(NamedTuple):
    x: Tensor  # [N, D]
    w: Tensor  # [M, D]
    target: Tensor  # [N] int64, -1 where the row is ignored; among the columns of all ranks
    scale: Tensor  # scalar, in the dtype of the statistics
    bias: Tensor | None = None  # [M], in the dtype of the statistics
    row_id: Tensor | None = None  # [N] int64
    col_id: Tensor | None = None  # [M] int64
    softcap: float = 0.0
    soft: Tensor | None = None  # [M], column weights of the soft targets
    x2: Tensor | None = None  # [N, K], with w2 a second product, added to the first: logits x w^T + x2 w2^T
    w2: Tensor | None = None  # [M, K]
    margin: float = 0.0  # taken from the target's inner product
    limit: Tensor | None = None  # [N], columns are left out whose scaled inner product is above, the target excepted
    symmetric: bool = False  # whether statistics of the columns are asked too
    sigmoid: bool = False  # each pair's own loss: gradients need no statistic
    triangle: bool = False  # w is x: each pair of different rows is visited once, where its column is the later one
    rows: Tensor | None = None  # [n <= N] int64, the rows to visit, in this order; None: all of them, as they are
    skip: Tensor | None = None  # [N] bool, rows visited whose contents must not matter; None: none
    kept: Tensor | None = None  # int32 scalar on the device: ``rows`` are all, and those after so many are skipped
    positives: Positives | None = None  # of which rows have several; their target then has no part in the gradient
    col0: int = 0  # first of w's columns among those of all ranks,
    columns: int = 0  # of which there are so many
    shard: Shard | None = None  # of a table over several ranks whose statistics are merged; None: w is visited alone
    workspace_bytes: int = 0  # budget beside all this, outputs and gradients
    own: Tensor | None = None  # [N], the target's inner product where tiles are rounded to 16 bits
    any_budget: bool = False  # whether it may be exceeded where even the smallest blocks need more


class RowWeights(NamedTuple):
    """Weights of a row in the loss, each [N]: b nll + c lse - e sum_m soft[m] z[m] + q lse^2 / 2 + h entropy.

    So dz[n, m] = (b + c + q lse - h (log p[n, m] + entropy)) p[n, m] - b [m == target] - e soft[m].
    """

    b: Tensor
    c: Tensor | None = None
    e: Tensor | None = None
    q: Tensor | None = None
    h: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> RowWeights:
        b, *others = self
        return RowWeights(f(b), *(None if v is None else f(v) for v in others))

    def rows(self, r: slice) -> RowWeights:
        return self.map(lambda v: v[r])


class Columns(NamedTuple):
    """The columns' own softmax, over the rows."""

    state: ColumnState
    weight: Tensor | None = None  # [M], of each column's log-sum-exp in the loss

    def coefficients(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and factor of exp(z - shift) in the gradient."""
        assert self.weight is not None
        shift = torch.where(self.state.sum == 0, 0.0, self.state.max)
        return shift, _over(self.weight * scale, self.state.sum)


class Need(NamedTuple):
    """Which gradients are asked."""

    x: bool = False
    w: bool = False
    bias: bool = False
    x2: bool = False
    w2: bool = False


EVERY = Need(True, True, True, True, True)


def walk(p: Problem, plan: Plan, backend: str, *, weights: RowWeights | None = None, known: RowState | None = None,
         columns: Columns | None = None, need: Need | None = None, rank: bool = False,
         state: RowState | None = None, dx_sum: Tensor | None = None):  # fmt: skip
    """One sweep over all tiles. Vectors over rows are over ``p.rows`` where those are given.

    Args:
        weights: Weights of the rows in the loss whose gradients are asked, of b alone if ``p.sigmoid``; None: none
            are asked.
        known: Final max, sum and dot of each row; None: this sweep computes the statistics. Without it, gradients need
            tiles of whole rows, unless ``p.sigmoid``.
        columns: Their statistic, to be filled by this sweep or, with ``known``, final. Without ``known``, gradients
            need one tile.
        rank: Whether ``RowState.above`` will be read.
        state: The statistics of columns visited before, to go on from; None: there were none.
        dx_sum: [N, D] in the dtype of the statistics, what they gave of x's gradient: to be added to, in place.

    Returns:
        RowState (``known`` where that was given), and the gradients of x, w, bias, x2, w2; None for one not asked.
    """
    n, m, need = len(p.target), len(p.w), need or Need()
    kernels = tile_kernels(backend, p.x, p.sigmoid)
    before = state
    state = known or state or RowState.empty(n, p.scale)
    fused = plan.merged_cols > 1  # no logits: their products are merged as they are made
    at_once = known is not None or p.sigmoid  # strips become gradients while the cache holds them
    whole = (weights is not None and not p.sigmoid) or rank or fused  # else all strips go through the same memory
    rows, cols = min(plan.block_rows, n), plan.block_cols if whole else plan.strip_cols
    cols = padded(-(-cols // plan.merged_cols))
    if p.positives is not None and not host_reads(p.x):
        cols = padded(cols + 1)  # a spare one for pairs that are elsewhere
    if rank and known is None and before is None and (fused or plan.block_cols < m or p.shard is not None):
        assert backend != NARROW  # whose logits must not be compared with exact ones
        state.target.copy_(_target_logits(p, plan))
    tile_dtype = p.x.dtype if backend == NARROW else p.scale.dtype
    rows, cols = gemm.round_rows(p.x, rows), cols * (FUSED_FIELDS if fused else 1)
    tile_buffer = torch.empty(rows, cols, dtype=tile_dtype, device=p.x.device)
    if backend == NARROW:
        assert (p.rows is None or p.kept is not None) and p.x2 is None
        p = p._replace(own=kernels.target_dots(p.x, p.w, p.target, p.col0, p.rows))
    if weights is not None:
        assert at_once or (plan.block_cols >= m and (columns is None or plan.block_rows >= n))
        weights = weights.map(lambda v: v * p.scale)  # the chain from u = scale * dot to dot
    products = [_Product(p, p.x, p.w, need.x, need.w, plan, dx_sum)]
    if p.x2 is not None and p.w2 is not None:
        products.append(_Product(p, p.x2, p.w2, need.x2, need.w2, plan))
    dbias = torch.zeros(m, dtype=p.scale.dtype, device=p.x.device) if need.bias else None
    for s in _spans(0, m, plan.block_cols):
        for product in products:
            product.start_slab(s)
        for r in _spans(0, n, plan.block_rows):
            height = r.stop - r.start
            for product in products:
                product.start_block(r)
            counts = {} if products[0].kept is None else {"count": products[0].kept}
            coefficients = None
            positives = None if p.positives is None else p.positives.block(r)
            if weights is not None and at_once:
                coefficients = _block_coefficients(p, weights, state, columns, r, positives)
            strips: list[tuple[slice, Tensor]] = []
            if fused:
                kernels.product_stats(products[0].x_r, p.w[s], state.rows(r), tile_buffer, rank, *_features(p, r, s))
            else:
                tile = tile_buffer[: gemm.round_rows(p.x, height), : s.stop - s.start]
                tile[height:] = 0  # stays so: only products take these rows
                start = max(s.start, r.start // ALIGN * ALIGN) if p.triangle else s.start
                starts = [(c, c.start - s.start if whole else 0) for c in _spans(start, s.stop, plan.strip_cols)]
                strips = [(c, tile[:, at : at + c.stop - c.start]) for c, at in starts]
            for c, every_row in strips:
                strip = every_row[:height]
                for product in products:
                    product.dots(c, strip, first=product is products[0])
                if p.triangle and c.start < r.stop:
                    earlier = torch.ones_like(strip[:, : r.stop - c.start], dtype=torch.bool).tril_(r.start - c.start)
                    strip[:, : r.stop - c.start].masked_fill_(earlier, float("-inf"))
                if known is None and positives is not None:
                    positives.read(strip, p.col0 + c.start, p.scale, _slice(p.bias, c))
                if known is None and columns is not None:
                    kernels.column_stats(strip, columns.state.columns(c), *_features(p, r, c))
                if known is None and not whole:
                    kernels.tile_stats(strip, state.rows(r), *_features(p, r, c), **counts)
                if coefficients is not None:
                    _add_gradients(p, kernels, products, dbias, r, c, every_row, state.max[r], coefficients, counts)
            if known is None and whole and not fused:
                kernels.tile_stats(tile[:height], state.rows(r), *_features(p, r, s), **counts)
            if known is None and p.shard is not None and s.stop == m:
                merge(state.rows(r), p.shard.holds(p.target[r], m), p.shard, rank)
            if weights is None:
                continue
            if not at_once:
                coefficients = _block_coefficients(p, weights, state, columns, r, positives)
                for c, strip in strips:
                    _add_gradients(p, kernels, products, dbias, r, c, strip, state.max[r], coefficients, counts)
            for product in products:
                product.end_block()
        for product in products:
            product.end_slab()
    if dbias is not None:
        dbias /= p.scale
    if p.shard is not None:
        for product in products:
            if product.dx is not None:
                sum_over_ranks(product.dx, p.shard)
    dx2, dw2 = (products[1].dx, products[1].dw) if len(products) > 1 else (None, None)
    return state, products[0].dx, products[0].dw, dbias, dx2, dw2


class _Product:
    """x @ w.T, one of the products that the logits are the sum of, and its gradients as they grow.

    The gradient itself takes the sums where it can. Apart are kept, in float32, those of 16-bit gradients that are made
    of several parts, and the rows of a block that were picked from x.
    """

    def __init__(self, p: Problem, x: Tensor, w: Tensor, need_x: bool, need_w: bool, plan: Plan,
                 dx_sum: Tensor | None = None):  # fmt: skip
        self.p, self.x, self.w = p, x, w
        n, m = len(p.target), len(w)
        idle = n == 0 or m == 0
        new_x = torch.zeros_like if idle or (p.rows is not None and p.kept is None) else torch.empty_like
        self.dx = new_x(x, **_CONTIGUOUS) if need_x else None
        self.dw = (torch.zeros_like if idle else torch.empty_like)(w, **_CONTIGUOUS) if need_w else None
        self.several_rows, several_cols = plan.block_rows < n, plan.block_cols < m
        few_rows, few_cols = (not idle and _are_few(size, x) for size in (plan.block_rows, plan.block_cols))
        self.rows_apart = plan.strip_cols < min(plan.block_cols, m) or few_rows
        self.cols_apart = self.several_rows or few_cols
        self.dx_before = dx_sum is not None
        self.dx_sum = _accumulator(self.dx, n, several_cols) if dx_sum is None else dx_sum
        self.dx_r: Tensor | None = None

    def start_slab(self, s: slice) -> None:
        self.s = s
        self.dw_sum: Tensor | None = None  # the last one's memory is free before the next one's is taken
        self.dw_sum = _accumulator(self.dw, s.stop - s.start, self.cols_apart)

    def start_block(self, r: slice) -> None:
        self.r = r
        self.x_r, self.dx_r = self.x[:0], None  # as above
        self.kept = _kept(self.p, r)
        self.x_r = _take(self.p, self.x, r, self.kept)
        if more := gemm.round_rows(self.x, r.stop - r.start) - (r.stop - r.start):
            self.x_r = F.pad(self.x_r, (0, 0, 0, more))

    def dots(self, c: slice, tile: Tensor, *, first: bool) -> None:
        if first:
            gemm.dots(self.x_r, self.w[c], tile, count=self.kept)
        else:
            gemm.add(tile, self.x_r, self.w[c].mT, first=False)

    def add(self, c: slice, coef: Tensor) -> None:
        """Gradients of what the strip c gives."""
        if self.dx is not None:
            if self.dx_r is None:
                self.dx_r, self.apart = self._rows_total(self.dx)
            fresh = not self.dx_before and c.start == (self.s.start if self.apart else 0)
            gemm.add(self.dx_r, coef, self.w[c], first=fresh, count=self.kept, of_rows=True)
        if self.dw is not None:
            first = self.s.start
            total = self.dw[c] if self.dw_sum is None else self.dw_sum[c.start - first : c.stop - first]
            gemm.add(total, coef.mT, self.x_r, first=self.r.start == 0, count=self.kept)

    def end_block(self) -> None:
        last = self.s.stop == len(self.w)
        if self.dx is not None and self.dx_r is not None and (self.apart or (self.dx_sum is not None and last)):
            if self.p.rows is None:
                self.dx[self.r].copy_(self.dx_r)
            elif self.kept is not None:
                from cosup.kernels.rows import put  # as gather

                put(self.dx_r, self.p.rows[self.r], self.kept, self.dx)
            else:
                self.dx.index_add_(0, self.p.rows[self.r], self.dx_r.to(self.dx.dtype))

    def end_slab(self) -> None:
        if self.dw is not None and self.dw_sum is not None:
            self.dw[self.s] = self.dw_sum

    def _rows_total(self, dx: Tensor) -> tuple[Tensor, bool]:
        """Where the block's rows of the gradient are summed, and whether that is apart from ``dx`` and ``dx_sum``."""
        if self.dx_sum is not None:
            return self.dx_sum[self.r], False
        if self.p.rows is None and not (self.rows_apart and dx.element_size() < 4):
            return dx[self.r], False
        dtype = dx.dtype if self.kept is not None and not self.rows_apart else self.p.scale.dtype
        return torch.empty(self.r.stop - self.r.start, dx.shape[1], dtype=dtype, device=dx.device), True


def cost(x: Tensor, backend: str, *, gathered: bool, counted: bool = False, more_features: int = 0,
         symmetric: bool = False, sigmoid: bool = False, need: Need = EVERY) -> Cost:  # fmt: skip
    """Bytes per unit that :func:`walk` holds for operands like x; ``gathered``: rows are picked or masked; ``counted``:
    on the device, so that x's gradient is put back; ``more_features``: of a second product; ``symmetric``: with the
    columns' statistics; ``sigmoid``: with a bias; ``need``: the gradients asked."""
    d, item = x.shape[1] + more_features, x.element_size()
    wide = max(item, 4)
    on_cpu = x.device.type == "cpu"
    fused = backend == "fused" and not more_features
    fields = FUSED_FIELDS if fused else REFERENCE_COPIES if backend == "reference" else 1
    product = item if gemm.returns_product(x) and not fused else 0
    sums = 4 if item < 4 else 0  # 16-bit gradients are summed in float32
    few = FEW.get(x.device.type, 0) if item < 4 else 0
    of_x, of_w = _asked(x, more_features, need)
    return Cost(
        strip=STRIP if on_cpu and not fused else 0,
        features=d,
        of_x=of_x,
        of_w=of_w,
        least_rows=LEAST_ROWS.get(x.device.type, 1024),
        row_step=ROW_STEP.get(x.device.type, 1),
        merged_cols=FUSED_COLUMNS if fused else 1,
        tile=item if backend == NARROW else wide * fields,
        dots=product,
        coef=product * {torch.bfloat16: 2, torch.float16: 1}.get(x.dtype, 0),  # apart; oneDNN packs bfloat16 ones
        chain=gemm.CHAIN,
        packed=product if item == 4 else 0,  # by oneDNN
        product=product + (4 if product and item < 4 else 0),  # 16-bit ones are widened to be added
        row=6 * wide + 6 * wide + 16,  # RowState; coefficients; packed targets, or their logits, and row numbers
        # ColumnState; weights and their coefficients; parts of the statistic, which a GPU joins
        column=6 * wide + (0 if on_cpu else 3 * wide * COLUMN_PARTS) if symmetric else wide * sigmoid,
        block_row=d * item + (d * item if item >= 4 else 0) if gathered else 0,
        put_row=of_x * item if counted else 0,
        table_row=of_w * sums,
        query_row=of_x * sums,
        few=few * d // max(1, d - more_features),  # as the first product counts them
        second=4 * more_features if few else 0,
        strips_alone=sigmoid,
        moves=None if on_cpu else moves(x, backend, gathered=gathered, counted=counted, more_features=more_features,
                                        symmetric=symmetric, need=need),
    )  # fmt: skip


def moves(x: Tensor, backend: str, *, gathered: bool, counted: bool, more_features: int = 0,
          symmetric: bool = False, need: Need = EVERY) -> Moves:  # fmt: skip
    """What :func:`walk` multiplies and moves for operands like x; arguments as of :func:`cost`."""
    item = x.element_size()
    of_x, of_w = _asked(x, more_features, need)
    return Moves(
        features=x.shape[1] + more_features,
        item=item,
        tile=item if backend == NARROW else max(item, 4),
        few=FEW.get(x.device.type, 0) if item < 4 else 0,
        gathered=gathered,
        counted=counted,
        rounded=backend == NARROW,
        symmetric=symmetric,
        of_x=of_x,
        of_w=of_w,
        rates=RATES["cpu" if x.device.type == "cpu" else "cuda", item],
    )


def _asked(x: Tensor, more_features: int, need: Need) -> tuple[int, int]:
    """Features of x, and of w, whose gradients are asked; with those of a second product."""
    of_x, of_w = need.x * x.shape[1] + need.x2 * more_features, need.w * x.shape[1] + need.w2 * more_features
    return of_x, of_w


def default_workspace(device: torch.device) -> int:
    """Bytes where no budget is given: :func:`share_of` the free memory. Looked up once, so that all calls of a process
    take the same blocks."""
    if device not in _workspaces:
        set_default_workspace(device, share_of(_free_bytes(device), device.type))
    return _workspaces[device]


def share_of(free: int, kind: str) -> int:
    """A sixteenth of free bytes, at most 4 GiB on CUDA, on a CPU 256 MiB and a power of 2; at least 16 MiB."""
    most = MOST_WORKSPACE.get(kind, LEAST_WORKSPACE)
    share = free // FREE_SHARE
    if kind == "cpu":
        share = 1 << (share.bit_length() - 1 if share else 0)
    return min(most, max(LEAST_WORKSPACE, share))


def set_default_workspace(device: torch.device, workspace_bytes: int) -> None:
    """Use this budget from now on where none is given: that of an earlier process, for the same blocks and bits."""
    _workspaces[device] = workspace_bytes


def _free_bytes(device: torch.device, root: Path = Path("/")) -> int:
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, but free
        return torch.cuda.mem_get_info(device)[0] + unused
    free = [1024 * int(kb) for kb in re.findall(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))]
    return max(0, min([*free, *_free_in_cgroups(root)], default=FREE_SHARE * MOST_WORKSPACE["cpu"]))  # none: no Linux


def _free_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left under each memory limit of this process's control group and of those above it.

    Source: docs.kernel.org/admin-guide/cgroup-v2.html, and cgroup-v1/memory.html.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in CGROUPS or not path:
            continue
        folder, limit, usage, cache = CGROUPS[kind]
        group = root / folder / path.lstrip("/")
        for place in (group, *group.parents):  # a container may see its own group as the root, or not see it
            most, used, stat = (_text(place / name).strip() for name in (limit, usage, "memory.stat"))
            if most.isdigit() and used.isdigit():  # else "max", or no such file
                reclaimable = re.findall(rf"^{cache} (\d+)$", stat, re.MULTILINE)
                yield int(most) - int(used) + sum(map(int, reclaimable))


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def resolve(backend: str, x: Tensor) -> str:
    """The kernels that ``backend="auto"`` means for a tensor, or the named ones if they can run there.

    Raises:
        ValueError: An unknown backend, or one that cannot run on this device and dtype.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    device, triton = x.device.type, runs_triton(x.device)
    # those of bfloat16 are wrong in the interpreter
    fused_dtypes = [torch.float16, torch.bfloat16] if device == "cuda" else [torch.float16]
    runs = {
        "reference": True,
        "native": device == "cpu" and x.dtype != torch.float64 and bool(native.AVAILABLE),
        "triton": triton and x.dtype != torch.float64,
        "fused": triton and x.dtype in fused_dtypes,
    }
    if backend == "auto":
        return next(
            name for name in ("native", "triton", "reference") if runs[name] and (name, device) != ("triton", "cpu")
        )
    if not runs[backend]:
        old = device == "cuda" and HAS_TRITON and not triton
        where = f"{device} below compute capability {'.'.join(map(str, LEAST_CAPABILITY))}" if old else device
        raise ValueError(f"backend {backend!r} does not run on {where} with {x.dtype}; see `cosup doctor`")
    return backend


def runs_triton(device: torch.device) -> bool:
    """Whether Triton is there and its kernels run on this device, or in the interpreter."""
    if device.type != "cuda":
        return HAS_TRITON and INTERPRETED
    if not torch.cuda.is_available():  # tensors that hold nothing
        return HAS_TRITON
    return HAS_TRITON and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


# torch.compile does not look into it: what torch.compiler.assume_constant_result does, which imports the whole compiler
setattr(runs_triton, "_dynamo_marked_constant", True)  # noqa: B010

def narrowed(backend: str, x: Tensor, scale: float | None) -> str:
    """The kernels on tiles of the operands' own dtype, where they are as exact as plain PyTorch: if the host knows that
    the logits are no more than so many times the products."""
    known = scale is not None and scale <= NARROW_SCALE
    return NARROW if known and backend == "triton" and x.is_cuda and x.dtype == torch.bfloat16 else backend


class Kernels(NamedTuple):
    tile_stats: Callable[..., None]
    column_stats: Callable[..., None]
    tile_grad: Callable[..., None]
    product_stats: Callable[..., None] = lambda *_: None
    target_dots: Callable[..., Tensor] = reference.target_dots
    row_values: Callable[..., RowValues] = reference.row_values
    scale: Callable[..., None] = reference.scale


def tile_kernels(backend: str, x: Tensor, sigmoid: bool = False) -> Kernels:
    """The kernels of a backend that :func:`resolve` gave."""
    if backend == "native":
        if sigmoid:
            return Kernels(native.sigmoid_stats, native.column_stats, native.sigmoid_grad)
        return Kernels(native.tile_stats, native.column_stats, native.tile_grad)
    if backend == "reference":
        if x.dtype != torch.float64 and not (native.AVAILABLE if x.device.type == "cpu" else runs_triton(x.device)):
            _warn_slow()
        if sigmoid:
            return Kernels(reference.sigmoid_stats, reference.column_stats, reference.sigmoid_grad)
        return Kernels(reference.tile_stats, reference.column_stats, reference.tile_grad)
    from cosup.kernels.product_stats import product_stats  # Triton: absent on some platforms
    from cosup.kernels.row_values import row_values
    from cosup.kernels.scale import scale
    from cosup.kernels.target_dots import target_dots
    from cosup.kernels.tile_grad import tile_grad
    from cosup.kernels.tile_sigmoid import sigmoid_grad, sigmoid_stats
    from cosup.kernels.tile_stats import column_stats, tile_stats

    if sigmoid:
        return Kernels(sigmoid_stats, column_stats, sigmoid_grad, scale=scale)
    return Kernels(tile_stats, column_stats, tile_grad, product_stats, target_dots, row_values, scale)


@functools.cache
def _warn_slow() -> None:
    warnings.warn("cosup runs its slower PyTorch path: this device's kernels are missing (`cosup doctor` says more)",
                  stacklevel=2)  # fmt: skip


def _spans(start: int, stop: int, block: int) -> list[slice]:
    return [slice(i, min(i + block, stop)) for i in range(start, stop, max(block, 1))]


def _slice(vector: Tensor | None, part: slice) -> Tensor | None:
    return None if vector is None else vector[part]


def _features(p: Problem, r: slice, c: slice):
    """What the tile kernels must know of rows r and columns c."""
    ids = _slice(p.row_id, r), _slice(p.col_id, c)
    table = _slice(p.bias, c), *ids, p.softcap, _slice(p.soft, c)
    return p.col0 + c.start, p.target[r], p.scale, *table, p.margin, _slice(p.limit, r), _slice(p.own, r)


def _take(p: Problem, x: Tensor, r: slice, kept: Tensor | None) -> Tensor:
    if p.rows is not None and kept is not None:
        from cosup.kernels.rows import gather  # Triton: absent on some platforms

        return gather(x, p.rows[r], kept)
    if p.rows is not None:
        return x[p.rows[r]]
    if p.skip is not None:
        return x[r].masked_fill(p.skip[r, None], 0.0)
    return x[r]


def _kept(p: Problem, r: slice) -> Tensor | None:
    """How many of the rows r come before those to skip, where the device has counted."""
    if p.kept is None or (r.start == 0 and r.stop == len(p.target)):
        return p.kept
    return (p.kept - r.start).clamp_(0, r.stop - r.start)


def _target_logits(p: Problem, plan: Plan, *, scaled_only: bool = False) -> Tensor:
    """Targets' logits before the sweep, for ranks when a target may stand in a later slab or on another rank, and
    without bias and softcap for limits of what is a negative; in the tile's room."""
    logits = torch.empty_like(p.target, dtype=p.scale.dtype)
    operands = [(p.x, p.w), *([(p.x2, p.w2)] if p.x2 is not None and p.w2 is not None else [])]
    d = max(1, sum(x.shape[1] for x, _ in operands))
    for r in _spans(0, len(p.target), max(1, plan.block_rows * plan.block_cols // (4 * d))):
        target_r = (p.target[r] - p.col0).clamp(0, len(p.w) - 1)
        dot_r = torch.zeros_like(logits[r])
        for x, w in operands:
            product_RD = _take(p, x, r, _kept(p, r)).to(p.scale.dtype) * w[target_r]
            # raised by what a GEMM may round otherwise: an equal logit must not count as above
            raised_r = product_RD.sum(1) + 4 * torch.finfo(p.scale.dtype).eps * product_RD.abs().sum(1)
            wide = x.is_cuda or plan.merged_cols > 1 or p.kept is not None
            dot_r += raised_r if wide else raised_r.to(x.dtype)  # rounded as products are
        u_r = dot_r * p.scale
        if p.bias is not None and not scaled_only:
            u_r += p.bias[target_r]
        logits[r] = p.softcap * torch.tanh(u_r / p.softcap) if p.softcap and not scaled_only else u_r
    if p.shard is not None:
        logits.masked_fill_(~p.shard.holds(p.target, len(p.w)), 0.0)
        sum_over_ranks(logits, p.shard)
    return logits


def limited(p: Problem, plan: Plan, gap: float) -> Problem:
    """Columns whose inner product is above the target's by more than ``gap`` left out."""
    return p._replace(limit=_target_logits(p, plan, scaled_only=True) + gap * p.scale)


def best_positives(p: Problem, plan: Plan) -> Problem:
    """Where rows have several positives, the highest of each as its target: ranks are counted from there."""
    if p.positives is None:
        return p
    logit = torch.empty_like(p.positives.logit)
    for part in _spans(0, len(logit), max(1, plan.block_rows * plan.block_cols // (2 * max(1, p.x.shape[1])))):
        row, col = p.positives.row[part], p.positives.col[part] - p.col0
        u = (p.x[row].to(p.scale.dtype) * p.w[col]).sum(1) * p.scale
        logit[part] = u if p.bias is None else u + p.bias[col]
    return p._replace(target=p.positives._replace(logit=logit).best())


def _block_coefficients(p: Problem, weights: RowWeights, state: RowState, columns: Columns | None, r: slice,
                        positives: Positives | None):  # fmt: skip
    """What ``tile_grad`` takes of a block's rows, and of all columns; and a function that puts the coefficients of the
    block's pairs, where rows have several positives, into a tile of them that starts at a column."""
    if p.sigmoid:
        return weights.b[r], weights.b[r], None, None, (), None
    a, b, e, h = _row_coefficients(weights.rows(r), state.rows(r))
    if positives is not None:
        coef = positives.gradient(state.max[r], a, b, e, p.soft, p.col0)
        return a, torch.zeros_like(b), e, h, (), functools.partial(positives.write, coef=coef)
    if columns is None or columns.weight is None:
        return a, b, e, h, (), None
    of_target = columns.weight[(p.target[r] - p.col0).clamp(0, len(p.w) - 1)]  # not read where it is elsewhere
    return a, b + of_target * p.scale, e, h, columns.coefficients(p.scale), None


def _add_gradients(p: Problem, kernels: Kernels, products: list[_Product], dbias: Tensor | None, r: slice, c: slice,
                   strip: Tensor, shift_r: Tensor, coefficients, counts: dict[str, Tensor]) -> None:  # fmt: skip
    """Turn a strip into gradient coefficients, and add what they give. Its rows beyond r are zero."""
    a, b, e, h, of_columns, of_pairs = coefficients
    features = (*_features(p, r, c), e, h, *(v[c] for v in of_columns))
    tile_grad = functools.partial(kernels.tile_grad, **counts)
    coef = _coefficients(tile_grad, strip[: r.stop - r.start], p.x.dtype, shift_r, a, b, features, of_pairs)
    if len(coef) < len(strip):
        coef = strip  # of the same memory
    for product in products:
        product.add(c, coef)
    if dbias is not None:
        dbias[c] += (coef if strip.is_cuda else strip).sum(0, dtype=p.scale.dtype)


def _row_coefficients(v: RowWeights, state: RowState) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """a, b, e, h of ``tile_grad``, with log p + entropy = (z - max) - E[z - max]."""
    a = v.b if v.c is None else v.b + v.c
    if v.q is not None:
        a = a + times(v.q, state.lse())
    if v.h is not None:
        a = a + _over(times(v.h, state.dot), state.sum)
    return _over(a, state.sum), v.b, v.e, None if v.h is None else -_over(v.h, state.sum)


def _over(weight: Tensor, total: Tensor) -> Tensor:
    """weight / total; 0 in an ignored row, which has neither."""
    return (weight / total).masked_fill_(weight == 0, 0.0)


def _coefficients(tile_grad, tile: Tensor, dtype: torch.dtype, shift_r, a_r, b_r, features, of_pairs) -> Tensor:
    """Gradient coefficients of a tile in the operands' dtype: in its own memory, but for 16-bit ones on a CPU."""
    on_gpu = tile.is_cuda and tile.dtype != dtype
    out = tile.view(dtype)[:, : tile.shape[1]] if on_gpu else tile  # at the front of each float32 row
    tile_grad(tile, out, shift_r, a_r, b_r, *features)
    if of_pairs is not None:
        of_pairs(out, features[0])
    return out if on_gpu else tile.to(dtype)


def _accumulator(grad: Tensor | None, n: int, apart: bool) -> Tensor | None:
    """Float32 sums for n rows of a 16-bit gradient that wants them apart; None: the gradient itself will do."""
    if grad is None or not apart or grad.element_size() >= 4:
        return None
    return torch.empty(n, grad.shape[1], dtype=torch.float32, device=grad.device)


def _are_few(n: int, x: Tensor) -> bool:
    """Whether a gradient of n rows like x's has so few numbers that the device's products round their sums."""
    return n * x.shape[1] <= FEW.get(x.device.type, -1)
