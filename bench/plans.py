"""What the losses would do by default on a GPU, as tables: nothing runs, no device is asked.

python bench/plans.py
"""

from __future__ import annotations

from cosup.predict import Prediction, plan_for

SHAPES = [  # N, D, V
    (8192, 4096, 128256), (8192, 2304, 256000), (16384, 2048, 151936), (4096, 4096, 128256), (1024, 4096, 128256),
    (65536, 4096, 128256), (131072, 2048, 151936),
]  # fmt: skip
FREE = (79, 40, 20, 8)  # GiB
PRODUCTS = {"gradients in forward": "3U", "statistics, then recompute": "4U"}


def by_memory() -> str:
    """Strategy, tile and predicted time over three bare products, by free memory; what three products would need."""
    rows = []
    for shape in SHAPES:
        plans = [_words(plan_for(*shape, free_bytes=gib << 30), shape) for gib in FREE]
        rows.append([", ".join(map(str, shape)), *plans, f"{needed(shape):,}"])
    return _table(["N, D, V", *(f"{gib} GiB free" for gib in FREE), "3U from, MiB"], rows)


def by_step() -> str:
    """Launches, and GB moved, of each step with 79 GiB free."""
    found = [plan_for(*shape, free_bytes=79 << 30) for shape in SHAPES]
    names = dict.fromkeys(name for plan in found for name in plan.launches)
    rows = [[name, *(f"{p.launches[name]}, {p.bytes_moved[name] / 1e9:.2f}" for p in found)] for name in names]
    rows.append(["together", *(f"{sum(p.launches.values())}, {sum(p.bytes_moved.values()) / 1e9:.1f}" for p in found)])
    return _table(["step", *(", ".join(map(str, shape)) for shape in SHAPES)], rows)


def _words(plan: Prediction, shape: tuple[int, int, int]) -> str:
    sizes = zip((plan.block_rows, plan.block_cols), (shape[0], shape[2]), strict=True)
    tile = " x ".join("all" if size == most else str(size) for size, most in sizes)
    return f"{PRODUCTS[plan.strategy]} {tile}, {plan.time_over_products:.2f}"


def needed(shape: tuple[int, int, int]) -> int:
    """Least budget for three products."""
    low, high = 0, 1 << 16
    while high - low > 1:
        middle = (low + high) // 2
        try:
            enough = PRODUCTS[plan_for(*shape, workspace_bytes=middle << 20).strategy] == "3U"
        except ValueError:
            enough = False
        low, high = (low, middle) if enough else (middle, high)
    return high


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


if __name__ == "__main__":
    print(by_memory(), by_step(), sep="\n\n")
