"""Which flash-attn a model is given. No GPU is needed: the package, the device and the model are what the tests say."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertModel, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, utils

from cosup import doctor, pretrained
from cosup.model import GenCtxModel
from cosup.pretrained import flash_attention, load
from tiny import tiny_folder, tiny_gen


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU of this compute capability (None: without), and these packages."""

    def make(capability, *packages):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        for version, name in ((2, "flash-attn"), (4, "flash-attn-4")):
            monkeypatch.setattr(utils, f"is_flash_attn_{version}_available", lambda name=name: name in packages)
        monkeypatch.setattr(doctor, "version", lambda name: "1.2" if name in packages else None)

    return make


def chosen(model=LlamaForCausalLM, dtype=torch.bfloat16, **config):
    sizes = dict(hidden_size=512, num_attention_heads=4) | config
    return flash_attention(model, model.config_class(**sizes), dtype)


BOTH = ("flash-attn", "flash-attn-4")


@pytest.mark.parametrize("capability, packages, wanted", [
    ((9, 0), BOTH, "flash_attention_4"),
    ((10, 0), BOTH[1:], "flash_attention_4"),
    ((12, 0), BOTH, "flash_attention_4"),
    ((9, 0), BOTH[:1], "flash_attention_2"),
    ((8, 0), BOTH, "flash_attention_2"),
    ((8, 9), BOTH[1:], None),
    ((7, 5), BOTH, None),
    ((9, 0), (), None),
    (None, BOTH, None),
])  # fmt: skip
def test_the_newest_that_the_gpu_runs(capability, packages, wanted, machine):
    machine(capability, *packages)
    assert chosen() == wanted
    assert chosen(dtype=torch.float16) == wanted
    assert chosen(dtype=torch.float32) is None


@pytest.mark.parametrize("model, config", [
    (LlamaForCausalLM, {"hidden_size": 1024}),  # heads of 256
    (LlamaForCausalLM, {"head_dim": 192}),
    (LlamaForCausalLM, {"head_dim": 100}),
    (LlamaForCausalLM, {"attention_dropout": 0.1}),
    (GPT2LMHeadModel, {}),  # drops out 0.1 by default, as the next one does
    (BertModel, {}),
])  # fmt: skip
def test_what_flash_attn_4_has_not_goes_to_2(model, config, machine):
    machine((9, 0), *BOTH)
    assert chosen(model, **config) == "flash_attention_2"
    assert chosen(model, **config | {"hidden_size": 256, "head_dim": 64, "attention_dropout": 0.0, "attn_pdrop": 0.0,
                                     "attention_probs_dropout_prob": 0.0}) == "flash_attention_4"  # fmt: skip


def test_a_transformers_that_does_not_know_it(machine, monkeypatch):
    machine((9, 0), *BOTH)
    monkeypatch.delattr(utils, "is_flash_attn_4_available")
    assert chosen() == "flash_attention_2"


def test_a_model_without_flash_attention_takes_none(machine, monkeypatch):
    machine((9, 0), *BOTH)
    monkeypatch.setattr(LlamaForCausalLM, "_supports_flash_attn", False)
    assert chosen() is None
    assert flash_attention(None, LlamaConfig(), torch.bfloat16) is None  # of code that transformers does not have


@pytest.mark.parametrize("given, asked", [("auto", "mine"), ("eager", "eager"), (None, None)])
def test_a_name_is_taken_as_it_is(given, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "flash_attention", lambda model, *_: model is LlamaForCausalLM and "mine")
    seen = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **options: seen.append(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load("gen", AutoModelForCausalLM, tiny_folder(tmp_path, tiny_gen()), dtype=torch.bfloat16,
             attn_implementation=given, num_layers=None)  # fmt: skip
    assert seen[0]["attn_implementation"] == asked


def test_what_is_not_there_is_named(tmp_path):
    folder = tiny_folder(tmp_path, tiny_gen())
    with pytest.raises(ValueError, match="gen: .*FlashAttention4.* installed"):
        GenCtxModel.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="flash_attention_4")
    assert GenCtxModel.from_pretrained(folder, dtype=torch.bfloat16).gen.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("capability, packages, states, advice", [
    ((9, 0), BOTH, ("1.2", "1.2"), ("", "")),
    ((8, 0), BOTH, ("1.2, idle: it needs a GPU of compute capability 9.0", "1.2"), ("", "")),
    ((9, 0), (), None, ("pip install flash-attn-4", "pip install flash-attn")),
    ((8, 6), (), None, ("", "pip install flash-attn")),
    (None, (), None, ("", "")),
])  # fmt: skip
def test_doctor_says_which_runs_here(capability, packages, states, advice, machine):
    machine(capability, *packages)
    found = doctor._flash_attention("flash-attn-4", 9), doctor._flash_attention("flash-attn", 8)
    assert tuple(finding.advice for finding in found) == advice
    if states:
        assert tuple(finding.state for finding in found) == states
    else:
        assert all(finding.state.startswith("not installed") for finding in found)
