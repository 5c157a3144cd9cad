"""Which flash-attn a model is given. No GPU is needed: the package, the device and the model are what the tests say."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BertModel,
    DeepseekV2ForCausalLM,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GPT2LMHeadModel,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MiMoV2FlashForCausalLM,
    MusicgenConfig,
    MusicgenForCausalLM,
    PreTrainedModel,
    SegformerConfig,
    SegformerModel,
    Zamba2ForCausalLM,
    ZambaForCausalLM,
    utils,
)

from cosup import doctor, pretrained
from cosup.data.schema import write_jsonl
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.pretrained import check_head, flash_attention, load
from cosup.train import CoSupConfig, CoSupTrainer
from tiny import tiny_folder, tiny_gen, tiny_instances, tiny_passages


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


@pytest.mark.parametrize("model, config, wanted", [
    (LlamaForCausalLM, {"head_dim": 256}, "flash_attention_2"),
    (LlamaForCausalLM, {"head_dim": 264}, None),
    (ZambaForCausalLM, {"attention_head_dim": 464}, None),
    (Zamba2ForCausalLM, {"attention_head_dim": 160}, "flash_attention_2"),
    # multi-head latent attention, whose head_dim is that of the rotated part
    (DeepseekV2ForCausalLM, {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}, "flash_attention_2"),
    (DeepseekV3ForCausalLM, {"qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256}, "flash_attention_2"),
    (DeepseekV3ForCausalLM, {"qk_nope_head_dim": 224, "qk_rope_head_dim": 64, "v_head_dim": 128}, None),
    (DeepseekV3ForCausalLM, {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 128}, "flash_attention_4"),
    (DeepseekV3ForCausalLM, {"qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 160}, "flash_attention_2"),
])  # fmt: skip
def test_a_head_is_as_wide_as_its_widest_part(model, config, wanted, machine):
    machine((9, 0), *BOTH)
    assert chosen(model, **config) == wanted


@pytest.mark.parametrize("packages, wanted", [(BOTH, "flash_attention_4"), (BOTH[:1], None)])
def test_a_name_that_the_model_does_not_take_is_not_chosen(packages, wanted, machine):
    machine((9, 0), *packages)
    assert chosen(GptOssForCausalLM, head_dim=64) == wanted
    assert chosen(MiMoV2FlashForCausalLM, head_dim=128, v_head_dim=128) == wanted


@pytest.mark.parametrize("model, config", [
    (Gemma4ForCausalLM, Gemma4TextConfig()),  # raises RuntimeError: layers differ
    (MusicgenForCausalLM, MusicgenConfig(text_encoder={"model_type": "t5"}, audio_encoder={"model_type": "encodec"},
                                         decoder={})),  # ValueError: two configs of text
    (SegformerModel, SegformerConfig()),  # AttributeError
])  # fmt: skip
def test_a_config_without_one_width_of_heads_takes_none(model, config, machine):
    machine((9, 0), *BOTH)
    assert model._supports_flash_attn and flash_attention(model, config, torch.bfloat16) is None


def test_without_a_package_no_config_is_read(machine, monkeypatch):
    config = LlamaConfig()
    monkeypatch.setattr(LlamaConfig, "get_text_config", lambda _: pytest.fail("read"))
    for capability, packages in ((9, 0), ()), ((7, 5), BOTH), ((8, 0), BOTH[1:]):
        machine(capability, *packages)
        assert flash_attention(LlamaForCausalLM, config, torch.bfloat16) is None


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
    with pytest.raises(ValueError, match="division by zero"):
        load("gen", AutoModelForCausalLM, tiny_folder(tmp_path, tiny_gen()), dtype=torch.bfloat16,
             attn_implementation=given, num_layers=None)  # fmt: skip
    assert seen[0]["attn_implementation"] == asked


def test_what_is_not_there_is_named(tmp_path):
    folder = tiny_folder(tmp_path, tiny_gen())
    with pytest.raises(ValueError, match="gen: .*FlashAttention4.* installed"):
        GenCtxModel.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="flash_attention_4")
    assert GenCtxModel.from_pretrained(folder, dtype=torch.bfloat16).gen.config._attn_implementation == "sdpa"


def bert(**config):  # its head has a transform before it
    sizes = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    return BertLMHeadModel(BertConfig(**sizes, is_decoder=True, attention_probs_dropout_prob=0.0, **config))


def test_the_head_of_a_model_given_flash_attention_is_checked(tmp_path, machine, monkeypatch):
    """On the CPU, where it was loaded and flash-attn does not run."""
    machine((9, 0), *BOTH)
    monkeypatch.setattr(PreTrainedModel, "_check_and_adjust_attn_implementation", lambda self, name, *_, **__: name)
    options = dict(config=GenCtxConfig(shared_weights=True), dtype=torch.bfloat16)
    model = GenCtxModel.from_pretrained(tiny_folder(tmp_path / "llama", tiny_gen()), **options)
    assert model.gen.config._attn_implementation == "flash_attention_4"
    with pytest.raises(ValueError, match="gen: wanted logits that are a head over .*, got BertLMHeadModel"):
        GenCtxModel.from_pretrained(tiny_folder(tmp_path / "bert", bert()), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_check_of_a_head_leaves_the_attention_as_it_was(dtype):
    for gen, refused in (tiny_gen(), False), (bert(), True):
        gen = gen.to(dtype).train()
        gen.config._attn_implementation = "flash_attention_2"
        if refused:
            with pytest.raises(ValueError, match="gen: wanted logits"):
                check_head(gen)
        else:
            check_head(gen)
        assert gen.config._attn_implementation == "flash_attention_2" and gen.training


def test_the_head_of_a_model_with_one_attention_alone_is_not_tried():
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    falcon = FalconForCausalLM(FalconConfig(**sizes))
    check_head(falcon)
    falcon.config._attn_implementation = "flash_attention_2"
    falcon.transformer.forward = None
    check_head(falcon)


def test_training_loads_float32_weights(tmp_path, monkeypatch):
    """So "auto" is transformers' own choice there, with bf16 too."""
    seen = []
    monkeypatch.setattr(pretrained, "flash_attention", lambda model, config, dtype: seen.append(dtype))
    passages = tiny_passages(4)
    write_jsonl(tmp_path / "passages", passages.values())
    write_jsonl(tmp_path / "instances", tiny_instances(4))
    gen = str(tiny_folder(tmp_path / "gen", tiny_gen()))
    config = CoSupConfig(output_dir=str(tmp_path), gen=gen, instances=str(tmp_path / "instances"),
                         passages=str(tmp_path / "passages"), use_cpu=True, bf16=True)  # fmt: skip
    model = CoSupTrainer.from_config(config).model
    assert seen == [torch.float32] * 2 and model.gen.config._attn_implementation == "sdpa"


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
