"""TRL's SFTTrainer on a patched model trains as it does without: the same losses, metrics and weights."""

from types import MethodType

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments

from tiny import VOCABULARY, tiny_gen, tiny_tokenizer

pytest.importorskip("trl")  # it needs Python 3.11
import datasets  # noqa: E402
import peft  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

import cosup.integrations.trl  # noqa: E402

THINGS = ["hat", "river", "tower", "song"]
TEXTS = [f"The {kind} {thing} is {kind}." for kind in ("red", "old", "deep") for thing in THINGS]


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, output_router_logits=True)
    )  # fmt: skip


def trainer(folder, model, adapter=None, kind=SFTTrainer, **options):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    data = datasets.Dataset.from_list([{"prompt": text[:12], "completion": text[12:]} for text in TEXTS])
    config = SFTConfig(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4, seed=0,
        logging_steps=1, report_to=[], use_cpu=True, learning_rate=1e-2, eval_strategy="steps", eval_steps=4,
        save_strategy="no", disable_tqdm=True, bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip
    return kind(model, config, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
                peft_config=adapter)  # fmt: skip


def train(trainer):
    trainer.train()
    timed = ("runtime", "per_second", "flos")
    log = [{k: v for k, v in row.items() if not k.endswith(timed)} for row in trainer.state.log_history]
    return log, trainer.model.state_dict()


@pytest.mark.parametrize(
    "make, adapter, options",
    [
        (tiny_gen, None, {}),
        (tiny_gen, None, {"packing": True, "max_length": 32}),
        (tiny_gen, None, {"loss_type": "dft", "completion_only_loss": False}),
        (tiny_gen, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), {}),
        (mixtral, None, {}),
    ],
    ids=["plain", "packed", "dft", "adapters", "experts"],
)
def test_the_trainer_trains_as_without(make, adapter, options, tmp_path):
    log, weights = train(trainer(tmp_path, make(), adapter, **options))
    model = trainer(tmp_path, make(), adapter, **options)
    ours, our_weights = train(cosup.integrations.trl.patch(model))
    assert [row.keys() for row in ours] == [row.keys() for row in log]
    assert {"loss", "entropy", "mean_token_accuracy"} < log[0].keys() and "eval_loss" in log[4]
    for row, wanted in zip(ours, log, strict=True):
        assert row == pytest.approx(wanted, rel=2e-4), (row, wanted)
    for name, weight in weights.items():
        torch.testing.assert_close(our_weights[name], weight, rtol=0, atol=1e-4)


class Reweighted(SFTTrainer):
    """A loss of its own over the log-probabilities."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        return -(outputs.log_probs * outputs.log_probs.detach().exp()).mean()


@pytest.mark.parametrize("where", ["theirs", "of a subclass", "of the trainer", "set on the class"])
def test_gradients_of_a_step(where, tmp_path, monkeypatch):
    if where == "set on the class":
        monkeypatch.setattr(SFTTrainer, "compute_loss", Reweighted.compute_loss)

    def grads(patched):
        made = trainer(tmp_path, tiny_gen(), kind=Reweighted if where == "of a subclass" else SFTTrainer)
        if patched:
            cosup.integrations.trl.patch(made)
        if where == "of the trainer":
            made.compute_loss = MethodType(Reweighted.compute_loss, made)
        rows = next(iter(made.get_train_dataloader()))
        made.compute_loss(made.model, rows, num_items_in_batch=torch.tensor(37)).backward()
        return [p.grad for p in made.model.parameters()]

    for ours, wanted in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6 * wanted.abs().max().item())


def test_a_model_patched_before_its_trainer(tmp_path):
    log, _ = train(trainer(tmp_path, tiny_gen()))
    ours, _ = train(cosup.integrations.trl.patch(trainer(tmp_path, cosup.patch(tiny_gen()))))
    assert [row == pytest.approx(wanted, rel=2e-4) for row, wanted in zip(ours, log, strict=True)] == [True] * len(log)


def test_no_other_trainer(tmp_path):
    with pytest.raises(ValueError, match="SFTTrainer of trl, got Trainer"):
        cosup.integrations.trl.patch(Trainer(tiny_gen(), TrainingArguments(str(tmp_path), use_cpu=True)))
