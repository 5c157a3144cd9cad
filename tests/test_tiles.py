"""The tile kernels, native and Triton, against their specification in PyTorch, and that against its formula.

Without a GPU the Triton kernels run in the interpreter.
"""

import pytest
import torch

from cosup import walk
from cosup.kernels import native, product_stats, reference, tile_sigmoid
from cosup.kernels import tile_stats as module
from cosup.kernels.reference import ColumnState, RowState, RowValues
from cosup.kernels.row_values import row_values
from cosup.kernels.target_dots import target_dots
from cosup.kernels.tile_grad import tile_grad
from cosup.kernels.tile_stats import column_stats, tile_stats

SHAPES = [(1, 1), (3, 16), (5, 130), (7, 2100)]  # one element; aligned; ragged; more than one block of columns
FEATURES = ["plain", "bias", "ids", "softcap", "soft", "margin", "limit", "all"]


def natives():
    return [pytest.param(isa, id=f"native-{isa}") for isa in native.AVAILABLE]


@pytest.fixture(params=[*natives(), "triton"])
def kernels(request):
    """(tile_stats, tile_grad, column_stats, device) of one implementation."""
    if request.param == "triton":
        return tile_stats, tile_grad, column_stats, "cuda" if torch.cuda.is_available() else "cpu"

    def with_isa(kernel):
        return lambda *args: kernel(*args, instruction_set=request.param)

    return with_isa(native.tile_stats), with_isa(native.tile_grad), with_isa(native.column_stats), "cpu"


def tile(R, S, features, device, col0=40):
    """A tile in the middle of a table, with targets in it, left and right of it, and ids that collide."""
    dot = 5 * torch.randn(R, S + 3, device=device)[:, :S]  # rows are padded
    target = torch.randint(0, 2 * S + 80, (R,), device=device)
    target[0] = col0 + S - 1
    on = {name: features in (name, "all") for name in FEATURES[1:-1]}
    arguments = (
        col0, target, torch.tensor(0.7, device=device), torch.randn(S, device=device) if on["bias"] else None,
        torch.randint(4, (R,), device=device) if on["ids"] else None,
        torch.randint(4, (S,), device=device) if on["ids"] else None, 3.0 if on["softcap"] else 0.0,
        torch.rand(S, device=device) if on["soft"] else None, 1.5 if features == "margin" else 0.0,
        2 * torch.randn(R, device=device) if on["limit"] else None, None,
    )  # fmt: skip
    return dot, arguments


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_stats_match_the_specification(kernels, shape, features):
    stats, *_, device = kernels
    states = []
    for run in (reference.tile_stats, stats):
        torch.manual_seed(1)
        state = RowState.empty(shape[0], torch.empty(0, device=device))
        for col0 in (40, 40 + shape[1]):  # two tiles side by side: the second merges into the first
            dot, arguments = tile(*shape, features, device, col0)
            before = dot.clone()
            run(dot, state, *arguments)
            assert torch.equal(dot, before)
        states.append(state)
    for name, want, got in zip(RowState._fields, *states, strict=True):
        torch.testing.assert_close(
            got, want, rtol=1e-5, atol=1e-5, equal_nan=name == "target", msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("with_columns", [False, True], ids=["rows", "rows and columns"])
def test_grad_matches_the_specification(kernels, shape, features, with_columns):
    _, grad, _, device = kernels
    dot, arguments = tile(*shape, features, device)
    state = RowState.empty(shape[0], dot)
    reference.tile_stats(dot, state, *arguments)
    a, b, e, h = torch.randn(4, shape[0], device=device)
    a[-1] = b[-1] = e[-1] = 0
    more = (e if features in ("soft", "all") else None, h if features in ("plain", "all") else None)
    if with_columns:
        top = ColumnState.empty(shape[1], dot)
        reference.column_stats(dot, top, *arguments)
        more = (*more, top.max.clamp(min=-99), torch.rand(shape[1], device=device))
    want = torch.empty_like(dot)
    reference.tile_grad(dot, want, state.lse(), a, b, *arguments, *more)
    grad(dot, dot, state.lse(), a, b, *arguments, *more)  # in place
    torch.testing.assert_close(dot, want, rtol=1e-5, atol=1e-6)
    assert (dot[-1] == 0).all() or shape[0] == 1 or with_columns


@pytest.mark.parametrize("shape", [*SHAPES, (100, 37)], ids=str)
@pytest.mark.parametrize("features", FEATURES)
def test_column_stats_match_the_specification(kernels, shape, features, monkeypatch):
    monkeypatch.setattr(module, "LEAST_PART", 40)  # of 100 rows three parts, which are joined
    *_, columns, device = kernels
    states = []
    for run in (reference.column_stats, columns):
        torch.manual_seed(1)
        state = ColumnState.empty(shape[1], torch.empty(0, device=device))
        for _ in range(2):  # two tiles, one above the other
            run(tile(*shape, features, device)[0], state, *tile(*shape, features, device)[1])
        states.append(state)
    for name, want, got in zip(ColumnState._fields, *states, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_plan_counts_the_parts_of_the_columns_statistic():
    assert walk.COLUMN_PARTS == module.MOST_PARTS


def test_column_specification_is_the_softmax():
    dot, (col0, target, scale, *_) = tile(50, 30, "plain", "cpu")
    state = ColumnState.empty(30, dot)
    reference.column_stats(dot, state, col0, target, scale)
    z = (scale * dot).double()
    p = z.softmax(0)
    torch.testing.assert_close((state.max + state.sum.log()).double(), z.logsumexp(0))
    entropy = (state.sum.log() - state.dot / state.sum).double()
    torch.testing.assert_close(entropy, -(p * p.log()).sum(0), rtol=1e-5, atol=1e-5)
    out, none = torch.empty_like(dot), torch.zeros(50)
    reference.tile_grad(dot, out, none, none, none, col0, target, scale, col_shift_S=state.max, col_a_S=1 / state.sum)
    torch.testing.assert_close(out.double(), p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_specification_is_the_softmax(shape):
    dot, (col0, target, scale, *_) = tile(*shape, "plain", "cpu")
    target = torch.randint(col0, col0 + shape[1], (shape[0],))
    state = RowState.empty(shape[0], dot)
    reference.tile_stats(dot, state, col0, target, scale)
    z = (scale * dot).double()
    p = z.softmax(1)
    torch.testing.assert_close(state.lse().double(), z.logsumexp(1))
    torch.testing.assert_close(state.entropy().double(), -(p * p.log()).sum(1), rtol=1e-5, atol=1e-5)
    own = z.gather(1, (target - col0)[:, None])
    torch.testing.assert_close(state.target.double(), own.squeeze(1))
    assert torch.equal(state.above.long(), (z > own).sum(1))
    out, one = torch.empty_like(dot), torch.ones(shape[0])
    reference.tile_grad(dot, out, state.max, 1 / state.sum, one, col0, target, scale)
    torch.testing.assert_close(
        out.double(), p - torch.nn.functional.one_hot(target - col0, shape[1]), rtol=1e-4, atol=1e-6
    )


def test_equal_logits_are_not_above(kernels):
    stats, *_, device = kernels
    dot = torch.tensor([[1.0, 2.0, 2.0, 3.0, 3.0]], device=device)
    for target, above in ((0, 4), (1, 2), (3, 0)):
        state = RowState.empty(1, dot)
        stats(dot, state, 0, torch.tensor([target], device=device), torch.ones((), device=device))
        assert state.above.item() == above


def test_masked_tile_and_nan_row(kernels):
    """A tile of masked columns leaves the statistic as it was; a NaN stays in its row."""
    stats, grad, _, device = kernels
    dot = torch.randn(3, 20, device=device)
    dot[1, 4] = float("nan")
    target = torch.tensor([50, 2, 3], device=device)
    ids = torch.zeros(3, dtype=torch.int64, device=device), torch.zeros(20, dtype=torch.int64, device=device)
    one = torch.ones((), device=device)
    state = RowState.empty(3, dot)
    stats(dot, state, 0, target, one, None, *ids)
    assert state.sum[0] == 0 and state.max[0] == float("-inf") and state.above[0] == 0
    assert torch.isfinite(state.lse()[2])
    state = RowState.empty(3, dot)
    stats(dot, state, 0, target, one)
    assert state.lse().isnan().tolist() == [False, True, False]
    grad(dot, dot, state.max, 1 / state.sum, torch.ones(3, device=device), 0, target, one)
    assert dot.isnan().any(1).tolist() == [False, True, False]


def test_masked_columns_without_weight_are_in_no_soft_target(kernels):
    """Their products with 0 would be NaN: in a whole block, in the rest after those, and at a target."""
    stats, *_, device = kernels
    dot = torch.randn(2, 4300, device=device)
    target, masked = torch.tensor([7, 4299], device=device), torch.tensor([7, 30, 4200, 4299], device=device)
    soft, bias = torch.rand(4300, device=device), torch.zeros(4300, device=device)
    soft[masked], bias[masked] = 0.0, -float("inf")
    state = RowState.empty(2, dot)
    stats(dot, state, 0, target, torch.ones((), device=device), bias, None, None, 0.0, soft)
    torch.testing.assert_close(state.soft, dot @ soft, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_narrows_in_place(dtype, device):
    """16-bit coefficients at the front of the float32 rows they are made from."""
    dot = torch.randn(4, 4200, device=device)
    target = torch.randint(4200, (4,), device=device)
    lse, one, scale = dot.logsumexp(1), torch.ones(4, device=device), torch.ones((), device=device)
    want = torch.empty_like(dot)
    reference.tile_grad(dot, want, lse, one, one, 0, target, scale)
    narrow = dot.view(dtype)[:, :4200]
    tile_grad(dot, narrow, lse, one, one, 0, target, scale)
    torch.testing.assert_close(narrow.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("shape", [*SHAPES, (2, 4300)], ids=str)  # two whole blocks of the gradient's, and a rest
@pytest.mark.parametrize("features", FEATURES)
def test_rounded_tiles_match_the_specification(shape, features, device):
    """16-bit tiles with the targets' products apart: rows, columns, and coefficients in place."""
    dot, (*arguments, _) = tile(*shape, features, device)
    dot = dot.half()
    arguments.append(5 * torch.randn(shape[0], device=device))  # own: far from the tile's
    states = []
    for stats, columns in ((reference.tile_stats, reference.column_stats), (tile_stats, column_stats)):
        rows, cols = RowState.empty(shape[0], arguments[-1]), ColumnState.empty(shape[1], arguments[-1])
        stats(dot, rows, *arguments)
        columns(dot, cols, *arguments)
        states.append((*rows, *cols))
    for want, got in zip(*states, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    a, b, e, h, col_a = *torch.rand(4, shape[0], device=device), torch.rand(shape[1], device=device)
    more = (e if features in ("soft", "all") else None, h if features == "plain" else None, got.clamp(min=-9), col_a)
    want = torch.empty_like(dot)
    for some in (more[:2], more):
        reference.tile_grad(dot, want, states[0][0], a, b, *arguments, *some)
        made = dot.clone()
        tile_grad(made, made, states[0][0], a, b, *arguments, *some)
        torch.testing.assert_close(made, want, rtol=2 * torch.finfo(dot.dtype).eps, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("n", [1, 256, 300])
def test_row_values_match_the_specification(n, skipped, device):
    """To the last digit but of one; a NaN's row is last, rows to skip are zeros whatever they hold."""
    state = RowState(*torch.randn(5, n, device=device), torch.randint(9, (n,), dtype=torch.int32, device=device))
    state.sum.abs_().add_(1)
    skip = torch.rand(n, device=device) < 0.3 if skipped else None
    state.target[-1] = float("nan")
    if skipped:
        empty = skip & (torch.arange(n, device=device) % 2 == 0)
        state.max[empty], state.sum[empty] = float("-inf"), 0
    scale, copy = torch.tensor(0.7, device=device), RowState(*(f.clone() for f in state))
    want, got = reference.row_values(copy, 50, 1.5, scale, skip), row_values(state, 50, 1.5, scale, skip)
    for name, a, b in zip(RowValues._fields, want, got, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
    last = skipped and bool(skip[-1])
    assert got.above[-1] == (0 if last else 49) and got.nll[-1].isnan().item() != last


@pytest.mark.parametrize("layout", ["dense", "columns first"])
@pytest.mark.parametrize("D", [1, 40, 1500])
def test_target_dots(D, layout, device):
    """In float32 to a sum's roundings, from any layout; 0 where the target is no row of w."""
    x, w = torch.randn(9, D, device=device).half(), torch.randn(30, D, device=device).half()
    if layout == "columns first":
        x, w = (t.mT.contiguous().mT for t in (x, w))
    target = torch.tensor([-1, 5, 6, 34, 35, 36, 20, 9, 100], device=device)
    got, want = target_dots(x, w, target, 6), torch.zeros(9, dtype=torch.float64, device=device)
    here = (target >= 6) & (target < 36)
    want[here] = (x[here].double() * w[target[here] - 6].double()).sum(1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6 * D**0.5)
    assert torch.equal(got[~here], torch.zeros_like(got[~here]))
    torch.testing.assert_close(reference.target_dots(x, w, target, 6).double(), want, rtol=0, atol=1e-6 * D**0.5)


@pytest.mark.parametrize("blocks", [(16, 32, 16, 2, 4, 2), None], ids=["small tiles", "own tiles"])
@pytest.mark.parametrize("layout", ["dense", "odd stride", "columns first"])
@pytest.mark.parametrize("features", [f for f in FEATURES if f not in ("margin", "limit")])
def test_merged_products_are_as_a_tile(features, layout, blocks, device, monkeypatch):
    """Products merged as they are made, against the same as a tile: two slabs of several tiles, the last ragged."""
    R, S, D = 55, 83, 40
    if blocks is not None:
        monkeypatch.setattr(product_stats, "tile_for", lambda *_: product_stats.Tile(*blocks))
        monkeypatch.setattr(product_stats, "COLUMNS", blocks[1] // 2)
    x, w = (torch.randn(n, D + 8, device=device).half()[:, 8:] for n in (R, 2 * S))
    if layout == "odd stride":
        x, w = (torch.randn(n, D + 1, device=device).half()[:, 1:] for n in (R, 2 * S))
    elif layout == "columns first":
        x, w = (t.mT.contiguous().mT for t in (x, w))
    _, (col0, target, scale, bias, row_id, col_id, softcap, soft, *_) = tile(R, 2 * S, features, device)
    dot = x.float() @ w.float().mT
    want, got = (RowState.empty(R, dot) for _ in range(2))
    rank = features in ("plain", "all")
    reference.tile_stats(dot, want, col0, target, scale, bias, row_id, col_id, softcap, soft)
    if rank:  # filled beforehand, with another sum's rounding
        got.target.copy_(want.target * (1 + 1e-6 * torch.randn(R, device=device)))
    for s in (slice(0, S), slice(S, 2 * S)):
        b, c, v = (t if t is None else t[s] for t in (bias, col_id, soft))
        room = torch.empty(R * 2 * -(-S // (2 * product_stats.COLUMNS)) * product_stats.FIELDS, device=device)
        product_stats.product_stats(x, w[s], got, room, rank, col0 + s.start, target, scale, b, row_id, c, softcap, v)
    here = (target >= col0) & (target < col0 + 2 * S)
    for name, a, b in zip(RowState._fields, want, got, strict=True):
        rows = here if name in ("target", "above") else slice(None)
        if name != "above" or rank:
            torch.testing.assert_close(b[rows], a[rows], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_merged_products_of_masked_columns_and_nan(device):
    """Masked columns leave the statistic as it was; a NaN stays in its row."""
    x, w = (torch.ones(n, 16, dtype=torch.float16, device=device) for n in (3, 300))
    x[1, 4] = float("nan")
    target = torch.tensor([-1, 2, 3], device=device)
    ids = torch.tensor([0, 1, 1], device=device), torch.zeros(300, dtype=torch.int64, device=device)
    one, room = torch.ones((), device=device), torch.empty(3 * 4 * product_stats.FIELDS, device=device)
    state = RowState.empty(3, one)
    product_stats.product_stats(x, w, state, room, False, 0, target, one, None, *ids)
    assert state.sum[0] == 0 and state.dot[0] == 0 and state.max[0] == float("-inf")
    assert state.lse().isnan().tolist() == [False, True, False]


@pytest.fixture(params=[*natives(), "triton"])
def sigmoid(request):
    """(sigmoid_stats, sigmoid_grad, device) of one implementation."""
    if request.param == "triton":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return tile_sigmoid.sigmoid_stats, tile_sigmoid.sigmoid_grad, device

    def with_isa(kernel):
        return lambda *args: kernel(*args, instruction_set=request.param)

    return with_isa(native.sigmoid_stats), with_isa(native.sigmoid_grad), "cpu"


SIGMOID_FEATURES = ["plain", "bias", "ids", "all"]


def sigmoid_tile(shape, features, device, col0=40):
    dot, (*arguments, _, _, _, _, _) = tile(*shape, features, device, col0)
    arguments[1][1:2] = col0 + shape[1]  # the column after the tile's last
    return dot, arguments


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", SIGMOID_FEATURES)
def test_sigmoid_stats_match_the_specification(sigmoid, shape, features):
    """float64's, each to a few of its terms' roundings."""
    stats, _, device = sigmoid
    states = []
    for run, dtype in ((reference.sigmoid_stats, torch.float64), (stats, torch.float32)):
        torch.manual_seed(1)
        state = RowState.empty(shape[0], torch.empty(0, dtype=dtype, device=device))
        for col0 in (40, 40 + shape[1]):  # two tiles side by side: the second merges into the first
            dot, arguments = sigmoid_tile(shape, features, device, col0)
            before = dot.clone()
            run(dot.to(dtype), state, *(a.to(dtype) if _real(a) else a for a in arguments))
            assert torch.equal(dot, before)
        states.append(state)
    want, got = states
    torch.testing.assert_close(got.sum.double(), want.sum, rtol=2e-6, atol=0)
    for name in ("dot", "soft"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("features", SIGMOID_FEATURES)
def test_sigmoid_grad_matches_the_specification(sigmoid, shape, features):
    _, grad, device = sigmoid
    dot, arguments = sigmoid_tile(shape, features, device)
    a, none = torch.randn(shape[0], device=device), torch.full((shape[0],), float("nan"), device=device)
    a[-1] = 0 if shape[0] > 1 else 1
    want = torch.empty_like(dot)
    reference.sigmoid_grad(dot, want, none, a, none, *arguments)
    grad(dot, dot, none, a, none, *arguments)  # in place
    torch.testing.assert_close(dot, want, rtol=2e-6, atol=0)
    assert (dot[-1] == 0).all() or shape[0] == 1


def test_sigmoid_specification_is_the_formula():
    dot, (col0, _, scale, bias, row_id, col_id) = sigmoid_tile((5, 130), "all", "cpu")
    target = torch.randint(col0, col0 + 130, (5,))
    dot, bias = dot.double(), bias.double().requires_grad_()
    scale = scale.double().requires_grad_()
    z = scale * dot + bias
    z.retain_grad()
    hit = torch.nn.functional.one_hot(target - col0, 130).bool()
    kept = hit | (row_id[:, None] != col_id)
    loss = torch.where(hit, torch.log(1 + torch.exp(-z)), torch.log(1 + torch.exp(z))) * kept
    loss.sum().backward()
    state = RowState.empty(5, dot)
    with torch.no_grad():
        reference.sigmoid_stats(dot, state, col0, target, scale, bias, row_id, col_id)
        out, a = torch.empty_like(dot), torch.rand(5, dtype=torch.float64)
        reference.sigmoid_grad(dot, out, a, a, a, col0, target, scale, bias, row_id, col_id)
    torch.testing.assert_close(state.sum, loss.sum(1))
    torch.testing.assert_close(state.soft, z.grad.sum(1))
    torch.testing.assert_close(state.dot.sum() / scale.detach(), scale.grad)
    torch.testing.assert_close(out, a[:, None] * z.grad)


def test_sigmoid_keeps_the_digits_of_tiny_and_huge_logits(sigmoid):
    """One logit to a row, from where exp underflows on: softplus, its gradient, and those of a target."""
    stats, grad, device = sigmoid
    z = torch.tensor([-1e4, -80.0, -30.0, -10.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 10.0, 30.0, 80.0, 1e4], device=device)
    one, a = torch.ones((), device=device), torch.ones_like(z)
    for target, sign in ((-torch.ones_like(z).long(), 1), (torch.zeros_like(z).long(), -1)):
        y = sign * z.double()
        state, out = RowState.empty(len(z), z), z[:, None].clone()
        stats(out, state, 0, target, one)
        grad(out, out, a, a, a, 0, target, one)
        want = -torch.nn.functional.logsigmoid(-y)
        torch.testing.assert_close(state.sum.double(), want, rtol=5e-7, atol=1e-37)
        torch.testing.assert_close(out[:, 0].double(), sign * y.sigmoid(), rtol=5e-7, atol=1e-37)


def test_sigmoid_of_masked_tile_and_nan_row(sigmoid):
    """Masked columns add nothing, the target excepted; a NaN stays in its row, but a row without weight has none."""
    stats, grad, device = sigmoid
    dot = torch.randn(4, 20, device=device)
    dot[1, 4] = dot[2, 4] = float("nan")
    target = torch.tensor([50, 2, 4, 3], device=device)
    ids = torch.zeros(4, dtype=torch.int64, device=device), torch.zeros(20, dtype=torch.int64, device=device)
    one = torch.ones((), device=device)
    state, out = RowState.empty(4, dot), torch.empty_like(dot)
    stats(dot, state, 0, target, one, None, *ids)
    assert state.sum[0] == state.soft[0] == state.dot[0] == 0
    torch.testing.assert_close(state.sum[3], torch.nn.functional.softplus(-dot[3, 3]))
    grad(dot, out, dot, torch.ones(4, device=device), dot, 0, target, one, None, *ids)
    assert not out[0].any() and out[3].count_nonzero() == 1
    state = RowState.empty(4, dot)
    stats(dot, state, 0, target, one)
    for field in (state.sum, state.soft, state.dot):
        assert field.isnan().tolist() == [False, True, True, False]
    grad(dot, dot, dot, torch.tensor([1.0, 1.0, 0.0, 1.0], device=device), dot, 0, target, one)
    assert dot.isnan().any(1).tolist() == [False, True, False, False]


def _real(a):
    return isinstance(a, torch.Tensor) and a.is_floating_point()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_triton_narrows_sigmoid_coefficients_in_place(dtype, device):
    dot = torch.randn(4, 4200, device=device)
    target, one = torch.randint(4200, (4,), device=device), torch.ones(4, device=device)
    want, scale = torch.empty_like(dot), torch.ones((), device=device)
    reference.sigmoid_grad(dot, want, one, one, one, 0, target, scale)
    narrow = dot.view(dtype)[:, :4200]
    tile_sigmoid.sigmoid_grad(dot, narrow, one, one, one, 0, target, scale)
    torch.testing.assert_close(narrow.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-7)
