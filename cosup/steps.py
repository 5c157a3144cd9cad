"""What a walk in given blocks launches, multiplies and moves, step by step, and how long that takes. Pure arithmetic.

Bytes are of matrices: operands and result of every launch once; vectors of N or M numbers are left out. A product of
U = 2 N M D FLOP takes its FLOP or its bytes, whichever take longer; every other step takes its bytes, after the others.

    parts of a gradient    one part: written once. Several, in float32: 4 + 8 (parts - 1) bytes a number, and one pass
                           that rounds the sums. So b blocks of rows cost about 8 b M D bytes, a second sweep a product
"""

from __future__ import annotations

from typing import NamedTuple


class Rates(NamedTuple):
    """What a device does in a second, and where that is known from."""

    flops: float
    bytes: float
    launch: float  # seconds that the host takes for a launch,
    call: float  # and at least for a call, forward and backward
    source: str


# By type of device and bytes of an operand's number; see bench/LOG.md.
_HOST = 20e-6, 2.0e-3  # 10 to 17 us by torch, 25 to 35 us by Triton; a call at 512 rows
_COPY, _CPU_BYTES = 3.0e12, 21e9
_CUDA_WIDE = Rates(
    362e12, _COPY, *_HOST,
    "bytes/s measured on an H100, FLOP/s assumed: TF32 at half of bfloat16's rate; full float32 takes longer",
)  # fmt: skip
RATES = {
    ("cuda", 2): Rates(725e12, _COPY, *_HOST, "measured on an H100: three products of 8192 x 4096 x 128256, a copy"),
    ("cuda", 4): _CUDA_WIDE,
    ("cuda", 8): _CUDA_WIDE,
    ("cpu", 2): Rates(780e9, _CPU_BYTES, 0, 0, "FLOP/s measured on 2 threads with AVX-512, bytes/s assumed"),
    ("cpu", 4): Rates(341e9, _CPU_BYTES, 0, 0, "FLOP/s measured on 2 threads with AVX-512, bytes/s assumed"),
    ("cpu", 8): Rates(170e9, _CPU_BYTES, 0, 0, "assumed: half of float32's FLOP/s"),
}


class Moves(NamedTuple):
    """What of a problem decides its steps, beside shapes and blocks."""

    features: int  # length D of the vectors
    item: int  # bytes of an operand's number
    tile: int  # bytes of a number of the tile
    few: int  # numbers of a 16-bit gradient up to which its product alone is summed apart, in float32
    gathered: bool  # rows are picked or masked
    counted: bool  # by the device
    rounded: bool  # the tile is, so that targets' products are made apart
    symmetric: bool
    of_x: int  # features of x whose gradient is asked,
    of_w: int  # and of w: all, or 0, or those of an adapter
    rates: Rates


class Step(NamedTuple):
    name: str
    launches: int
    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


def steps(n: int, m: int, rows: int, cols: int, moves: Moves, *, sweeps: int, scaled: bool = True) -> list[Step]:
    """Those of a loss and its gradients.

    Args:
        rows, cols: Of a tile.
        sweeps: 1 with the gradients in forward, else 2.
        scaled: Whether the backward pass multiplies what the forward pass has made: by 1 it moves nothing.
    """
    d, item, tile = moves.features, moves.item, moves.tile
    blocks, slabs, numbers = -(-n // rows), -(-m // cols), n * m
    tiles = blocks * slabs
    found = []
    if moves.gathered:
        found.append(Step("rows of x", sweeps * tiles, 0, sweeps * 2 * item * n * d * slabs))
    if moves.rounded:
        found.append(Step("targets' products", sweeps, 0, sweeps * 2 * item * n * d))
    operands = item * d * (n * slabs + m * blocks)
    found.append(Step("logits", sweeps * tiles, sweeps * 2 * numbers * d, sweeps * (operands + tile * numbers)))
    found.append(Step("statistics", tiles, 0, tile * numbers))
    if moves.symmetric:
        found.append(Step("columns' statistics", 2 * tiles, 0, tile * numbers))
    found.append(Step("coefficients", tiles, 0, (tile + item) * numbers))
    for name, of, vectors, parts, least, copies, others in (
        ("dX", moves.of_x, n, slabs, rows, blocks, m * blocks),
        ("dW", moves.of_w, m, blocks, cols, slabs, n * slabs),
    ):
        if not of:
            continue
        size, few = vectors * of, least * of <= moves.few
        apart = item < 4 and (parts > 1 or few)
        put = moves.counted and name == "dX"
        direct = 0 if apart else item * size  # what the product itself writes
        found.append(Step(name, tiles, 2 * numbers * of, item * (numbers + others * of) + direct))
        sums = (8 * parts + item) * size if apart else 2 * item * size * (put + parts - 1)
        found.append(Step(f"sums of {name}", copies * (apart or put), 0, sums))
    if scaled:
        found.append(Step("backward's scale", (moves.of_x > 0) + (moves.of_w > 0), 0, 0))
    return found


def seconds(found: list[Step], rates: Rates) -> float:
    """The device's time or the host's, whichever is longer."""
    launches = sum(step.launches for step in found)
    return max(sum(step.seconds(rates) for step in found), rates.call + rates.launch * launches)


def product_seconds(n: int, m: int, moves: Moves, products: int) -> float:
    """The bare products, each of all rows and columns at once."""
    d = moves.features
    product = Step("product", 1, 2 * n * m * d, moves.item * (n * m + n * d + m * d))
    return products * product.seconds(moves.rates)
