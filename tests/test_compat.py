"""The calls of other libraries: their signatures, what they document, and what cannot be kept is refused."""

import dataclasses
import functools
import inspect

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F

import cosup
from cosup.compat import cut_cross_entropy, liger
from cosup.compat.cut_cross_entropy import LinearCrossEntropy, VocabParallelOptions
from cosup.compat.liger import LigerFusedLinearCrossEntropyLoss, liger_fused_linear_cross_entropy
from oracles import DTYPES, check

NEEDED = inspect.Parameter.empty
LIGER_OPTIONS = {
    "ce_weight": None, "ignore_index": -100, "lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean",
    "softcap": None, "return_z_loss": False, "accum_dtype": None, "use_token_scaling": False,
    "return_token_accuracy": False, "return_predicted_tokens": False,
}  # fmt: skip
CCE_IMPL = cut_cross_entropy.LinearCrossEntropyImpl.CCE
CCE_FILTERS = {
    "filter_eps": "auto", "accum_e_fp32": False, "accum_c_fp32": False, "filter_e_grad": True, "filter_c_grad": True,
    "impl": CCE_IMPL,
}  # fmt: skip
CCE_OPTIONS = {"ignore_index": -100, "softcap": None, "reduction": "mean", "shift": 0}
SIGNATURES = {
    LigerFusedLinearCrossEntropyLoss: LIGER_OPTIONS,
    LigerFusedLinearCrossEntropyLoss(): {"lin_weight": NEEDED, "_input": NEEDED, "target": NEEDED, "bias": None},
    liger_fused_linear_cross_entropy: {
        "input": NEEDED, "weight": NEEDED, "target": NEEDED, "bias": None, **LIGER_OPTIONS, "chunk_mem_const": 1,
    },
    LinearCrossEntropy: {**CCE_OPTIONS, **CCE_FILTERS, "return_lse": False},
    LinearCrossEntropy(): {"e": NEEDED, "c": NEEDED, "targets": NEEDED, "bias": None},
    cut_cross_entropy.linear_cross_entropy: {
        "e": NEEDED, "c": NEEDED, "targets": NEEDED, "bias": None, **CCE_OPTIONS, "return_lse": False, **CCE_FILTERS,
        "vocab_parallel_options": None,
    },
    VocabParallelOptions: {"start": NEEDED, "stop": NEEDED, "group": None, "reduce_e_grad": True},
}  # fmt: skip


@pytest.mark.parametrize("call", SIGNATURES, ids=lambda call: getattr(call, "__name__", f"forward of {call}"))
def test_signature(call):
    """Names, order and defaults."""
    parameters = inspect.signature(getattr(call, "forward", call) if isinstance(call, torch.nn.Module) else call)
    assert [(p.name, p.default) for p in parameters.parameters.values()] == [*SIGNATURES[call].items()]


GENERATOR = torch.Generator().manual_seed(0)
CLASS_WEIGHT = torch.rand(90, generator=GENERATOR) + 0.1
FEATURES = {
    "plain": {},
    "class weight": {"ce_weight": CLASS_WEIGHT},
    "label smoothing": {"label_smoothing": 0.2},
    "z-loss": {"lse_square_scale": 0.05},
    "weighted z-loss": {"lse_square_scale": 0.05, "ce_weight": CLASS_WEIGHT},
    "softcap": {"softcap": 2.5},
}
FEATURES["all but scaling"] = {name: value for options in FEATURES.values() for name, value in options.items()}
FEATURES["token scaling"] = {"use_token_scaling": True}
FEATURES["all"] = {**FEATURES["all but scaling"], "use_token_scaling": True}  # two results multiplied: in float64 only


def problem(dtype=torch.float64, rows=(41,), device="cpu"):
    x, w, b = (torch.randn(*size, device=device).div(2).to(dtype) for size in ((*rows, 19), (90, 19), (90,)))
    target = torch.randint(90, rows, device=device)
    w[target.flatten()[:20]] = x.flatten(0, -2)[:20] / 2  # which come nearer to their answer
    target[..., 1::4] = -100
    return x, w, b, target


def liger_formula(x, w, b, target, *, ce_weight=None, label_smoothing=0.0, lse_square_scale=0.0, softcap=None,
                  use_token_scaling=False, reduction="mean"):  # fmt: skip
    """What Liger-Kernel documents: (loss, z_loss), each a sum of rows over its own number."""
    z = F.linear(x, w, b)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    c = None if ce_weight is None else ce_weight.to(z)
    keep = target != -100
    rows = F.cross_entropy(z, target, c, reduction="none", label_smoothing=label_smoothing)
    z_rows = lse_square_scale * z.logsumexp(1) ** 2 * keep
    if use_token_scaling:
        own = F.cross_entropy(z.detach(), target, reduction="none").neg().exp()
        rows, z_rows = rows * own, z_rows * own
    if reduction == "none":
        return rows + z_rows, z_rows
    total = keep.sum() if c is None else c[target[keep]].sum()
    ce, z_loss = (rows.sum(), z_rows.sum()) if reduction == "sum" else (rows.sum() / total, z_rows.sum() / keep.sum())
    return ce + z_loss, z_loss


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("feature", [feature for feature in FEATURES if feature != "all"])
def test_liger_error(feature, reduction, dtype, device):
    x, w, b, target = problem(dtype, device=device)
    options = {k: v.to(device) if k == "ce_weight" else v for k, v in FEATURES[feature].items()}
    check(lambda x, w, b: liger_fused_linear_cross_entropy(x, w, target, b, reduction=reduction, **options),
          lambda x, w, b: liger_formula(x, w, b, target, reduction=reduction, **options)[0], (x, w, b))  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("feature", FEATURES)
def test_what_liger_returns_beside_the_loss(feature, reduction):
    x, w, b, target = problem()
    options = {**FEATURES[feature], "reduction": reduction}
    loss = liger_fused_linear_cross_entropy(x, w, target, b, **options)
    output = liger_fused_linear_cross_entropy(x.requires_grad_(), w, target, b, **options, return_z_loss=True,
                                              return_token_accuracy=True)  # fmt: skip
    want = liger_formula(x, w, b, target, **options)
    assert [f.name for f in dataclasses.fields(output)] == ["loss", "z_loss", "token_accuracy", "predicted_tokens"]
    torch.testing.assert_close((output.loss, output.loss), (loss, want[0]))
    torch.testing.assert_close(output.z_loss, want[1].detach())
    torch.testing.assert_close(torch.autograd.grad(output.loss.sum(), x), torch.autograd.grad(want[0].sum(), x))
    assert not output.z_loss.requires_grad and output.predicted_tokens is None
    keep = target != -100
    hit = ((F.linear(x, w, b).argmax(1) == target) & keep).float()
    assert hit.any() and hit.sum() < keep.sum()
    torch.testing.assert_close(output.token_accuracy, hit if reduction == "none" else hit.sum() / keep.sum())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scaled", [False, True])
def test_liger_with_class_weights_whose_sum_is_negative(scaled, reduction):
    x, w, b, target = problem()
    options = {"ce_weight": 0.3 - CLASS_WEIGHT, "lse_square_scale": 0.05, "use_token_scaling": scaled}
    assert options["ce_weight"][target[target >= 0]].sum() < 0
    inputs = [t.requires_grad_() for t in (x, w, b)]
    loss = liger_fused_linear_cross_entropy(x, w, target, b, reduction=reduction, **options)
    want, _ = liger_formula(x, w, b, target, reduction=reduction, **options)
    torch.testing.assert_close(loss, want)
    grads = (torch.autograd.grad(value.sum(), inputs) for value in (loss, want))
    torch.testing.assert_close(*grads)


def test_liger_returns_what_is_asked():
    x, w, b, target = problem()
    for asked in ("return_z_loss", "return_token_accuracy"):
        output = LigerFusedLinearCrossEntropyLoss(**{asked: True})(w, x, target, b)
        found = {name for name, value in vars(output).items() if value is not None}
        assert found == {"loss", asked.removeprefix("return_")}
    loss = LigerFusedLinearCrossEntropyLoss()(w.requires_grad_(), x, target)
    assert isinstance(loss, torch.Tensor) and torch.autograd.grad(loss, w)[0].any()  # though the input needs none


ANOTHER = {
    "ce_weight": CLASS_WEIGHT, "ignore_index": 3, "lse_square_scale": 0.1, "label_smoothing": 0.3, "reduction": "none",
    "softcap": 1.5, "use_token_scaling": True, "accum_dtype": torch.float32,
}  # fmt: skip


@pytest.mark.parametrize("option", ANOTHER)
def test_liger_module_equals_the_function(option):
    x, w, b, target = problem()
    target = target.clamp(min=0)
    target[0] = 3
    option = {option: ANOTHER[option]}
    want = liger_fused_linear_cross_entropy(x, w, target, b, **option)
    later = LigerFusedLinearCrossEntropyLoss()
    for name, value in option.items():
        setattr(later, name, value)
    for module in (LigerFusedLinearCrossEntropyLoss(**option), later):
        assert torch.equal(module(w, x, target, b), want)
    if "accum_dtype" not in option:
        assert not torch.equal(want, LigerFusedLinearCrossEntropyLoss()(w, x, target, b))


def test_liger_without_targets():
    """The loss is 0 and so are its gradients; an accuracy over nothing is not a number."""
    x, w, b, target = problem()
    for options in FEATURES.values():
        output = liger_fused_linear_cross_entropy(x.requires_grad_(), w, torch.full_like(target, -100), b, **options,
                                                  return_z_loss=True, return_token_accuracy=True)  # fmt: skip
        assert output.loss == output.z_loss == 0 and output.token_accuracy.isnan()
        assert not torch.autograd.grad(output.loss, x)[0].any()


@pytest.mark.parametrize("options", [{"use_token_scaling": True}, {"lse_square_scale": 1.0}], ids=str)
def test_weights_of_classes_are_summed_in_float32(options):
    """Whatever dtype they are in: what "mean" divides by is no rounder than the loss."""
    x, w, b, target = problem(torch.bfloat16)
    weight = CLASS_WEIGHT.bfloat16()
    loss = liger_fused_linear_cross_entropy(x, w, target, b, ce_weight=weight, **options)
    wanted = liger_fused_linear_cross_entropy(x, w, target, b, ce_weight=weight.double(), **options)
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)


BAD_LIGER = [
    (dict(return_predicted_tokens=True), "return_predicted_tokens must be False, got True"),
    (dict(accum_dtype=torch.float64), "accum_dtype must be one of .*, got torch.float64"),
    (dict(lse_square_scale=-1.0), "lse_square_scale must be a number, at least 0 and finite, got -1.0"),
    (dict(lse_square_scale="a"), "lse_square_scale must be a number, at least 0 and finite, got 'a'"),
    (dict(label_smoothing=2.0), r"label_smoothing must be in \[0, 1\], got 2.0"),
    (dict(label_smoothing=None), r"label_smoothing must be in \[0, 1\], got None"),
    (dict(ignore_index=None), "ignore_index must be an integer, got None"),
    (dict(ignore_index=1.5), "ignore_index must be an integer, got 1.5"),
    (dict(ce_weight=[1.0]), r"ce_weight must be a tensor or None, got \[1.0\]"),
    (dict(return_z_loss="yes"), "return_z_loss must be True or False, got 'yes'"),
    (dict(reduction="avg"), "reduction must be one of .*, got 'avg'"),
    (dict(softcap=0.0), "softcap must be a number, positive .*, got 0.0"),
]


@pytest.mark.parametrize("bad, message", BAD_LIGER, ids=[f"{k}={v!r}" for b, _ in BAD_LIGER for k, v in b.items()])
def test_liger_refuses_at_construction(bad, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        LigerFusedLinearCrossEntropyLoss(**bad)
    x, w, b, target = problem()
    with pytest.raises(ValueError, match=f"^{message}"):
        liger_fused_linear_cross_entropy(x, w, target, b, **bad)


def test_tensors_are_refused_by_the_names_of_the_call():
    x, w, b, target = problem()
    cce = cut_cross_entropy.linear_cross_entropy
    for call, message in [
        (lambda: LigerFusedLinearCrossEntropyLoss()(w.float(), x, target), "want _input and lin_weight in one"),
        (lambda: LigerFusedLinearCrossEntropyLoss()(x, w, target), r"target must be \[90\], got \[41\]"),
        (lambda: LigerFusedLinearCrossEntropyLoss(CLASS_WEIGHT[:9])(w, x, target), r"ce_weight must be \[90\], got"),
        (lambda: liger_fused_linear_cross_entropy(x, w[0], target), r"want input \[..., D\] and weight \[M, D\]"),
        (lambda: liger_fused_linear_cross_entropy(x, w, target, chunk_mem_const=0), "chunk_mem_const must be a pos"),
        (lambda: cce(x, w[:, 1:], target), r"want e \[..., D\] and c \[M, D\]"),
        (lambda: cce(x, w, target.int()), "targets must be torch.int64, got torch.int32"),
        (lambda: cce(x, w, target, b[1:]), r"bias must be \[90\], got \[89\]"),
        (lambda: cce(x, w, target, -100), "bias must be a tensor, got -100"),  # ignore_index, in release 25.1.1
        (lambda: cce(x.sum(), w, target), "e must be .*, got a scalar"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}"):
            call()


def cce_formula(e, c, bias, targets, *, softcap=None, reduction="mean", shift=0):
    """What CCE documents: (loss, lse), of the rows that have a target."""
    kept = e.shape[-2] - shift
    z = F.linear(e[..., :kept, :], c, bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    predicted = targets[..., shift:]
    rows = F.cross_entropy(z.flatten(0, -2), predicted.flatten(), reduction=reduction)
    return rows.reshape(predicted.shape) if reduction == "none" else rows, z.logsumexp(-1) * (predicted != -100)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("return_lse", [False, True], ids=["loss", "loss and lse"])
@pytest.mark.parametrize("shift", [False, True, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cce_error(reduction, shift, return_lse, dtype, device):
    """With return_lse the gradient is that of a loss with the README's z-loss: of both outputs."""
    e, c, bias, targets = problem(dtype, (5, 13), device)
    options = {"reduction": reduction, "softcap": 2.5 if shift else None}

    def ours(e, c, bias):
        result = cut_cross_entropy.linear_cross_entropy(e, c, targets, bias, shift=shift, return_lse=return_lse,
                                                        **options)  # fmt: skip
        return result[0] + 0.1 * result[1].pow(2).mean() if return_lse else result

    def plain(e, c, bias):
        loss, lse = cce_formula(e, c, bias, targets, shift=int(shift), **options)
        return loss + 0.1 * lse.pow(2).mean() if return_lse else loss

    check(ours, plain, (e, c, bias))


@pytest.mark.parametrize("shift", [0, 1, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cce_shapes_and_zeros(reduction, shift):
    """Rows without a target are 0; the last ``shift`` are not there."""
    e, c, bias, targets = problem(rows=(2, 5, 13))
    call = LinearCrossEntropy(reduction=reduction, shift=shift, return_lse=True)
    loss, lse = call(e, c, targets, bias)
    assert lse.shape == (2, 5, 13 - shift) and loss.shape == (lse.shape if reduction == "none" else ())
    ignored = targets[..., shift:] == -100
    assert not lse[ignored].any() and lse[~ignored].all()
    torch.testing.assert_close((loss, lse), cce_formula(e, c, bias, targets, reduction=reduction, shift=shift))
    alone = LinearCrossEntropy(reduction=reduction, shift=shift)(e, c, targets, bias)
    torch.testing.assert_close(alone, loss)


def test_cce_options_of_precision_change_no_bit():
    e, c, bias, targets = problem(torch.bfloat16)
    loss = cut_cross_entropy.linear_cross_entropy(e, c, targets, bias)
    for impl in ("cce", "torch_compile", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_c_full_e", "cce_exact"):
        for same in (impl, cut_cross_entropy.LinearCrossEntropyImpl[impl.upper()]):
            assert torch.equal(loss, LinearCrossEntropy(impl=same)(e, c, targets, bias))
    for filter_eps in (None, 1e-3, "auto", "high"):
        more = dict(accum_e_fp32=True, accum_c_fp32=True, filter_e_grad=False, filter_c_grad=False)
        assert torch.equal(loss, LinearCrossEntropy(filter_eps=filter_eps, **more)(e, c, targets, bias))


def test_cce_module_equals_the_function():
    e, c, bias, targets = problem()
    targets[0] = 3
    for option in ({"ignore_index": 3}, {"softcap": 1.5}, {"reduction": "sum"}, {"shift": True}):
        wanted = targets.clamp(min=0)
        loss = LinearCrossEntropy(**option)(e, c, wanted, bias)
        assert torch.equal(loss, cut_cross_entropy.linear_cross_entropy(e, c, wanted, bias, **option))
        assert not torch.equal(loss, LinearCrossEntropy()(e, c, wanted, bias))
        later = LinearCrossEntropy()
        for name, value in option.items():
            setattr(later, name, value)
        assert torch.equal(later(e, c, wanted, bias), loss)


def test_modules_have_their_options_as_attributes_which_are_checked_at_each_call():
    e, c, bias, targets = problem()
    for module, options in ((LinearCrossEntropy(), CCE_OPTIONS | CCE_FILTERS), (LigerFusedLinearCrossEntropyLoss(),
                                                                                LIGER_OPTIONS)):  # fmt: skip
        assert {name: getattr(module, name) for name in options} == options
        for name, bad in {"reduction": "avg", "softcap": -1.0, "filter_eps": "low", "label_smoothing": 2.0}.items():
            if name in options:
                setattr(module, name, bad)
                with pytest.raises(ValueError, match=f"{name} must be .*{bad}"):
                    module(*((e, c) if module.__class__ is LinearCrossEntropy else (c, e)), targets, bias)
                setattr(module, name, options[name])


def test_cce_without_targets():
    e, c, bias, targets = problem()
    for return_lse in (False, True):
        loss = LinearCrossEntropy(return_lse=return_lse)(e, c, torch.full_like(targets, -100), bias)
        assert (loss[0] if return_lse else loss) == 0


BAD_CCE = [
    (dict(shift=-1), "shift must be an integer of at least 0, got -1"),
    (dict(shift=41), r"shift must be an integer in \[0, 41\), got 41"),
    (dict(shift="high"), "shift must be an integer of at least 0, got 'high'"),  # where 25.1.1 has filter_eps
    (dict(filter_eps="low"), "filter_eps must be None, a number, .*, got 'low'"),
    (dict(impl="cce_fast"), "impl must be one of .*, got 'cce_fast'"),
    (dict(reduction="avg"), "reduction must be one of .*, got 'avg'"),
    (dict(softcap=-1.0), "softcap must be a number, positive .*, got -1.0"),
    (dict(vocab_parallel_options=VocabParallelOptions(0, 90)), "vocab_parallel_options must have processes"),
    (dict(vocab_parallel_options=3), "vocab_parallel_options must be VocabParallelOptions or None, got 3"),
]


@pytest.mark.parametrize("bad, message", BAD_CCE, ids=[f"{k}={v!r}" for b, _ in BAD_CCE for k, v in b.items()])
def test_cce_refuses(bad, message):
    e, c, bias, targets = problem()
    with pytest.raises(ValueError, match=f"^{message}"):
        cut_cross_entropy.linear_cross_entropy(e, c, targets, bias, **bad)
    if "vocab_parallel_options" not in bad and bad.get("shift") != 41:  # which only a call can tell
        with pytest.raises(ValueError, match=f"^{message}"):
            LinearCrossEntropy(**bad)


def split_head(rank, world):
    torch.manual_seed(0)
    e, c, bias, targets = problem(rows=(5, 13))
    for return_lse in (False, True):
        results = []
        for part in (None, VocabParallelOptions.from_vocab(90)):
            rows = slice(None) if part is None else slice(part.start, part.stop)
            tensors = [t.clone().requires_grad_() for t in (e, c[rows], bias[rows])]
            call = functools.partial(cut_cross_entropy.linear_cross_entropy, shift=1, return_lse=return_lse)
            loss = call(*tensors[:2], targets, tensors[2], vocab_parallel_options=part)
            loss = loss[0] + loss[1].pow(2).mean() if return_lse else loss
            de, *of_head = torch.autograd.grad(loss, tensors)
            mine = VocabParallelOptions.from_vocab(90)
            cut = slice(mine.start, mine.stop) if part is None else slice(None)
            results.append((loss.detach(), de, *(t[cut] for t in of_head)))
        torch.testing.assert_close(*results)
    part = VocabParallelOptions.from_vocab(90, reduce_e_grad=False)
    of_e = e.clone().requires_grad_()
    loss = cut_cross_entropy.linear_cross_entropy(of_e, c[part.start : part.stop], targets, vocab_parallel_options=part)
    (share,) = torch.autograd.grad(loss, of_e)
    dist.all_reduce(share)
    whole = cut_cross_entropy.linear_cross_entropy(of_e, c, targets)
    torch.testing.assert_close(share, torch.autograd.grad(whole, of_e)[0])
    turned = world - 1 - rank  # ranges against rank order
    for part in (VocabParallelOptions(30 * turned, 30 * turned + 30), VocabParallelOptions(30 * rank, 30 * rank + 31)):
        try:
            cut_cross_entropy.linear_cross_entropy(e, c[:30], targets, vocab_parallel_options=part)
        except ValueError as error:
            assert "vocab_parallel_options must be ranges in rank order" in str(error)
        else:
            raise AssertionError("no ValueError")
    odd = [VocabParallelOptions.from_vocab(n) for n in (world, 3 * world + 1)]
    assert [(p.start, p.stop) for p in odd] == [(rank, rank + 1), (3 * rank + (rank > 0), 3 * rank + 4)]
    assert dist.get_world_size() == world


def test_cce_head_split_among_processes():
    ranks.run(split_head, 3)


def test_calls_are_cosup_under_autocast_and_compile():
    e, c, bias, targets = problem(torch.float32)

    def liger_loss(e, c):
        options = {"use_token_scaling": True, "lse_square_scale": 0.1, "return_token_accuracy": True}
        output = LigerFusedLinearCrossEntropyLoss(**options)(c, e, targets, bias)
        return output.loss, output.token_accuracy

    def cce_loss(e, c):
        return cut_cross_entropy.linear_cross_entropy(e, c, targets, bias, shift=1, return_lse=True)

    for loss in (liger_loss, cce_loss):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(e, c), loss(e, c))
    with torch.autocast("cpu", torch.bfloat16):
        ours = [f(e, c, targets, bias) for f in (liger_fused_linear_cross_entropy, LinearCrossEntropy())]
        want = cosup.linear_cross_entropy(e, c, targets, linear_bias=bias)
    assert all(torch.equal(loss, want) for loss in ours)
    assert not torch.equal(want, liger.liger_fused_linear_cross_entropy(e, c, targets, bias))
