"""What a planned walk holds, launches and moves, and how long that takes: without the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cosup import ops
from cosup.checks import check_reduction
from cosup.plan import Plan, Strategy
from cosup.softmax import weights_known
from cosup.steps import RATES, product_seconds, seconds, steps
from cosup.walk import Need, Problem, default_workspace, moves, narrowed, resolve, share_of

LOSSES = {"linear_cross_entropy": 1.0, "info_nce": 20.0}  # the scale of the logits, where none is given
MIB = 1 << 20
NEED = {None: Need(x=True, w=True), "input": Need(w=True), "weight": Need(x=True)}  # by what is frozen


class _Rows(NamedTuple):
    """What a plan asks of a tensor, without one: its device may be absent."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def element_size(self) -> int:
        return self.dtype.itemsize


class Prediction(NamedTuple):
    """What :func:`plan_for` returns.

    Attributes:
        strategy: "gradients in forward" (three products) or "statistics, then recompute" (four).
        block_rows, block_cols: Of a tile of logits.
        holds_all_logits: Whether one tile has all rows and all columns.
        budget_bytes, workspace_bytes: What is allowed, and the peak beside inputs, outputs and gradients. The second is
            above the first only where the smallest blocks need more than a default budget.
        kernels: The tile kernels; "triton-16bit": on tiles of bfloat16.
        counted: Whether the device counts the rows that are not ignored, and multiplies those alone.
        bytes_moved: By step, forward and backward. Matrices alone: what has a number or a few for a row or column is
            left out.
        launches: The same; of kernels over matrices.
        step_seconds: Of each step, by the rates.
        product_seconds: The bare products: two, or three with both gradients.
        seconds: All steps, or the host's time where that is longer.
        time_over_products: Their quotient.
        flops_per_second, bytes_per_second, rates: What was assumed of the device, and from where.
    """

    strategy: str
    block_rows: int
    block_cols: int
    holds_all_logits: bool
    budget_bytes: int
    workspace_bytes: int
    kernels: str
    counted: bool
    bytes_moved: dict[str, int]
    launches: dict[str, int]
    step_seconds: dict[str, float]
    product_seconds: float
    seconds: float
    time_over_products: float
    flops_per_second: float
    bytes_per_second: float
    rates: str


def plan_for(n: int, d: int, m: int, *, loss: str = "linear_cross_entropy", dtype: torch.dtype = torch.bfloat16,
             device: str | torch.device = "cuda", free_bytes: int | None = None, workspace_bytes: int | None = None,
             symmetric: bool = False, reduction: str = "mean", frozen: str | None = None) -> Prediction:  # fmt: skip
    """The plan that a loss takes for [N, D] and [M, D], forward and backward, and its predicted cost.

    Nothing is computed, and the device need not be there: without a CUDA device the plan is that of a Hopper GPU with
    Triton. The plan is arithmetic and exact; time is a model, from rates that were measured on an H100 and on one CPU.

        time = sum over products of max(FLOP / rate, bytes / rate) + sum over other steps of bytes / rate

    Args:
        n: Rows of the input, or queries.
        d: Their features.
        m: Classes, or candidates.
        loss: "linear_cross_entropy" (any target may be ignored) or "info_nce" (a temperature of 0.05, unit vectors
            given), with the defaults of their other options.
        dtype: Of both operands.
        device: "cpu" or "cuda".
        free_bytes: Free memory of the device, of which the default budget is a share; None: asked of the device.
        workspace_bytes: The budget; None: the default one.
        symmetric: As of :func:`cosup.info_nce`.
        reduction: "mean", "sum" or "none".
        frozen: "input" or "weight" (the queries, the candidates): the one that asks no gradient; None: both ask.

    Returns:
        :class:`Prediction`. On a CPU bytes are moved as if its cache held nothing: an upper bound. What the PyTorch
        kernels launch and move beside (float64 on CUDA) is left out.

    Raises:
        ValueError: A wrong option; a budget below what the smallest blocks need; no ``free_bytes``, no
            ``workspace_bytes`` and no such device.
    """  # fmt: skip
    for name, size, least in (("n", n, 1), ("d", d, 1), ("m", m, 1), ("free_bytes", free_bytes, 0),
                              ("workspace_bytes", workspace_bytes, 0)):  # fmt: skip
        if size is None and least == 0:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {(*LOSSES,)}, got {loss!r}")
    if symmetric and loss != "info_nce":
        raise ValueError(f'symmetric must be of loss "info_nce", got {loss!r}')
    if frozen not in NEED:
        raise ValueError(f"frozen must be one of {(*NEED,)}, got {frozen!r}")
    check_reduction(reduction)
    if str(device).partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f'device must be "cpu" or "cuda", got {str(device)!r}')
    device = torch.device(device)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype, got {dtype!r}")
    if (device.type, dtype.itemsize) not in RATES or not dtype.is_floating_point:
        raise ValueError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    budget = workspace_bytes if workspace_bytes is not None else _default_budget(device, free_bytes)
    x: Any = _Rows(torch.Size([n, d]), dtype, device)
    w = torch.empty(m, d, dtype=dtype, device="meta")
    skips = loss == "linear_cross_entropy" and device.type == "cuda"  # a CPU picks the others: here none is ignored
    need = NEED[frozen]
    plan, kernels, counted = planned(x, w, n, budget, scale=LOSSES[loss], skips=skips, symmetric=symmetric, need=need,
                                     reduction=reduction, any_budget=workspace_bytes is None)  # fmt: skip
    moved = moves(x, kernels, gathered=skips, counted=counted, symmetric=symmetric, need=need)
    sweeps, scaled = 1 if plan.strategy is Strategy.GRADS_IN_FORWARD else 2, weights_known(reduction, dtype)
    found = steps(n, m, plan.block_rows, plan.block_cols, moved, sweeps=sweeps, scaled=scaled)
    time = seconds(found, moved.rates)
    products = product_seconds(n, m, moved, 3 if frozen is None else 2)
    return Prediction(
        strategy=plan.strategy.value, block_rows=plan.block_rows, block_cols=plan.block_cols,
        holds_all_logits=plan.block_rows >= n and plan.block_cols >= m, budget_bytes=budget,
        workspace_bytes=plan.workspace_bytes, kernels=kernels, counted=counted,
        bytes_moved={step.name: step.bytes for step in found}, launches={step.name: step.launches for step in found},
        step_seconds={step.name: step.seconds(moved.rates) for step in found}, product_seconds=products, seconds=time,
        time_over_products=time / products, flops_per_second=moved.rates.flops,
        bytes_per_second=moved.rates.bytes, rates=moved.rates.source,
    )  # fmt: skip


def show(found: Prediction) -> None:
    """Print the prediction."""
    from rich.console import Console
    from rich.table import Table

    table = Table("step")
    for column in ("launches", "MB moved", "ms"):
        table.add_column(column, justify="right")
    for step, size in found.bytes_moved.items():
        table.add_row(step, f"{found.launches[step]}", f"{size / 1e6:,.1f}", f"{1e3 * found.step_seconds[step]:.2f}")
    table.add_section()
    moved = sum(found.bytes_moved.values()) / 1e6
    table.add_row("together", f"{sum(found.launches.values())}", f"{moved:,.1f}", f"{1e3 * found.seconds:.2f}")
    every = ", all logits at once" if found.holds_all_logits else ""
    counted = ", rows that are not ignored counted by the device" if found.counted else ""
    print(f"{found.strategy}, in tiles of {found.block_rows:,} x {found.block_cols:,}{every}")
    Console().print(table)
    print(f"workspace: {found.workspace_bytes / MIB:,.1f} MiB; budget: {found.budget_bytes / MIB:,.1f} MiB")
    print(f"time: {found.time_over_products:.2f} of the bare products' {1e3 * found.product_seconds:.2f} ms")
    print(f"assumed: {found.flops_per_second / 1e12:,.3g} TFLOP/s, {found.bytes_per_second / 1e9:,.4g} GB/s")
    print(f"         {found.rates}")
    print(f"kernels: {found.kernels}{counted}")


def planned(x: Any, w: Tensor, n: int, workspace_bytes: int, *, scale: float | None, skips: bool,
            symmetric: bool = False, reduction: str = "mean", any_budget: bool = False,
            need: Need = NEED[None]) -> tuple[Plan, str, bool]:  # fmt: skip
    """The blocks of a loss and its gradients, its kernels, and whether rows are counted: as the operators decide it.

    Args:
        x, w: Operands, whose contents are not read.
        n: Rows to visit.
        scale: Of the logits; None: unknown to the host.
        skips: Whether rows are picked or masked.
    """
    known = weights_known(reduction, x.dtype)
    absent = x.device.type == "cuda" and not torch.cuda.is_available()
    kernels = resolve("auto", x) if not absent else "reference" if x.dtype == torch.float64 else "triton"
    kernels = narrowed(kernels, x, scale) if known else kernels
    target, number = torch.empty(n, dtype=torch.int64, device="meta"), torch.empty((), device="meta")
    p = Problem(x, w, target, number, skip=target if skips else None, symmetric=symmetric, columns=len(w),
                workspace_bytes=workspace_bytes, any_budget=any_budget)  # fmt: skip
    plan, counted = ops.blocks_of(p, kernels, need=need, weights_known=known)
    return plan, kernels, counted


def _default_budget(device: torch.device, free_bytes: int | None) -> int:
    if free_bytes is not None:
        return share_of(free_bytes, device.type)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("free_bytes or workspace_bytes must be given where there is no such device, got neither")
    if device.type == "cuda" and device.index is None:  # as tensors name it
        device = torch.device("cuda", torch.cuda.current_device())
    return default_workspace(device)
