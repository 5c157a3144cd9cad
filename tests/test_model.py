"""GenCtxModel: what is read from the two models, and that a pair survives saving. Nothing is downloaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from transformers import (
    LlamaForCausalLM,
    T5Config,
    T5Model,
)

from cosup.model import SHARDS, GenCtxConfig, GenCtxModel
from cosup.tokens import PAD, STARTS_FROM, control_ids, encode
from pairs import FAMILIES, family, pair, run, shared
from tiny import tiny_encoder, tiny_folder, tiny_gen, tiny_instances, tiny_passages, tiny_tokenizer

PASSAGES = tiny_passages(12)


def batch_of(model: GenCtxModel, n: int = 6) -> dict[str, torch.Tensor]:
    return model.collator(PASSAGES)(tiny_instances(12)[:n])


# ---- what is read


@pytest.mark.parametrize("name", FAMILIES)
def test_the_head_over_hidden_is_the_logits_of_gen(name):
    model = shared(family(name))
    batch = batch_of(model, 2)
    output = run(model, batch)
    weight, bias = model.lm_head
    logits = output.hidden @ weight.T if bias is None else output.hidden @ weight.T + bias
    logits = model.logit_scale * logits
    if model.logit_softcap is not None:
        logits = model.logit_softcap * torch.tanh(logits / model.logit_softcap)
    with torch.no_grad():
        wanted = model.gen(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_logits_are_never_computed():
    model = shared(tiny_gen())

    def refuse(*_):
        raise AssertionError("the head was run")

    model.gen.lm_head.register_forward_hook(refuse)
    assert run(model, batch_of(model)).hidden.shape[-1] == 32


def test_query_is_gens_state_at_each_retrieval_token_read_alone():
    model = pair()
    batch = batch_of(model)
    output, retrieve = run(model, batch), control_ids(model.gen_tokenizer).retrieve
    place = (batch["input_ids"] == retrieve).nonzero()
    assert len(place) == len(output.query) > 4
    for query, (b, t) in zip(output.query, place.tolist(), strict=True):
        alone = model.gen(batch["input_ids"][b : b + 1, : t + 1], output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(query, alone[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "token"])
@pytest.mark.parametrize("ctx", ["llama", "gpt2", "bert"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_passage_has_one_vector_in_any_batch_and_padding(ctx, pooling, data):
    encoder = {"llama": tiny_gen(1).model, "gpt2": family("gpt2", 1).transformer, "bert": tiny_encoder()}[ctx]
    model = GenCtxModel(tiny_gen(), encoder, tiny_tokenizer(), tiny_tokenizer(), GenCtxConfig(pooling=pooling)).eval()
    passages = data.draw(st.lists(st.sampled_from(list(PASSAGES.values())), min_size=1, max_size=4))
    batch = model.passage_batch(passages)
    shape = (len(passages), batch["input_ids"].shape[1] + data.draw(st.integers(0, 9)))
    ids = torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(0))  # padding may hold anything
    mask = torch.zeros(shape, dtype=torch.int64)
    for p, row in enumerate(batch["attention_mask"]):
        length = int(row.sum())
        start = data.draw(st.integers(0, shape[1] - length))
        ids[p, start : start + length] = batch["input_ids"][p, :length]
        mask[p, start : start + length] = 1
    with torch.no_grad():
        vectors = model.embed_passages(ids, mask)
        for vector, passage in zip(vectors, passages, strict=True):
            alone = model.embed_passages(**model.passage_batch([passage]))[0]
            torch.testing.assert_close(vector, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last", "token"])
def test_pooling_reads_what_it_says(pooling):
    model = shared(tiny_gen(), pooling=pooling, max_passage_length=9)
    passage = PASSAGES["p1"]
    ids = model.passage_batch([passage])["input_ids"]
    assert ids.shape == (1, 9)
    assert (ids[0, -1] == control_ids(model.ctx_tokenizer).embed) == (pooling == "token")
    state = model.ctx(ids).last_hidden_state[0]
    wanted = state.mean(dim=0) if pooling == "mean" else state[-1]
    torch.testing.assert_close(model.embed_passages(ids, torch.ones_like(ids))[0], wanted, rtol=1e-5, atol=1e-6)


def test_collator_and_passage_batch_give_a_passage_the_same_vector():
    model = pair(pooling="token", max_passage_length=12)
    batch = batch_of(model)
    vectors = run(model, batch).passages
    ids = [list(PASSAGES)[row] for row in batch["candidate_ids"]]
    again = model.embed_passages(**model.passage_batch([PASSAGES[id] for id in ids]))
    torch.testing.assert_close(vectors, again, rtol=1e-4, atol=1e-5)


def test_no_queries_and_no_passages():
    model = pair()
    output = run(model, model.collator(PASSAGES)([i for i in tiny_instances(12) if not i.references]))
    assert output.query.shape == output.passages.shape == (0, 32)


def test_gradients_reach_both_models_and_the_projection():
    model = pair()
    output = model(**{k: v for k, v in batch_of(model).items() if k not in ("labels", "query_target", "candidate_ids")})
    (output.query @ output.passages.T).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # the head is the loss's part; a key bias cannot move a softmax
    assert all(name == "gen.lm_head.weight" or name.endswith("key.bias") for name in without), without


# ---- control tokens


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_start_from_words_told_apart_and_are_the_same_everywhere(tied):
    before = torch.random.get_rng_state()
    gens = [tiny_gen(tied=tied) for _ in range(2)]
    for table in {gens[0].get_input_embeddings().weight, gens[0].lm_head.weight}:
        table.data += 3.0
        gens[1].load_state_dict(gens[0].state_dict())
    models = [shared(gen) for gen in gens]
    assert torch.equal(before, torch.random.get_rng_state())  # no draw from the user's generator
    for table in (models[0].gen.get_input_embeddings().weight, models[0].lm_head[0]):
        old, new = table[:300], table[300:]
        assert len(new) == 5 and len(new.unique(dim=0)) == 5
        for token, row in zip((*STARTS_FROM, PAD), new, strict=True):
            word = encode(models[0].gen_tokenizer, STARTS_FROM.get(token, ""))
            start = (old[word] if word else old).mean(dim=0)
            assert ((row - start).abs() < 0.5 * old.std(dim=0)).all()
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_rows_that_a_padded_vocabulary_has_already_are_used_and_set():
    gen = tiny_gen(vocab_size=320)
    with torch.no_grad():
        gen.model.embed_tokens.weight[300:] = 7.0
    model = shared(gen)
    assert len(model.gen.model.embed_tokens.weight) == 320
    ids = list(control_ids(model.gen_tokenizer)[:4])
    assert (model.gen.model.embed_tokens.weight[ids].abs() < 2).all()


def test_tied_heads_stay_tied_through_resize_save_and_load(tmp_path):
    model = shared(tiny_gen(tied=True))
    assert model.lm_head[0] is model.gen.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    again = GenCtxModel.from_pretrained(tmp_path)
    assert again.lm_head[0] is again.gen.get_input_embeddings().weight
    assert len(again.lm_head[0]) == 305


def test_shared_weights_are_one_set_of_parameters():
    model = shared(tiny_gen())
    assert model.ctx is model.gen.model and model.ctx_tokenizer is model.gen_tokenizer
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in model.gen.parameters())


# ---- saving and loading


def _pair_of_two() -> GenCtxModel:
    return pair(pooling="token", learn_temperature=True, temperature=0.1)


def _tied() -> GenCtxModel:
    return shared(tiny_gen(tied=True), pooling="last")


def _gpt2_phi() -> GenCtxModel:
    return GenCtxModel(family("phi"), family("gpt2").transformer, tiny_tokenizer(), tiny_tokenizer())


def in_one_piece(model: GenCtxModel, folder: Path) -> None:
    model.save_pretrained(folder)


def in_parts(model: GenCtxModel, folder: Path) -> None:
    """As FSDP2's checkpoints are, here of one part; those of several are in test_train_ranks.py."""
    model.save_pretrained(folder, state_dict={})
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=folder / SHARDS, no_dist=True)


@pytest.mark.parametrize("save", [in_one_piece, in_parts])
@pytest.mark.parametrize("make", [_pair_of_two, _tied, _gpt2_phi])
def test_a_saved_pair_is_the_same_pair(make, save, tmp_path):
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model.gen.generation_config.max_new_tokens = 7
    save(model, tmp_path)
    again = GenCtxModel.from_pretrained(tmp_path)
    assert again.gen.generation_config.max_new_tokens == 7 and not again.training
    assert again.config == model.config and again.fingerprint() == model.fingerprint()
    assert again.log_temperature == model.log_temperature
    batch, batch_again = batch_of(model), batch_of(again)
    assert all(torch.equal(batch[name], batch_again[name]) for name in batch)
    for a, b in zip(run(model, batch), run(again, batch), strict=True):
        assert torch.equal(a, b)


def test_a_saved_half_is_a_model_folder_of_transformers(tmp_path):
    pair().save_pretrained(tmp_path)
    again = GenCtxModel.from_pretrained(tmp_path / "gen", tmp_path / "ctx")
    assert torch.equal(again.lm_head[0], pair().lm_head[0])


def test_a_save_that_fails_leaves_the_pair_of_before(tmp_path, monkeypatch):
    pair().save_pretrained(tmp_path)

    def fail(*_, **__):
        raise OSError("disk full")

    model = pair(pooling="last")
    monkeypatch.setattr(model.ctx, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert GenCtxModel.from_pretrained(tmp_path).config == pair().config
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_pair_saved_over_one_in_parts_is_read_and_a_part_of_one_is_not(tmp_path):
    in_parts(pair(), tmp_path)
    (tmp_path / SHARDS / ".metadata").unlink()
    with pytest.raises(ValueError, match=f"{SHARDS}/.metadata: unreadable: .*No such file"):
        GenCtxModel.from_pretrained(tmp_path)
    in_parts(pair(), tmp_path)
    model = pair()
    with torch.no_grad():
        model.lm_head[0].zero_()
    model.save_pretrained(tmp_path)
    assert not GenCtxModel.from_pretrained(tmp_path).lm_head[0].any()


def test_saving_leaves_no_weights_of_before(tmp_path):
    before = _pair_of_two()
    before.save_pretrained(tmp_path)
    pair().save_pretrained(tmp_path)
    config = replace(pair().config, learn_temperature=True, temperature=0.07)
    assert GenCtxModel.from_pretrained(tmp_path, config=config).temperature.item() == pytest.approx(0.07)
    before.save_pretrained(tmp_path)
    pair().save_pretrained(tmp_path, state_dict={})  # the parts would be written now
    assert not list(tmp_path.glob("**/*.safetensors"))
    with pytest.raises(ValueError, match="gen: wanted a model folder"):
        GenCtxModel.from_pretrained(tmp_path)


def test_the_folder_of_checkpoints_is_told_from_a_pair(tmp_path):
    for step in (2, 4):
        pair().save_pretrained(tmp_path / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="gen: wanted a saved pair, got the folder .* of checkpoint-2, checkpoint-4"):
        GenCtxModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "3", "\x80"])
def test_a_damaged_config_is_named(text, tmp_path):
    pair().save_pretrained(tmp_path)
    (tmp_path / "cosup_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{tmp_path}/cosup_config.json: unreadable: "):
        GenCtxModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in ("0.05", None, True, [1], {})),
        *(("max_length", value) for value in ("9", 9.0, None, True)),
        *(("shared_weights", value) for value in (0, "no", None)),
        *(("pooling", value) for value in (1, ["mean"], None)),
        ("nsp_weight", "1"),
    ],
)
def test_a_value_of_another_type_is_named(name, value, tmp_path):
    pair().save_pretrained(tmp_path)
    path = tmp_path / "cosup_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=f"{path}: unreadable: {name}: wanted "):
        GenCtxModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^{name}: wanted "):
        GenCtxConfig(**{name: value})


def test_the_mean_over_tokens_keeps_the_digits_of_float64():
    model = pair().double()
    batch = model.passage_batch(list(PASSAGES.values())[:5])
    alone = [model.passage_batch([passage]) for passage in list(PASSAGES.values())[:5]]
    wanted = torch.cat([model.embed_passages(**one) for one in alone])
    torch.testing.assert_close(model.embed_passages(**batch), wanted, rtol=1e-12, atol=1e-14)


def test_weights_that_are_not_among_the_parts_are_named(tmp_path):
    model = pair()
    model.save_pretrained(tmp_path, state_dict={})
    state = get_model_state_dict(model)
    del state["projection.weight"]
    dcp.save({"model": state}, checkpoint_id=tmp_path / SHARDS, no_dist=True)
    with pytest.raises(ValueError, match="folder: wanted projection.weight in .*, got none"):
        GenCtxModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("save", [in_one_piece, in_parts])
def test_a_given_config_overrides_the_saved_one(save, tmp_path):
    model = pair()
    save(model, tmp_path)
    again = GenCtxModel.from_pretrained(tmp_path, config=replace(model.config, mode="ntp", learn_temperature=True))
    assert again.config.mode == "ntp" and again.temperature.item() == pytest.approx(0.05)
    with pytest.raises(ValueError, match="shared_weights=False"):
        GenCtxModel.from_pretrained(tmp_path, config=GenCtxConfig(shared_weights=True))


@pytest.mark.parametrize("save", [in_one_piece, in_parts])
def test_a_learned_temperature_stays_but_where_another_is_given(save, tmp_path):
    model = pair(learn_temperature=True, temperature=0.1)
    with torch.no_grad():
        model.log_temperature.fill_(-1.5)
    save(model, tmp_path)
    assert GenCtxModel.from_pretrained(tmp_path, config=replace(model.config, nsp_weight=2.0)).log_temperature == -1.5
    given = GenCtxModel.from_pretrained(tmp_path, config=replace(model.config, temperature=0.2))
    assert given.temperature.item() == pytest.approx(0.2)


def test_any_two_folders_and_ctx_defaults_to_gen(tmp_path):
    gen = tiny_folder(tmp_path / "gen", tiny_gen())
    ctx = tiny_folder(tmp_path / "ctx", tiny_encoder())
    model = GenCtxModel.from_pretrained(str(gen), ctx)
    assert model.projection is not None and model.projection.weight.shape == (32, 24)
    alone = GenCtxModel.from_pretrained(gen)
    assert alone.projection is None and alone.ctx is not alone.gen.model
    assert torch.equal(alone.ctx.layers[0].mlp.up_proj.weight, alone.gen.model.layers[0].mlp.up_proj.weight)
    assert alone.gen.dtype is torch.float32 and not alone.training


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma2"])
def test_num_layers_keeps_the_first_layers(name, tmp_path):
    gen = family(name)
    folder = tiny_folder(tmp_path, gen)
    model = GenCtxModel.from_pretrained(folder, num_layers=1)
    ids = torch.tensor([[5, 6, 7]])
    seen = {}
    layers = gen.transformer.h if name == "gpt2" else gen.model.layers
    kept = model.gen.transformer.h if name == "gpt2" else model.gen.model.layers
    assert len(kept) == 1 and model.gen.config.num_hidden_layers == 1
    layers[0].register_forward_hook(lambda *a: seen.update(whole=a[-1]))
    kept[0].register_forward_hook(lambda *a: seen.update(kept=a[-1]))
    gen(ids)
    model.gen(ids)
    whole, first = (x[0] if isinstance(x, tuple) else x for x in (seen["whole"], seen["kept"]))
    torch.testing.assert_close(first, whole)
    with pytest.raises(ValueError, match="num_layers: wanted 1 to 2, got 3"):
        GenCtxModel.from_pretrained(folder, num_layers=3)


# ---- the fingerprint


def test_the_fingerprint_follows_what_decides_a_vector_and_nothing_else():
    same, model = pair().fingerprint(), pair()
    assert model.fingerprint() == same
    with torch.no_grad():
        model.gen.model.norm.weight += 1
    model.config.nsp_weight = 7.0
    assert model.fingerprint() == same  # not of the passage's vector

    def moved(parameter: torch.Tensor) -> None:
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3

    changes = [
        lambda m: moved(m.ctx.encoder.layer[1].output.dense.weight),
        lambda m: moved(m.projection.weight),
        lambda m: setattr(m.config, "pooling", "last"),
        lambda m: setattr(m.config, "normalize", False),
        lambda m: setattr(m.config, "max_passage_length", 7),
    ]
    prints = {same}
    for change in changes:
        model = pair()
        change(model)
        prints.add(model.fingerprint())
    assert len(prints) == len(changes) + 1


# ---- bad input


def test_the_preset_is_the_papers():
    paper = GenCtxConfig.paper()
    assert (paper.pooling, paper.temperature, paper.nsp_weight) == ("last", 1.0, 0.01)
    assert not (paper.shared_weights or paper.normalize or paper.unique_passages or paper.learn_temperature)
    assert paper.passage_in_ntp and paper.max_length == paper.max_passage_length == 1024


@pytest.mark.parametrize(
    "choices, message",
    [
        ({"pooling": "max"}, "pooling: wanted one of mean, last, token, got 'max'"),
        ({"mode": "both"}, "mode: wanted one of joint, ntp, nsp, got 'both'"),
        ({"temperature": 0.0}, "temperature: wanted a positive number, got 0.0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"nsp_weight": -1.0}, "nsp_weight: wanted a number of at least 0, got -1.0"),
        ({"max_length": 0}, "max_length: wanted at least 1, got 0"),
    ],
)
def test_a_wrong_choice_is_told(choices, message):
    with pytest.raises(ValueError, match=message):
        GenCtxConfig(**choices)


def test_what_cannot_be_loaded_is_named(tmp_path):
    gen = tiny_folder(tmp_path / "gen", tiny_gen())
    nowhere = tmp_path / "nowhere"
    with pytest.raises(ValueError, match=f"gen: there is no folder '{nowhere}'"):
        GenCtxModel.from_pretrained(nowhere)
    with pytest.raises(ValueError, match=f"ctx: there is no folder '{nowhere}'"):
        GenCtxModel.from_pretrained(gen, nowhere)
    encoder = tiny_folder(tmp_path / "encoder", tiny_encoder())
    with pytest.raises(ValueError, match="gen: .*encoder.*no weights there for .* of BertLMHeadModel"):
        GenCtxModel.from_pretrained(encoder)
    with pytest.raises(ValueError, match="ctx: wanted none with shared_weights"):
        GenCtxModel.from_pretrained(gen, encoder, config=GenCtxConfig(shared_weights=True))
    pair().save_pretrained(tmp_path / "pair")
    with pytest.raises(ValueError, match="ctx: wanted none beside the saved pair"):
        GenCtxModel.from_pretrained(tmp_path / "pair", encoder)


def test_a_config_of_another_format_is_refused(tmp_path):
    pair().save_pretrained(tmp_path)
    path = tmp_path / "cosup_config.json"
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"format_version": 99}))
    with pytest.raises(ValueError, match="cosup_config.json: wanted format_version 1, got 99"):
        GenCtxModel.from_pretrained(tmp_path)
    path.write_text(json.dumps(kept | {"colour": "red"}))
    with pytest.raises(ValueError, match="colour"):
        GenCtxModel.from_pretrained(tmp_path)


def test_a_gen_whose_logits_are_not_its_head_over_the_hidden_state_is_refused():
    class Bent(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 1.1
            return output

    bent = Bent(tiny_gen().config)
    with pytest.raises(ValueError, match="gen: wanted logits that are a head over the final hidden state, got Bent"):
        shared(bent)
    with pytest.raises(ValueError, match="gen: wanted a causal language model with a head, got LlamaModel"):
        shared(tiny_gen().model)


def test_ctx_must_fit_shared_weights_and_be_no_encoder_decoder():
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="ctx: wanted a ctx and a ctx_tokenizer with shared_weights=False"):
        GenCtxModel(tiny_gen(), None, tokenizer, None)
    with pytest.raises(ValueError, match="ctx: wanted no ctx and no ctx_tokenizer with shared_weights=True"):
        GenCtxModel(tiny_gen(), tiny_encoder(), tokenizer, tokenizer, GenCtxConfig(shared_weights=True))
    t5 = T5Model(T5Config(vocab_size=300, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    with pytest.raises(ValueError, match="ctx: wanted a decoder or an encoder, got the encoder-decoder T5Model"):
        GenCtxModel(tiny_gen(), t5, tokenizer, tokenizer)


def test_wrong_shapes_and_no_passages_are_told():
    model = pair()
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"input_ids: wanted .* got \[2, 3\] and \[2, 4\]"):
        model.embed_passages(ids, torch.ones(2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"query_index: wanted \[Q\], got \[1, 1\]"):
        model(ids, ids, torch.zeros(1, 1, dtype=torch.int64), ids, ids)
    with pytest.raises(ValueError, match="passages: wanted at least one"):
        model.passage_batch([])
