"""A patched causal language model has the loss, the gradients and the outputs that it had, and no logits.

Tolerance: against float64, at most twice the error of the unpatched model in the same dtype.
"""

import copy
import functools
import inspect
from types import SimpleNamespace

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import cosup
from tiny import VOCABULARY, tiny_encoder, tiny_gen

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2,
         "max_position_embeddings": 64}  # fmt: skip
HEADS = {
    "plain": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "scale": ("Cohere", {"logit_scale": 0.3}),
    "divisor": ("Granite", {"logits_scaling": 3.0}),
    "soft cap": ("Gemma2", {"final_logit_softcapping": 3.0}),
    "bias": ("Phi", {}),
    "a layer before it": ("Bert", {"is_decoder": True}),
    "losses of experts": ("Mixtral", {"num_local_experts": 4, "output_router_logits": True}),
}


def model_of(head: str, dtype=torch.float32):
    family, options = HEADS[head]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    for name in [name for name in vars(config) if "dropout" in name or name.endswith("pdrop")]:
        setattr(config, name, 0.0)
    config._experts_implementation = "eager"  # the grouped product knows no float64
    name = "BertLMHeadModel" if family == "Bert" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_()
    return model.train().to(dtype)


def batch(rows=3, tokens=11):
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    labels = ids.clone()
    labels[0, :4] = labels[1, -2:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def gradients(model, **inputs):
    model.zero_grad()
    outputs = model(**inputs)
    loss = outputs.loss if hasattr(outputs, "loss") else outputs[0]
    loss.backward()
    return outputs, loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def loss_in_float64(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="sum")
    return loss / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)


def assert_no_less_exact(ours, plain, exact, message=""):
    """Loss and gradients of ours as near to those in float64 as plain's are, times two."""
    (_, loss, grads), (_, plain_loss, plain_grads), (_, exact_loss, exact_grads) = ours, plain, exact
    # one number may be lucky: logits are off by half an eps of the weights, their mean over some 30 rows by a tenth
    eps = max(4 * torch.finfo(plain_loss.dtype).eps, *(torch.finfo(g.dtype).eps / 16 for g in grads.values()))
    assert abs(loss - exact_loss) <= 2 * abs(plain_loss - exact_loss) + eps * abs(exact_loss), message
    assert loss.dtype == plain_loss.dtype and grads.keys() == plain_grads.keys()
    largest = max(g.norm() for g in exact_grads.values())
    for name, wanted in exact_grads.items():
        eps = torch.finfo(grads[name].dtype).eps
        error, plain_error = ((g[name].double() - wanted).norm() for g in (grads, plain_grads))
        assert error <= 2 * plain_error + eps * largest, f"{name} {message}"


@pytest.mark.parametrize(
    "dtype, items",
    [(torch.float32, None), (torch.float32, 20), (torch.bfloat16, torch.tensor(20)), (torch.float16, None)],
    ids=["float32", "float32, counted", "bfloat16, counted by a tensor", "float16"],
)
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients(head, dtype, items):
    inputs = batch() if items is None else {**batch(), "num_items_in_batch": items}
    model, exact = model_of(head, dtype), model_of(head, dtype).double()
    exact.loss_function = loss_in_float64
    plain, wanted = gradients(model, **inputs), gradients(exact, **inputs)
    ours = gradients(cosup.patch(model), **inputs)
    assert plain[0].logits is not None and ours[0].logits is None and "logits" not in ours[0]
    assert [*ours[0]] == [name for name in plain[0] if name != "logits"]
    assert_no_less_exact(ours, plain, wanted)


def assert_as_before(model, **inputs):
    """Patched in float32: equal but for rounding. Returns the outputs of both."""
    torch.manual_seed(1)
    plain = gradients(model, **inputs)
    torch.manual_seed(1)
    ours = gradients(cosup.patch(model), **inputs)
    torch.testing.assert_close(ours[1], plain[1], rtol=2e-6, atol=0)
    assert ours[2].keys() == plain[2].keys()
    largest = max(g.abs().max().item() for g in plain[2].values())
    for name, grad in plain[2].items():
        torch.testing.assert_close(ours[2][name], grad, rtol=0, atol=2e-6 * largest, msg=lambda m, n=name: f"{n}: {m}")
    return plain[0], ours[0]


@pytest.mark.parametrize(
    "more",
    [
        {"return_dict": False},
        {"output_hidden_states": True, "use_cache": False},
        {"shift_labels": torch.randint(0, VOCABULARY, (3, 11))},
        {"shift_labels": torch.randint(0, VOCABULARY, (3, 4)), "logits_to_keep": 4},
        {"ignore_index": 5, "labels": torch.randint(0, VOCABULARY, (3, 11)).masked_fill(torch.rand(3, 11) < 0.3, 5)},
    ],
    ids=lambda more: " ".join(more),
)
def test_arguments_are_kept(more):
    plain, ours = assert_as_before(model_of("plain"), **{**batch(), **more})
    if more.get("return_dict", True):
        assert [*ours] == [name for name in plain if name != "logits"]
    else:
        assert isinstance(ours, tuple) and len(ours) == len(plain) - 1


def test_labels_by_position():
    model = model_of("plain")
    names = [*inspect.signature(model.forward).parameters]
    inputs = batch()
    positional = [inputs.get(name) for name in names[: names.index("labels") + 1]]
    wanted = model(**inputs).loss
    assert names == [*inspect.signature(cosup.patch(model).forward).parameters]
    outputs = model(*positional)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_logits_where_they_are_asked_for(training):
    model, inputs = model_of("soft cap").train(training), batch()
    plain = model(**inputs)
    cosup.patch(model)
    for asked in (True,) if training else (True, None):
        assert torch.equal(model(**inputs, return_logits=asked).logits, plain.logits)
    without_labels = {name: value for name, value in inputs.items() if name != "labels"}
    assert torch.equal(model(**without_labels).logits, plain.logits)
    outputs = model(**inputs, return_logits=False)
    assert outputs.logits is None
    torch.testing.assert_close(outputs.loss, plain.loss)
    assert model.training == training
    assert isinstance(model.lm_head(torch.ones(1, 32)), torch.Tensor)  # by itself it is the head that it was


@pytest.mark.parametrize("head", ["plain", "a layer before it"])
def test_stats_of_the_same_pass(head):
    model, inputs = model_of(head), batch()
    logits = model(**inputs).logits[:, :-1].double()
    stats = cosup.patch(model)(**inputs, return_stats=True).stats
    target = inputs["labels"][:, 1:]
    counts = target != -100
    log_p = logits.log_softmax(-1)
    nll = -log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(stats.nll[:, :10], (nll * counts).float())
    torch.testing.assert_close(stats.entropy[:, :10], (-(log_p.exp() * log_p).sum(-1) * counts).float())
    assert torch.equal(stats.top1[:, :10].bool(), (logits.argmax(-1) == target) & counts)
    for wrong in ({"return_logits": True}, {"labels": None}, {"return_dict": False}):
        with pytest.raises(ValueError, match="return_stats"):
            model(**{**inputs, **wrong}, return_stats=True)


def test_generation_is_as_before():
    model, prompt = model_of("plain").eval(), batch()["input_ids"][:1]
    wanted = model.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(cosup.patch(model).generate(prompt, max_new_tokens=5, do_sample=False), wanted)


def test_undone_it_is_as_before():
    model, inputs = model_of("scale"), batch()
    before = [dict(vars(module)) for module in model.modules()]
    wanted = gradients(model, **inputs)
    assert cosup.patch(model) is model and cosup.patch(model) is model
    gradients(model, **inputs)
    assert cosup.unpatch(model) is model and cosup.unpatch(model) is model
    assert [vars(module).keys() for module in model.modules()] == [part.keys() for part in before]
    outputs = gradients(model, **inputs)
    assert torch.equal(outputs[0].logits, wanted[0].logits)
    assert all(torch.equal(outputs[2][name], grad) for name, grad in wanted[2].items())


def test_a_forward_wrapped_since_is_not_thrown_away():
    model = cosup.patch(model_of("plain"))
    ours = model.forward
    model.forward = functools.wraps(ours)(lambda *args, **kwargs: ours(*args, **kwargs))  # with its attributes
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        cosup.unpatch(model)
    model.forward = ours
    assert "forward" not in vars(cosup.unpatch(model))


def test_a_forward_of_another_object_goes_on():
    class Wrapper:
        def __init__(self, model):
            self.own, self.calls = type(model).forward, 0
            self.model = model

        def forward(self, input_ids=None, attention_mask=None, labels=None):
            self.calls += 1
            return self.own(self.model, input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model = model_of("plain")
    wrapper = Wrapper(model)
    model.forward = wrapper.forward
    assert_as_before(model, **batch())
    assert wrapper.calls == 3
    assert [*inspect.signature(model.forward).parameters] == ["input_ids", "attention_mask", "labels"]


def test_a_copy_of_one_wrapped_before():
    """accelerate's hooks are partial functions of the module, which a copy has of itself."""
    model = model_of("plain")
    model.forward = functools.partial(type(model).forward, model)
    other = copy.deepcopy(cosup.patch(model))
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**batch()).loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item())
    assert not other.eval()(**batch()).logits.any()


def test_one_wrapped_before_goes_on():
    model, calls = model_of("plain"), []
    own = model.forward

    def wrapped(input_ids=None, attention_mask=None, labels=None, **kwargs):
        calls.append(1)
        return own(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **kwargs)

    model.forward = wrapped
    assert_as_before(model, **batch())
    assert len(calls) == 3  # plain, the two tokens, patched
    assert cosup.unpatch(model).forward is wrapped


def test_a_copy_is_a_model_of_its_own():
    model = cosup.patch(model_of("plain"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    inputs = batch()
    assert other(**inputs).loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item())
    assert other(**inputs).logits is None and model(**inputs).loss.item() > 1.01 * other(**inputs).loss.item()


def test_unpatching_a_copy_leaves_the_first():
    model = cosup.patch(model_of("plain"))
    other = cosup.unpatch(copy.deepcopy(model))
    assert other(**batch()).logits is not None and model(**batch()).logits is None


def test_pickled_it_can_be_patched_anew(tmp_path):
    torch.save(cosup.patch(model_of("plain")), tmp_path / "model")
    model = torch.load(tmp_path / "model", weights_only=False)
    assert cosup.patch(model)(**batch()).logits is None
    assert cosup.unpatch(model)(**batch()).logits is not None


def test_two_models_with_one_head():
    first, second = model_of("plain"), model_of("plain")
    second.lm_head = first.lm_head
    wanted = [model(**batch()).loss.item() for model in (first, second)]
    cosup.patch(first), cosup.patch(second)
    assert [model(**batch()).loss.item() for model in (first, second)] == pytest.approx(wanted)
    cosup.unpatch(first)
    assert first(**batch()).logits is not None and second(**batch()).logits is None
    cosup.unpatch(second)
    assert second(**batch()).logits is not None


def test_a_call_within_a_call():
    model, inputs, inner = cosup.patch(model_of("plain")), batch(), []
    wanted = cosup.unpatch(copy.deepcopy(model))(**inputs)

    def call(*_):
        if not inner:
            inner.append(None)  # the inner calls come here too
            inner[:] = [model(input_ids=inputs["input_ids"]), model(**inputs)]

    model.model.norm.register_forward_hook(call)
    outputs = model(**inputs, return_stats=True)
    assert torch.equal(inner[0].logits, wanted.logits) and inner[1].logits is None
    torch.testing.assert_close(outputs.loss, wanted.loss)
    assert outputs.logits is None and outputs.stats.nll.shape == (3, 11)


def test_a_head_that_comes_later():
    model, inputs = cosup.patch(model_of("plain")), batch()
    model.resize_token_embeddings(VOCABULARY + 7)
    assert model(**inputs).logits is None
    model.set_output_embeddings(nn.Linear(32, VOCABULARY + 7, bias=False))
    plain = cosup.unpatch(copy.deepcopy(model))(**inputs)
    outputs = model(**inputs)
    assert outputs.logits is None and plain.logits is not None
    torch.testing.assert_close(outputs.loss, plain.loss)


def test_saved_as_before(tmp_path):
    model, inputs = model_of("plain"), batch()
    cosup.patch(model).save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path).train()
    assert again.config.architectures == ["LlamaForCausalLM"]
    assert again(**inputs).logits is not None
    torch.testing.assert_close(again(**inputs).loss, model(**inputs).loss)


def test_a_patched_model_trains_by_gradient_checkpointing():
    model = model_of("plain")
    model.gradient_checkpointing_enable()
    assert_as_before(model, **batch(), use_cache=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    inputs, model = batch(), model_of("plain")
    exact = copy.deepcopy(model).double()
    exact.loss_function = loss_in_float64
    with torch.autocast("cpu", dtype):
        plain, ours = gradients(model, **inputs), None
        cosup.patch(model)
        ours = gradients(model, **inputs)
    assert_no_less_exact(ours, plain, gradients(exact, **inputs))


def test_compiled_whole():
    model, inputs = model_of("soft cap"), {**batch(), "use_cache": False}
    wanted = gradients(model, **inputs)
    compiled = torch.compile(cosup.patch(model), fullgraph=True, backend="aot_eager")
    outputs = gradients(compiled, **inputs)
    assert outputs[0].logits is None
    torch.testing.assert_close(outputs[1], wanted[1])
    for name, grad in wanted[2].items():
        torch.testing.assert_close(outputs[2][f"_orig_mod.{name}"], grad, rtol=1e-4, atol=1e-5)
    assert compiled.eval()(**inputs).logits is not None
    cosup.unpatch(compiled)
    assert "forward" not in vars(model)


LORA = {"r": 4, "lora_alpha": 6, "init_lora_weights": False}
ADAPTERS = {
    "elsewhere": peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5, **LORA),
    "on the head": peft.LoraConfig(target_modules=["q_proj", "lm_head"], **LORA),
    "head trained": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **LORA),
    "both tables": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], **LORA),
    "before the tokens": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind):
    ADAPTERS[kind].task_type = "CAUSAL_LM"
    model = peft.get_peft_model(model_of("plain"), ADAPTERS[kind]).train()
    plain, ours = assert_as_before(model, **batch())
    assert ours.logits is None and plain.logits is not None
    assert cosup.unpatch(model)(**batch()).logits is not None


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_after_the_patch(kind):
    ADAPTERS[kind].task_type = "CAUSAL_LM"
    models = [peft.get_peft_model(base, ADAPTERS[kind]) for base in (model_of("plain"), cosup.patch(model_of("plain")))]
    models[1].load_state_dict(models[0].state_dict())
    outputs = []
    for model in models:
        torch.manual_seed(1)
        outputs.append(gradients(model.train(), **batch()))
    plain, ours = outputs
    assert ours[0].logits is None and ours[2].keys() == plain[2].keys()
    torch.testing.assert_close(ours[1], plain[1])
    for name, grad in plain[2].items():
        torch.testing.assert_close(ours[2][name], grad, rtol=1e-4, atol=1e-5)


def test_several_adapters_of_a_head_on_and_off():
    model = peft.get_peft_model(model_of("plain"), ADAPTERS["on the head"])
    second = peft.LoraConfig(r=3, lora_alpha=9, target_modules=["lm_head"], init_lora_weights=False)
    model.add_adapter("second", second)
    model.base_model.set_adapter(["default", "second"])
    inputs = batch()
    for change in (lambda: None, model.disable_adapter_layers, model.enable_adapter_layers, model.merge_adapter):
        change()
        model.train()
        cosup.unpatch(model)
        wanted = model(**inputs).loss
        ours = cosup.patch(model)(**inputs)
        assert ours.logits is None
        torch.testing.assert_close(ours.loss, wanted)


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_adapters_of_a_head_of_other_forms(options):
    config = peft.LoraConfig(target_modules=["lm_head"], **LORA, **options)
    model = peft.get_peft_model(model_of("bias"), config).train()
    _, ours = assert_as_before(model, **batch())
    assert ours.logits is None


def test_an_adapter_that_is_no_sum_is_refused():
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="PhiForCausalLM"):
        cosup.patch(peft.get_peft_model(model_of("bias"), config).train())


class Changed(LlamaForCausalLM):
    """A model that does something to its logits before their cross entropy."""

    change = staticmethod(lambda z: z)

    def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
        logits = self.change(self.lm_head(self.model(input_ids, attention_mask=attention_mask)[0]))
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1], **kwargs)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def changed(change):
    torch.manual_seed(0)
    model = Changed(tiny_gen().config).train()
    model.change = change
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z * 0.5,
        lambda z: 2 * z / 3,
        lambda z: torch.tanh(z / 5) * 7,
        lambda z: 2 * (z / 3).tanh(),
        lambda z: z.to(torch.float64),
        lambda z: z.to("cpu").contiguous(),
        lambda z: z[..., : z.size(-1)],
        lambda z: z[:, :, :],
        lambda z: z[..., :200],
        lambda z: z[:, :, 0:-100:1].float(),
        lambda z: z.reshape(z.shape),
        lambda z: z.view(-1, z.shape[-1]).view(*z.size()),
    ],
)
def test_what_a_model_may_do_to_its_logits(change):
    inputs = batch()
    inputs["labels"] = inputs["labels"].where(inputs["labels"] < 0, inputs["labels"] % 200)
    assert_as_before(changed(change), **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_has_the_dtype_of_the_logits(dtype):
    """Most models make theirs float32; one that does not has a loss of 16 bits, and goes on having one."""
    model = changed(lambda z: z).to(dtype)
    model.loss_function = lambda logits, labels, size: F.cross_entropy(logits.view(-1, size), labels.view(-1))
    plain = model(**batch()).loss
    ours = cosup.patch(model)(**batch()).loss
    assert ours.dtype == plain.dtype == dtype
    torch.testing.assert_close(ours, plain)


def assign(z):
    z[..., 3] = -1e9
    return z


@pytest.mark.parametrize(
    "change",
    [
        lambda z: z + 1,
        lambda z: 1 - z,
        lambda z: z * torch.tensor(2.0),
        lambda z: z * -1.0,
        lambda z: -z,
        lambda z: z**2,
        lambda z: z if hasattr(z, "square") else z,
        lambda z: z if z == 0 else z,
        lambda z: z.__imul__(2.0),
        lambda z: z.__itruediv__(2.0),
        lambda z: z * 0,
        lambda z: z.tanh().tanh(),
        lambda z: z.relu(),
        lambda z: torch.where(torch.tensor(True), z, z),
        lambda z: z.masked_fill(torch.tensor(False), 0.0),
        lambda z: z[..., 1:],
        lambda z: z[..., ::2],
        lambda z: z[..., torch.arange(VOCABULARY)],
        lambda z: z.transpose(0, 1),
        lambda z: z.view(3, -1),
        lambda z: torch.cat([z, z]),
        lambda z: torch.stack([z, z], dim=1),
        lambda z: torch.softmax(input=z, dim=-1),
        assign,
    ],
)
def test_what_it_may_not(change):
    model = changed(change)
    with pytest.raises(ValueError, match="Changed .*unpatch"):
        cosup.patch(model)
    assert "forward" not in vars(model) and "forward" not in vars(model.lm_head)
    with torch.device("meta"):
        later = changed(change)
    later = cosup.patch(later).to_empty(device="cpu")  # nothing to run two tokens with
    later.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="Changed .*unpatch"):
        later(**batch())


def test_a_loss_of_another_kind_is_refused():
    model = changed(lambda z: z)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: F.nll_loss(
        logits.log_softmax(-1).flatten(0, 1), labels.flatten()
    )
    with pytest.raises(ValueError, match="log_softmax"):
        cosup.patch(model)
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: model.lm_head.weight.sum()
    with pytest.raises(ValueError, match="something else"):
        cosup.patch(model)
    model.loss_function = lambda logits, labels, *a, **k: F.cross_entropy(
        logits.view(-1, VOCABULARY), F.one_hot(labels, VOCABULARY).view(-1, VOCABULARY).float()
    )
    with pytest.raises(ValueError, match="targets"):
        cosup.patch(model)


@pytest.mark.parametrize(
    "lse",
    [
        lambda z: z.logsumexp(-1),
        lambda z: torch.logsumexp(z, dim=2, keepdim=True),
        lambda z: torch.logsumexp(input=z.view(-1, VOCABULARY), dim=1)[:, None],
    ],
)
def test_a_loss_of_the_log_sum_exp_beside_it(lse):
    model = changed(lambda z: 2 * torch.tanh(z * 1.5))
    cross_entropy = model.loss_function
    model.loss_function = lambda z, *args, **kwargs: cross_entropy(z, *args, **kwargs) + lse(z).square().mean()
    assert_as_before(model, **batch())


@pytest.mark.parametrize("dim", [0, 1, -2, (1, 2)])
def test_a_log_sum_exp_over_rows_is_refused(dim):
    model = changed(lambda z: z)
    cross_entropy = model.loss_function
    model.loss_function = lambda z, *args, **kwargs: cross_entropy(z, *args, **kwargs) + z.logsumexp(dim).mean()
    with pytest.raises(ValueError, match="sum over rows"):
        cosup.patch(model)


def test_what_is_no_causal_model_is_refused():
    class Head(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 2

    for model, reason in ((tiny_encoder(), "head"), (nn.Linear(2, 2), "head"), (tiny_gen().model, "head")):
        with pytest.raises(ValueError, match=reason):
            cosup.patch(model)
    model = tiny_gen()
    model.lm_head = Head(32, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match="Head of LlamaForCausalLM"):
        cosup.patch(model)
    model.lm_head = nn.ModuleList([nn.Linear(32, VOCABULARY)])
    with pytest.raises(ValueError, match="ModuleList of LlamaForCausalLM"):
        cosup.patch(model)
    model = SimpleNamespace(get_output_embeddings=lambda: nn.Linear(2, 3), forward=lambda input_ids: None)
    with pytest.raises(ValueError, match="labels"):
        cosup.patch(model)


@pytest.mark.parametrize("kind", ["own forward", "own weight", "backward hook"])
def test_a_head_that_is_more_than_linear_is_refused(kind):
    class Rounded(nn.Parameter):
        pass

    model = model_of("plain")
    head = model.lm_head
    if kind == "own forward":
        head.forward = lambda x: 2 * nn.Linear.forward(head, x)
    elif kind == "own weight":
        head.weight = Rounded(head.weight.detach())
    else:
        head.register_full_backward_hook(lambda module, of_input, of_output: None)
    with pytest.raises(ValueError, match="head"):
        cosup.patch(model)
    assert model(**batch()).logits is not None


def test_weights_made_in_the_head_call():
    """A parametrization is read once in a call, as by the head itself: power iterations move its state."""
    models = [torch.nn.utils.parametrizations.spectral_norm(model_of("plain").lm_head) for _ in range(2)]
    outputs = []
    for head, change in zip(models, (lambda model: model, cosup.patch), strict=True):
        model = model_of("plain")
        model.lm_head = head
        change(model)
        before = copy.deepcopy(head.state_dict())
        model.train()
        for _ in range(2):
            outputs.append(model(**batch()).loss)
        assert any(not torch.equal(before[name], value) for name, value in head.state_dict().items())
    torch.testing.assert_close(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[1], outputs[3])


def test_adapters_of_a_parameter():
    """PEFT adds them to the weight for the time of the head's call."""
    config = peft.LoraConfig(**LORA, target_modules=["q_proj"], target_parameters=["lm_head.weight"])
    _, ours = assert_as_before(peft.get_peft_model(model_of("plain"), config).train(), **batch())
    assert ours.logits is None


def test_the_mode_is_set_by_each_module():
    class Merged(nn.Module):
        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    model = model_of("plain")
    model.model.layers[0].adapter = Merged()
    cosup.patch(model)
    assert not model.model.layers[0].adapter.merged


def test_statistics_of_two_cross_entropies_are_refused():
    model = changed(lambda z: z)
    once = model.loss_function
    model.loss_function = lambda *args, **kwargs: once(*args, **kwargs) + once(*args, **kwargs)
    assert_as_before(model, **batch())
    with pytest.raises(ValueError, match="return_stats.*2 cross entropies"):
        model(**batch(), return_stats=True)


def test_unwrapped_by_accelerate_it_is_patched_still():
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # a trainer of another test set it
    model = cosup.patch(model_of("plain"))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare(model)
    assert prepared(**batch()).logits is None
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped(**batch()).logits is None
    assert cosup.unpatch(unwrapped)(**batch()).logits is not None
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_text_with_images():
    """Its head is of the text part; images stand in the rows as tokens that are no targets."""
    torch.manual_seed(0)
    seen = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                            image_size=16, patch_size=8)  # fmt: skip
    text = LlamaConfig(**SIZES)
    config = LlavaConfig(vision_config=seen, text_config=text, image_token_index=VOCABULARY - 1, image_seq_length=4)
    inputs = batch()
    inputs["input_ids"][:, 1:5] = inputs["labels"][:, 1:5] = VOCABULARY - 1
    inputs["labels"] = inputs["labels"].masked_fill(inputs["labels"] == VOCABULARY - 1, -100)
    assert_as_before(LlavaForConditionalGeneration(config).train(), **inputs, pixel_values=torch.randn(3, 3, 16, 16))


def test_patched_again_where_a_trainer_has_wrapped_it(tmp_path):
    """A model that is trained twice is patched twice."""
    rows = [{"input_ids": row, "labels": row} for row in batch()["input_ids"]]
    options = dict(max_steps=1, use_cpu=True, bf16=True, report_to=[], disable_tqdm=True, save_strategy="no")
    model = model_of("plain")
    for _ in range(2):
        assert cosup.patch(model) is model
        Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows).train()
    assert model(**batch()).logits is None
    other = cosup.patch(model_of("plain"))
    other.forward = lambda *args, **kwargs: type(other).forward(other, *args, **kwargs)
    with pytest.raises(ValueError, match="wanted LlamaForCausalLM as cosup.patch left it, got it with another forward"):
        cosup.patch(other)


def test_the_trial_leaves_no_trace():
    model = model_of("plain")
    model.model.layers[0].eval()
    state, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    cosup.patch(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_differentiable_stats():
    """A loss of one's own over log-probabilities and entropies, as of policy gradients."""
    model, inputs = model_of("soft cap"), batch()
    target, advantage = inputs["labels"][:, 1:], torch.randn(3, 10)
    counts = target != -100

    def loss_of(log_p, entropy):
        return (counts * (advantage * log_p.exp() - 0.1 * entropy)).sum()

    log_p = model(**inputs).logits[:, :-1].log_softmax(-1)
    wanted = loss_of(log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1))
    grads = torch.autograd.grad(wanted, [*model.parameters()])
    outputs = cosup.patch(model)(**inputs, return_stats="differentiable")
    torch.testing.assert_close(outputs.loss, model(**inputs).loss)
    ours = loss_of(outputs.stats.log_prob[:, :10], outputs.stats.entropy[:, :10])
    torch.testing.assert_close(ours, wanted)
    for grad, other in zip(torch.autograd.grad(ours, [*model.parameters()]), grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="return_stats.*'all'"):
        model(**inputs, return_stats="all")


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, i):
        ids = batch(16, 9)["input_ids"][i]
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < i % 5, -100)}


def test_trained_by_the_trainer_of_transformers(tmp_path):
    """Accumulation counts targets over batches; evaluation has its logits; the saved model is the plain one."""

    def train(model):
        torch.manual_seed(0)
        args = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=5, logging_steps=1,
            learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, args, train_dataset=Rows(), eval_dataset=Rows(),
            compute_metrics=lambda seen: {"mean": seen.predictions[0].mean()} if isinstance(seen.predictions, tuple)
            else {"mean": seen.predictions.mean()},
        )  # fmt: skip
        trainer.train()
        found = trainer.evaluate()
        unwrapped = trainer.accelerator.unwrap_model(trainer.model_wrapped)
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], found, unwrapped

    losses, found, _ = train(model_of("plain"))
    model = cosup.patch(model_of("plain"))
    ours, our_found, unwrapped = train(model)
    assert unwrapped is model
    assert ours == pytest.approx(losses, rel=1e-4)
    assert our_found["eval_loss"] == pytest.approx(found["eval_loss"], rel=1e-4)
    assert our_found["eval_mean"] == pytest.approx(found["eval_mean"], rel=1e-2)
    assert "forward" not in vars(cosup.unpatch(model))


def test_no_targets():
    """PyTorch's mean of nothing is NaN; here it is 0, with gradients of 0."""
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    _, loss, grads = gradients(cosup.patch(model_of("plain")), **inputs)
    assert loss == 0 and all(not grad.any() for grad in grads.values())


def test_targets_out_of_range():
    inputs = batch()
    inputs["labels"][0, 5] = VOCABULARY
    with pytest.raises(IndexError):
        cosup.patch(model_of("plain"))(**inputs)
