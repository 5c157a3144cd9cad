"""Random problems over all options together, against float64: how much larger is our error than plain PyTorch's?

    python tests/fuzz.py --cases 5000 [--first 0] [--onednn]

Prints what is over the tests' limit with its number, by which it is drawn again, and how the errors are spread.
"""

from __future__ import annotations

import argparse
import collections
import random
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import oracles
from cosup import gemm, info_nce, linear_cross_entropy, sigmoid_loss
from cosup.kernels import native

FEW = 16  # of fewer numbers the largest error of either may be small by luck
LIMIT_OF_FEW = 50


class Case(NamedTuple):
    loss: Callable
    plain: Callable
    inputs: tuple[Tensor, ...]
    says: str


def draw(number: int) -> Case:
    """The case of that number."""
    rng = random.Random(number)
    torch.manual_seed(number)
    kind = rng.choice([head, pool, positives, pairs])
    n, m, d = size(rng, 90), size(rng, 300), size(rng, 80)
    dtype = rng.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16])
    backends = ["auto", "reference", *(["native"] if native.AVAILABLE else [])]
    # Triton's interpreter is slow, and has no bfloat16 products
    triton = n * m < 6000 and dtype in (torch.float32, torch.float16) and rng.random() < 0.1
    backend = "triton" if triton else rng.choice(backends)
    how = {"backend": backend}
    if rng.random() < 0.6:
        how["workspace_bytes"] = rng.choice([1 << 14, 1 << 16, 1 << 18, 1 << 21])
    m = max(m, n)
    case = kind(rng, n, m, d, dtype, how)
    options = ", ".join(f"{name}={value if not isinstance(value, Tensor) else '...'}" for name, value in how.items())
    return case._replace(says=f"{kind.__name__} {n} x {m} x {d} {str(dtype)[6:]}: {options}; {case.says}")


def size(rng: random.Random, most: int) -> int:
    return rng.choice([1, 2, rng.randint(1, most), rng.randint(1, most), 1 << rng.randint(0, most.bit_length() - 1)])


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def some(rng: random.Random, **options: Callable) -> dict[str, Any]:
    """A few of the options, each with a probability of a third."""
    return {name: make() for name, make in options.items() if rng.random() < 0.33}


def head(rng: random.Random, n: int, m: int, d: int, dtype: torch.dtype, how: dict) -> Case:
    scale = rng.choice([0.3, 1.0, 3.0]) / d**0.5
    x, w, b = torch.randn(n, d).to(dtype), (scale * torch.randn(m, d)).to(dtype), torch.randn(m).to(dtype)
    target = torch.randint(m, (n,))
    w[target[: n // 2]] += x[: n // 2] * scale
    target.masked_fill_(torch.rand(n) < rng.choice([0.0, 0.0, 0.5]), -100)
    target[0] = rng.randrange(m)
    options = some(rng, weight=lambda: torch.rand(m) + 0.1, label_smoothing=lambda: 0.1, z_loss=lambda: 1e-2,
                   logit_scale=lambda: 0.7, logit_softcap=lambda: 5.0)  # fmt: skip
    options["reduction"] = rng.choice(["mean", "none"])
    tokens = (torch.rand(n).to(wide(dtype)) + 0.1,) if rng.random() < 0.3 else ()
    biased = rng.random() < 0.5

    def ours(x, w, b, *tokens):
        more = {"token_weight": tokens[0]} if tokens else {}
        bias = b if biased else None
        loss = linear_cross_entropy(x, w, target, linear_bias=bias, **options, **more, **how)
        return loss if biased else loss + 0 * b.sum()

    def plain(x, w, b, *tokens):
        more = {"token_weight": tokens[0]} if tokens else {}
        return oracles.cross_entropy(x, w, b if biased else 0 * b, target, **options, **more)

    says = f"{list(options)} bias={biased} weights={len(tokens)}"
    return Case(ours, plain, (x, w, b, *tokens), says)


def pool(rng: random.Random, n: int, m: int, d: int, dtype: torch.dtype, how: dict) -> Case:
    q, c = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    target = torch.randperm(m)[:n]
    c[target[: n // 2]] += q[: n // 2]
    temperature = torch.tensor(rng.choice([0.05, 0.3, 1.0]), dtype=wide(dtype))
    options = some(rng, query_negatives=lambda: True, sample_weight=lambda: torch.rand(n) + 0.1, margin=lambda: 0.1,
                   candidate_ids=lambda: torch.randint(-(-m // 2), (m,)))  # fmt: skip
    options |= rng.choice([{}, {"symmetric": True}, {"candidate_negatives": True}])
    options |= rng.choice([{}, {"label_smoothing": 0.1}, {"false_negative_margin": 0.3}])
    if rng.random() < 0.3:
        options["normalize"] = False
    options["reduction"] = rng.choice(["mean", "none"])
    more = [torch.randn(m, dtype=wide(dtype))] if rng.random() < 0.3 else []
    hard = [torch.randn(n, rng.randint(1, 4), d).to(dtype)] if rng.random() < 0.3 else []

    def given(others):
        others = list(others)
        extra = {"candidate_bias": others.pop(0)} if more else {}
        return extra | ({"hard_negatives": others.pop(0)} if hard else {})

    def ours(q, c, t, *others):
        return info_nce(q, c, target, temperature=t, **options, **given(others), **how)

    def plain(q, c, t, *others):
        return oracles.contrastive(q, c, temperature=t, target=target, **options, **given(others))

    return Case(ours, plain, (q, c, temperature, *more, *hard), f"{options.keys()} bias={len(more)} hard={len(hard)}")


def positives(rng: random.Random, n: int, m: int, d: int, dtype: torch.dtype, how: dict) -> Case:
    q, c = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    positive = torch.rand(n, m) < rng.choice([0.02, 0.2])
    positive[0, 0] = True
    start = torch.cat([torch.zeros(1, dtype=torch.int64), positive.sum(1).cumsum(0)])
    lists = (start, positive.nonzero()[:, 1])
    way = rng.choice(["mean", "logsumexp"])
    temperature = torch.tensor(rng.choice([0.05, 0.3, 1.0]), dtype=wide(dtype))
    options = some(rng, label_smoothing=lambda: 0.1)
    reduction = rng.choice(["mean", "none"])
    weight = torch.rand(n) + 0.1 if rng.random() < 0.3 else None

    def ours(q, c, t):
        return info_nce(q, c, positives=lists, positives_pool=way, temperature=t, sample_weight=weight,
                        reduction=reduction, **options, **how)  # fmt: skip

    def plain(q, c, t):
        return oracles.of_positives(q, c, t, positive, way, weight=weight, reduction=reduction, **options)

    return Case(ours, plain, (q, c, temperature), f"{way} {list(options)} {reduction} weight={weight is not None}")


def pairs(rng: random.Random, n: int, m: int, d: int, dtype: torch.dtype, how: dict) -> Case:
    q, c = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    target = torch.randperm(m)[:n]
    options = some(rng, candidate_ids=lambda: torch.randint(-(-m // 2), (m,)), normalize=lambda: False,
                   sample_weight=lambda: torch.rand(n) + 0.1)  # fmt: skip
    options["reduction"] = rng.choice(["mean", "sum", "none"])
    temperature = torch.tensor(rng.choice([0.1, 1.0]), dtype=wide(dtype))
    bias = torch.tensor(rng.choice([-10.0, -1.0]), dtype=wide(dtype))

    def ours(q, c, t, b):
        return sigmoid_loss(q, c, target, temperature=t, bias=b, **options, **how)

    def plain(q, c, t, b):
        return oracles.of_pairs(q, c, t, b, target, **options)

    return Case(ours, plain, (q, c, temperature, bias), f"{list(options)}")


def compare(case: Case) -> list[tuple[int, float, float]]:
    """Of value and each gradient: how many numbers, our largest error, and the largest that plain PyTorch makes, with
    what one rounding costs; where it is exact, or float64 is the truth itself, a few roundings."""
    exact = case.inputs[0].dtype == torch.float64
    found = []
    for truth, (error, allowed, rounding) in oracles.errors(case.loss, case.plain, case.inputs):
        least = 1000 * rounding + 1e-12 if exact else 1e-6 * (allowed + rounding == 0)
        found.append((truth.numel(), error, allowed + rounding + least))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--onednn", action="store_true", help="float32 products by oneDNN, whatever the processor")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gemm.ONEDNN = gemm.ONEDNN or given.onednn
    refused: collections.Counter[str] = collections.Counter()
    ratios: dict[str, list[float]] = {"many numbers": [], "few": []}
    over = 0
    for number in range(given.first, given.first + given.cases):
        case = draw(number)
        try:
            found = compare(case)
        except ValueError as error:
            refused[re.sub(r"\d+", "#", str(error))[:60]] += 1
            continue
        for count, error, allowed in found:
            few = count < FEW
            ratios["few" if few else "many numbers"].append(error / allowed)
            if not error <= (LIMIT_OF_FEW if few else 2) * allowed and allowed == allowed:  # else plain PyTorch fails
                over += 1
                print(f"{number}: {error:.2g}, {error / allowed:.2f} times what is allowed, of {count}; {case.says}",
                      flush=True)  # fmt: skip
    for name, of in ratios.items():
        of.sort()
        shares = ", ".join(f"{share:.1%} below {of[int(share * len(of))]:.2f}" for share in (0.5, 0.9, 0.99, 0.999))
        print(f"{name}: {len(of)} values and gradients: {shares}")
    print(f"{given.cases} cases, {over} over the limit; {sum(refused.values())} refused: {dict(refused)}")


if __name__ == "__main__":
    main()
