"""Packed rows: the losses, the gradients and the training of unpacked ones, and no example sees another."""

import copy
import warnings
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from train_worker import make_trainer
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Lfm2Config,
    Mamba2Config,
    MistralConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    modeling_flash_attention_utils,
)

from cosup import co_supervision_loss, linear_cross_entropy
from cosup.data.collate import IGNORE, GenCtxCollator
from cosup.data.packing import first_fit, restarting_positions
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.pretrained import check_packing, final_hidden_state
from pairs import family, losses, pair, shared, step, without_dropout
from tiny import tiny_encoder, tiny_gen, tiny_instances, tiny_passages, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
INSTANCES, PASSAGES = tiny_instances(12), tiny_passages(12)
_SIZE = dict(vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, pad_token_id=None, bos_token_id=None, eos_token_id=0)  # fmt: skip


def tiny(name: str) -> PreTrainedModel:
    """A random model; Mistral's window is far shorter than the instances."""
    if name == "llama":
        return tiny_gen()
    if name == "gpt2":
        return without_dropout(family("gpt2"))
    configs = {
        "mistral": MistralConfig(**_SIZE, sliding_window=5, initializer_range=0.2),
        "conv": Lfm2Config(**_SIZE, layer_types=["conv", "full_attention", "conv"]),  # weights as small as is usual
        "mamba2": Mamba2Config(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8,
                               state_size=8, n_groups=1),
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(configs[name]).float().eval()


def model_of(gen: PreTrainedModel, **choices: object) -> GenCtxModel:
    choices = dict(temperature=0.2, learn_temperature=True, nsp_weight=0.7) | choices
    tokenizers = tiny_tokenizer(), tiny_tokenizer()
    return without_dropout(GenCtxModel(gen, tiny_encoder(), *tokenizers, GenCtxConfig(**choices)))


def collate(model: GenCtxModel, packing: bool, instances=INSTANCES) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a row of")
        return model.collator(PASSAGES, packing=packing)(instances)


def losses_and_gradients(model: GenCtxModel, batch: dict[str, torch.Tensor]):
    """[NTP, NSP] and the gradient of their weighted sum by each parameter."""
    model.zero_grad()
    output = model(**{k: v for k, v in batch.items() if k not in ("labels", "query_target", "candidate_ids")})
    result = co_supervision_loss(
        output.hidden, model.lm_head[0], batch["labels"], output.query, output.passages, batch["query_target"],
        candidate_ids=batch["candidate_ids"], nsp_weight=model.config.nsp_weight, temperature=model.temperature,
    )  # fmt: skip
    result.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return torch.stack([result.ntp_loss, result.nsp_loss]).detach(), grads


def assert_equal(got, want, rtol=1e-9):
    torch.testing.assert_close(got[0], want[0], rtol=rtol, atol=0)
    assert got[1].keys() == want[1].keys() and len(want[1]) > 10
    for name, gradient in want[1].items():
        if not name.endswith("key.bias"):  # it cannot move a softmax: all of its gradient is rounding
            assert (got[1][name] - gradient).norm() <= rtol * gradient.norm(), name


class OneToken(GenCtxCollator):
    """Of every three instances one is cut to its first token, one to its first [Ret], both targets by their labels."""

    def _row(self, instance):
        row = super()._row(instance)
        place = {0: 0, 1: row.queries[0][0] if row.queries else 0}.get(INSTANCES.index(instance) % 3)
        if place is None:
            return row
        queries = [(0, passage) for start, passage in row.queries if start == place]
        return type(row)(row.ids[place:][:1], row.ids[place:][:1], queries)


# ---- which rows


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 12), max_size=20))
def test_each_example_goes_into_the_first_row_with_room(lengths):
    rows = first_fit(lengths, 12)
    assert sorted(sum(rows, [])) == list(range(len(lengths))) and all(row == sorted(row) for row in rows)
    for place, row in enumerate(rows):
        assert sum(lengths[i] for i in row) <= 12
        for i in row:
            for earlier in rows[:place]:
                assert sum(lengths[j] for j in earlier if j < i) + lengths[i] > 12
    if lengths:
        positions = restarting_positions([[lengths[i] for i in row] for row in rows]).tolist()
        for row, got in zip(rows, positions, strict=True):
            ends = [0, *accumulate(lengths[i] for i in row), len(got)]
            assert got == [t for a, b in zip(ends, ends[1:], strict=False) for t in range(b - a)]


Example = tuple[tuple[int, ...], tuple[int, ...], tuple[tuple[int, int], ...]]


def examples(batch: dict[str, torch.Tensor]) -> list[Example]:
    """Ids, targets, and queries as (place, passage), of each example of a batch, packed or not; sorted."""
    width = batch["input_ids"].shape[1]
    queries = dict(zip(batch["query_index"].tolist(), batch["query_target"].tolist(), strict=True))
    found = []
    for b, (ids, labels, mask) in enumerate(zip(*(batch[n].tolist() for n in ("input_ids", "labels", "attention_mask")),
                                                strict=True)):  # fmt: skip
        length = sum(mask)
        assert mask == [1] * length + [0] * (width - length) and set(labels[length:]) <= {IGNORE}
        starts = [0]
        if "position_ids" in batch:
            starts = [t for t in range(length) if batch["position_ids"][b, t] == 0]
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            if "position_ids" in batch:
                assert batch["position_ids"][b, start:end].tolist() == list(range(end - start))
                assert labels[start] == IGNORE  # else predicted from the example before
            own = [(t - start, queries.pop(b * width + t)) for t in range(start, end) if b * width + t in queries]
            passages = tuple((t, batch["candidate_ids"][target].item()) for t, target in own)
            found.append((tuple(ids[start:end]), (IGNORE, *labels[start + 1 : end]), passages))
    assert not queries
    return sorted(found)


@settings(max_examples=60, deadline=None)
@given(
    picks=st.lists(st.integers(0, 11), min_size=1, max_size=8),
    max_length=st.integers(1, 400),
    unique=st.booleans(),
    kind=st.sampled_from([GenCtxCollator, OneToken]),
)
@pytest.mark.filterwarnings("ignore:a row of")
def test_packed_rows_hold_the_unpacked_ones(picks, max_length, unique, kind):
    """Examples longer than max_length are cut as ever; the passages are the same, in an order of their own."""
    tokenizer = pair().gen_tokenizer
    collators = [
        kind(tokenizer, tokenizer, PASSAGES, max_length=max_length, unique_passages=unique, packing=packing)
        for packing in (False, True)
    ]
    instances = [INSTANCES[pick] for pick in picks]
    plain, packed = (collator(instances) for collator in collators)
    assert examples(packed) == examples(plain)
    assert collators[0].report() == collators[1].report()
    assert sorted(packed["candidate_ids"].tolist()) == sorted(plain["candidate_ids"].tolist())
    assert packed["query_index"].tolist() == sorted(packed["query_index"].tolist())  # as micro_batches cuts them
    assert len(packed["input_ids"]) <= len(plain["input_ids"]) and packed["input_ids"].shape[1] <= max_length
    assert packed["attention_mask"].sum() == plain["attention_mask"].sum()


# ---- what is computed


LENGTHS = (74, 83, 136, 39, 92, 102, 133, 41, 93, 97, 133, 41)  # of INSTANCES


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize(
    "max_length, shape",
    [(256, (5, 237)), (90, (11, 90)), (sum(LENGTHS), (1, sum(LENGTHS))), (sum(LENGTHS[:3]), (4, sum(LENGTHS[:3])))],
    ids=["several rows", "rows cut", "one full row", "a full row of three"],
)
def test_losses_and_gradients_are_those_of_padded_rows(name, attention, max_length, shape, monkeypatch):
    softmax = F.softmax  # eager attention rounds it to float32, and pads of a sliding window to NaN so
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    gen = tiny(name)
    gen.set_attn_implementation(attention)
    model = model_of(gen, max_length=max_length).double()
    padded, packed = collate(model, False), collate(model, True)
    assert padded["attention_mask"].sum(dim=1).tolist() == [min(length, max_length) for length in LENGTHS]
    assert packed["input_ids"].shape == shape
    assert packed["attention_mask"].bool().all(dim=1).any()  # a row that nothing fills up
    assert_equal(losses_and_gradients(model, packed), losses_and_gradients(model, padded))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_examples_of_one_token(name):
    """Also such that are a query, or end a row: no loss of the next example's first token, and the same queries."""
    model = model_of(tiny(name), max_length=200).double()
    options = dict(max_length=200, max_passage_length=model.config.max_passage_length)
    padded, packed = (
        OneToken(model.gen_tokenizer, model.ctx_tokenizer, PASSAGES, **options, packing=packing)(INSTANCES)
        for packing in (False, True)
    )
    assert (padded["attention_mask"].sum(dim=1) == 1).sum() == 8 and len(packed["input_ids"]) < 4
    assert (packed["query_index"] % packed["input_ids"].shape[1] > 0).any()
    assert_equal(losses_and_gradients(model, packed), losses_and_gradients(model, padded))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_float32_rounds_no_more_than_padded(name):
    """Error of losses and of all gradients against float64 at most twice that of padded rows in float32."""
    model = model_of(tiny(name), max_length=256)
    padded, packed = collate(model, False), collate(model, True)
    exact = losses_and_gradients(copy.deepcopy(model).double(), padded)

    def error(batch):
        loss, grads = losses_and_gradients(model, batch)
        apart = torch.cat([(grads[n] - g).flatten() for n, g in exact[1].items()])
        return (loss - exact[0]).abs().max().item(), apart.norm().item()

    eps = torch.finfo(torch.float32).eps
    for got, allowed in zip(error(packed), error(padded), strict=True):
        assert got <= 2 * allowed + eps * exact[0].max().item()


def test_flex_attention_gives_the_same_states():
    """In float32 and forward only: it has no more on a CPU."""
    model = model_of(tiny_gen(hidden_size=128), max_length=256)
    batch = collate(model, True)
    with torch.no_grad():
        states = []
        for attention in ("sdpa", "flex_attention"):
            model.gen.set_attn_implementation(attention)
            states.append(final_hidden_state(model.gen.model, batch["input_ids"], None, batch["position_ids"]))
    torch.testing.assert_close(states[1], states[0], rtol=1e-4, atol=1e-4)


def attend(q, k, v, causal, softmax_scale, window_size=(-1, -1)):
    """flash_attn_func on a CPU: [rows, tokens, heads, width]."""
    place = torch.arange(q.shape[1])
    back = place[:, None] - place
    seen = (back >= 0) & ((back <= window_size[0]) | (window_size[0] < 0))
    assert causal
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, scale=softmax_scale, enable_gqa=True).transpose(1, 2)


def flash(q, k, v, *, causal, softmax_scale=None, window_size=(-1, -1), dropout_p=0.0):
    return attend(q, k, v, causal, softmax_scale, window_size)


def flash_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal, softmax_scale=None,
                 window_size=(-1, -1), dropout_p=0.0):  # fmt: skip
    """flash_attn_varlen_func on a CPU: each sequence by itself, [tokens of all, heads, width]."""
    lengths = cu_seqlens_q.diff().tolist()
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert type(max_seqlen_q) is type(max_seqlen_k) is int and max_seqlen_q == max_seqlen_k == max(lengths)
    parts = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*(x[None] for x in part), causal, softmax_scale, window_size)[0] for part in parts])


def flash_4(q, k, v, softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0, deterministic=False):
    """Those of flash-attn-4: no dropout, and the log-sum-exp comes too."""
    assert softcap == 0.0
    return attend(q, k, v, causal, softmax_scale, (-1, -1) if None in window_size else window_size), None


def flash_varlen_4(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                   softmax_scale=None, causal=False, window_size=(None, None), softcap=0.0,
                   deterministic=False):  # fmt: skip
    assert softcap == 0.0
    options = {"softmax_scale": softmax_scale, "window_size": (-1, -1) if None in window_size else window_size}
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return flash_varlen(q, k, v, *bounds, causal=causal, **options), None


@pytest.mark.parametrize("version, functions", [(2, (flash, flash_varlen)), (4, (flash_4, flash_varlen_4))])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("max_length", [256, sum(LENGTHS)])
def test_flash_attention_is_given_the_bounds(name, max_length, version, functions, monkeypatch):
    """transformers' own way to flash-attn, with its two functions written for a CPU."""
    model = model_of(tiny(name), max_length=max_length).double()
    padded, packed = collate(model, False), collate(model, True)
    want = losses_and_gradients(model, padded)
    utils = modeling_flash_attention_utils
    functions = *functions, None, utils._pad_input, utils._unpad_input
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(utils, "_loaded_implementation", None)
    model.gen.config._attn_implementation = f"flash_attention_{version}"
    assert_equal(losses_and_gradients(model, packed), want)


# ---- what cannot be packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen3", "gemma2", "cohere", "gpt_neox"])
def test_attention_alone_can_be_packed(name, dtype):
    gen = (tiny(name) if name in ("llama", "gpt2", "mistral") else family(name)).to(dtype).train()
    before = torch.random.get_rng_state()
    check_packing(gen)
    assert gen.training and not gen.get_input_embeddings()._forward_hooks
    assert all(p.grad is None for p in gen.parameters()) and torch.equal(before, torch.random.get_rng_state())


def _own_positions() -> PreTrainedModel:
    gen = tiny("gpt2")
    gen.transformer.wpe.register_forward_pre_hook(lambda _, args: (torch.arange(args[0].shape[-1])[None],))
    return gen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: tiny("mamba2"), "Mamba2ForCausalLM, which takes no position_ids"),
        (lambda: tiny("conv"), "Lfm2ForCausalLM, where one sees the other: a layer carries a state along"),
        (lambda: family("falcon_h1"), "FalconH1ForCausalLM, where one sees the other: a layer carries a state along"),
        (lambda: family("opt"), "OPTForCausalLM, where one sees the other: .*mask does not follow position_ids"),
        (_own_positions, "GPT2LMHeadModel, where states there differ by [0-9]+% from those of the example alone"),
    ],
    ids=["mamba2", "lfm2", "falcon_h1", "opt", "own positions"],
)
def test_a_model_that_packing_would_change_is_refused(make, reason, dtype):
    with pytest.raises(ValueError, match=f"packing: wanted a gen whose examples can share a row, got {reason}"):
        check_packing(make().to(dtype))


def test_a_refusal_comes_before_training(trainer_of):
    with pytest.raises(ValueError, match="packing: .* got FalconH1ForCausalLM, where one sees the other"):
        trainer_of(shared(family("falcon_h1")), packing=True)


def test_positions_of_another_shape_are_told():
    model = pair()
    batch = collate(model, True)
    names = ("input_ids", "attention_mask", "query_index", "passage_input_ids", "passage_attention_mask")
    with pytest.raises(ValueError, match=r"position_ids: wanted \[[0-9]+, [0-9]+\], got \[1, 3\]"):
        model(**{name: batch[name] for name in names}, position_ids=torch.arange(3)[None])


# ---- training


@pytest.mark.parametrize(
    "mode, options",
    [
        ("joint", {}),
        ("joint", {"gradient_accumulation_steps": 2}),
        ("joint", {"micro_batch_size": 1}),
        ("joint", {"extra_passages": 2, "queue_size": 5}),
        ("ntp", {"gradient_accumulation_steps": 2}),
        ("nsp", {"micro_batch_size": 1}),
    ],
)
@pytest.mark.filterwarnings("ignore:negatives do not accumulate")
def test_training_logs_the_same_losses(mode, options, trainer_of):
    """Both losses, held out too, retrieval and gradient norms, with rows of unequal numbers of targets and queries."""
    logs, rows = [], []
    for packing in (False, True):
        torch.manual_seed(0)
        choices = dict(mode=mode, nsp_weight=0.7, learn_temperature=True, max_length=256)
        model = without_dropout(pair(**choices, pooling="last")).double()  # the mean is summed in float32
        trainer = trainer_of(
            model, tiny_instances(8), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2, packing=packing,
            eval_dataset=tiny_instances(8)[:5], eval_strategy="steps", eval_steps=2, **options,
        )  # fmt: skip
        rows.append(0)

        def count(module, args, kwargs):
            rows[-1] += len(kwargs["input_ids"])

        model.gen.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
        trainer.train()
        held_out = [log for log in trainer.state.log_history if "eval_loss" in log]
        logs.append([*losses(trainer).values(), *({k: v for k, v in log.items() if "loss" in k} for log in held_out)])
    assert rows[1] < 0.7 * rows[0]
    assert len(logs[0]) == 6 and len({log["loss"] for log in logs[0] if "loss" in log}) == 4
    for want, got in zip(*logs, strict=True):
        assert got == pytest.approx(want, rel=1e-8)


@pytest.mark.parametrize("size", [1, 2, 20])
def test_micro_batches_of_packed_rows_give_the_gradients_of_the_whole(size, trainer_of):
    choices = dict(learn_temperature=True, max_length=256, pooling="last")
    models = [without_dropout(pair(**choices)).double() for _ in range(2)]
    whole, parted = (
        trainer_of(m, tiny_instances(8), packing=packing, micro_batch_size=n)
        for m, packing, n in zip(models, (False, True), (None, size), strict=True)
    )
    (want, want_grads, _), (got, got_grads, _) = step(whole, tiny_instances(8)), step(parted, tiny_instances(8))
    assert_equal((got, got_grads), (want, want_grads), rtol=1e-8)


def test_a_stopped_packed_run_goes_on_bit_for_bit(tmp_path):
    options = dict(packing=True, per_device_train_batch_size=4, max_steps=9)
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- a causal language model alone


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_flattened_batches_of_transformers_fit_the_fused_loss(name):
    gen = tiny(name).double()
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(300, (length,), generator=generator) for length in (1, 9, 4, 1, 30)]
    flat = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
    ids, labels = (pad_sequence(rows, batch_first=True, padding_value=value) for value in (0, IGNORE))
    mask = (torch.arange(30) < torch.tensor([len(row) for row in rows])[:, None]).long()
    head = gen.get_output_embeddings().weight
    padded = final_hidden_state(gen.get_decoder(), ids, mask)
    packed = final_hidden_state(gen.get_decoder(), flat["input_ids"], None, flat["position_ids"])
    want = linear_cross_entropy(padded, head, labels, shift=1)
    got = linear_cross_entropy(packed, head, flat["labels"], shift=1)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)
    weights = [p for p in gen.parameters() if p is not head or gen.config.tie_word_embeddings]
    for a, b in zip(torch.autograd.grad(got, weights), torch.autograd.grad(want, weights), strict=True):
        assert (a - b).norm() <= 1e-9 * b.norm()


def test_flattened_batches_train_as_padded_ones(tmp_path):
    """By transformers' Trainer, which turns the cache off: with one no restart would be looked for."""
    texts = [{"input_ids": list(range(1, n))} for n in (5, 40, 2, 12, 33, 7, 9, 21)]

    def padded(features):
        ids = [torch.tensor(feature["input_ids"]) for feature in features]
        labels = pad_sequence(ids, batch_first=True, padding_value=IGNORE)
        return {"input_ids": labels.clamp(min=0), "attention_mask": (labels != IGNORE).long(), "labels": labels}

    logs = []
    for collator in (padded, DataCollatorWithFlattening()):
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, disable_tqdm=True, save_strategy="no", max_steps=4, logging_steps=1,
            per_device_train_batch_size=4, learning_rate=1e-2,
        )  # fmt: skip
        trainer = Trainer(tiny_gen(), args, train_dataset=texts, data_collator=collator)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[1] == pytest.approx(logs[0], rel=1e-4) and len(set(logs[0])) == 4
