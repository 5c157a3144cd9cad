"""CoSupTrainer: the loss it trains, what it logs, and that a stopped run goes on exactly."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from train_worker import machine, make_trainer
from transformers import TrainerCallback, TrainingArguments

from cosup import info_nce, linear_cross_entropy
from cosup.bench.measure import peak_bytes
from cosup.data.collate import micro_batches
from cosup.data.schema import write_jsonl
from cosup.model import GenCtxConfig, GenCtxModel
from cosup.train import _INTERVAL, _QUEUE, _SUMS, CoSupConfig, CoSupTrainer
from cosup.walk import default_workspace
from pairs import family, losses, pair, run, shared, step, without_dropout
from tiny import tiny_encoder, tiny_folder, tiny_gen, tiny_instances, tiny_passages

pytestmark = pytest.mark.usefixtures("one_thread")
N = 8
PASSAGES = tiny_passages(N)
INSTANCES = tiny_instances(N)
# every passage is a candidate of every micro-batch, so the NSP loss too is that of one large batch
COMPLETE = [replace(instance, hard_negatives=tuple(PASSAGES)) for instance in INSTANCES if instance.references]


# ---- the loss


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "cohere", "granite", "phi"])
def test_ntp_is_gens_own_loss(name, trainer_of):
    trainer = trainer_of(shared(family(name), mode="ntp"))
    batch = trainer.collator(INSTANCES)
    ours = trainer.compute_loss(trainer.model, batch)
    with torch.no_grad():
        gen = trainer.model.gen
        wanted = gen(**{key: batch[key] for key in ("input_ids", "attention_mask", "labels")}, return_dict=True).loss
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:negatives do not accumulate")
@pytest.mark.parametrize("instances", [INSTANCES, INSTANCES[:6], COMPLETE])
def test_accumulated_micro_batches_take_the_step_of_one_large_batch(instances, trainer_of):
    """Micro-batches of unequal numbers of targets; of 6 instances the last step has fewer micro-batches.

    NTP only: negatives do not accumulate. The last case trains jointly, with the same candidates in every micro-batch.
    """
    moved = []
    for size, accumulated in ((len(instances), 1), (2, 4)):
        model = without_dropout(pair(mode="joint" if instances is COMPLETE else "ntp"))
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        options = dict(optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant", max_steps=1)
        trainer = trainer_of(
            model, instances, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated, **options
        )
        trainer.train()
        moved.append((torch.cat([p.detach().flatten() for p in model.parameters()]) - before, losses(trainer)[1]))
    (large, large_log), (small, small_log) = moved
    assert large.norm() > 0.1
    assert (small - large).norm() < 1e-5 * large.norm()
    assert small_log["ntp_loss"] == pytest.approx(large_log["ntp_loss"], rel=1e-5)
    assert small_log["loss"] == pytest.approx(large_log["loss"], rel=1e-5)


@pytest.mark.parametrize("mode", ["joint", "ntp", "nsp"])
def test_a_mode_trains_and_logs_its_own_part_only(mode, trainer_of):
    model = pair(mode=mode)
    if mode == "ntp":
        model.ctx.register_forward_pre_hook(lambda *_: pytest.fail("Ctx was run"))
    trainer = trainer_of(model, max_steps=1, per_device_train_batch_size=N)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    moved = {name.split(".")[0] for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"joint": {"gen", "ctx", "projection"}, "ntp": {"gen"}, "nsp": {"gen", "ctx", "projection"}}[mode]
    assert torch.equal(model.lm_head[0], before["gen.lm_head.weight"]) == (mode == "nsp")
    logged = {name for log in losses(trainer).values() for name in log} - {"grad_norm", "learning_rate"}
    parts = {"ntp": {"ntp_loss"}, "nsp": {"nsp_loss", "retrieval_accuracy"}}
    assert logged == {"loss"} | (parts["ntp"] | parts["nsp"] if mode == "joint" else parts[mode])


@pytest.mark.parametrize("unique", [True, False])
def test_paper_mode_lets_a_passage_be_its_own_negative(unique, trainer_of):
    """One passage asked for twice, and there twice, as a collator of paper mode or a gathered batch has it."""
    twice = [INSTANCES[0], INSTANCES[0]]
    batch = pair(unique_passages=False).collator(PASSAGES)(twice)
    trainer = trainer_of(pair(mode="nsp", unique_passages=unique, normalize=False).eval(), twice)
    assert len(trainer.collator(twice)["candidate_ids"]) == (1 if unique else 2) and len(batch["candidate_ids"]) == 2
    loss = trainer.compute_loss(trainer.model, batch).item()
    assert loss == pytest.approx(0.0 if unique else torch.tensor(2.0).log().item(), abs=1e-5)


def test_a_learned_temperature_learns_and_does_not_decay(trainer_of):
    trainer = trainer_of(pair(learn_temperature=True), max_steps=2, weight_decay=0.1, learning_rate=1e-2)
    trainer.train()
    assert trainer.model.log_temperature.exp().item() != pytest.approx(0.05, rel=1e-3)
    decayed = trainer.get_decay_parameter_names(trainer.model)
    assert "log_temperature" not in decayed and "gen.lm_head.weight" in decayed


def test_mixed_precision_keeps_float32_weights_and_a_plain_forward(trainer_of):
    options = dict(max_steps=1, per_device_train_batch_size=N)
    full, mixed = (trainer_of(without_dropout(pair()), bf16=bf16, **options) for bf16 in (False, True))
    seen = []
    mixed.model.gen.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    full.train()
    mixed.train()
    assert seen == [torch.bfloat16]
    assert {p.dtype for p in mixed.model.parameters()} == {torch.float32}
    one, other = losses(full)[1]["loss"], losses(mixed)[1]["loss"]
    assert one != other and other == pytest.approx(one, rel=0.02)
    run(mixed.model, mixed.collator(INSTANCES))
    assert seen[-1] is torch.float32  # autocast was the trainer's
    assert not mixed.model.training  # dropout too


def test_activation_checkpointing_takes_the_same_step(trainer_of):
    options = dict(max_steps=1, per_device_train_batch_size=N)
    known = CoSupConfig.__dataclass_fields__
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    plain, recomputed = (trainer_of(without_dropout(pair()), **{name: on}, **options) for on in (False, True))
    calls = []
    recomputed.model.ctx.encoder.layer[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    plain.train()
    recomputed.train()
    assert len(calls) == 2  # forward, and again in backward
    assert losses(recomputed)[1]["grad_norm"] == pytest.approx(losses(plain)[1]["grad_norm"], rel=1e-5)


# ---- large batches in micro-batches


def assert_same_gradients(got, want):
    assert got.keys() == want.keys() and len(want) > 10
    for part in ("gen.", "ctx.", "projection.", "log_temperature"):
        one, other = (
            torch.cat([torch.zeros(1), *(g.flatten() for name, g in grads.items() if name.startswith(part))])
            for grads in (got, want)
        )
        assert (one - other).norm() <= 1e-6 * other.norm(), part
    assert all(torch.isfinite(g).all() for g in got.values())


@pytest.mark.parametrize("size", [1, 3, 20])
@pytest.mark.parametrize("mode", ["joint", "nsp"])
@pytest.mark.parametrize("unique", [True, False])
@pytest.mark.parametrize("instances", [INSTANCES, COMPLETE, INSTANCES[3:4] + COMPLETE[:3]])
def test_micro_batches_give_the_gradients_of_the_whole_batch(size, mode, unique, instances, trainer_of):
    """With hard negatives, passages named twice, instances without any, and more micro-batches than passages."""
    options = dict(mode=mode, unique_passages=unique, learn_temperature=True, nsp_weight=0.7, temperature=0.2)
    models = [without_dropout(pair(**options)).double() for _ in range(2)]  # float32 rounds by the shape of the batch
    whole, parted = (trainer_of(m, instances, micro_batch_size=n) for m, n in zip(models, (None, size), strict=True))
    (want, want_grads, _), (got, got_grads, _) = step(whole, instances), step(parted, instances)
    assert want_grads["log_temperature"].abs() > 1e-4
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert_same_gradients(got_grads, want_grads)
    logged = [dict(zip(_SUMS, trainer._sums.tolist(), strict=True)) for trainer in (parted, whole)]
    if not unique:  # a passage that stands twice ties with itself, and rounding says which comes first
        assert [sums.pop("hits") for sums in logged]
    assert logged[0] == pytest.approx(logged[1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_micro_batches_drop_out_the_same_in_both_passes(bf16, checkpointing, trainer_of):
    """Against the same micro-batches with their graphs kept: one loss over them all, one backward."""
    trainer = trainer_of(pair(learn_temperature=True, nsp_weight=0.7), micro_batch_size=3, bf16=bf16)
    model = trainer.model
    if checkpointing:
        model.activation_checkpointing_enable()
    got, got_grads, after = step(trainer, INSTANCES)

    model.zero_grad()
    model.train()
    batch = trainer.collator(INSTANCES)
    torch.manual_seed(3)
    names = ("input_ids", "attention_mask", "query_index", "passage_input_ids", "passage_attention_mask")
    vectors, ntp = [], 0.0
    for part in micro_batches(batch, 3):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(**{name: part[name] for name in names})
            ntp += linear_cross_entropy(output.hidden, model.lm_head[0], part["labels"], reduction="sum", shift=1)
        vectors.append(output[1:])
    query, passages = (torch.cat(part) for part in zip(*vectors, strict=True))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        nsp = info_nce(query, passages, batch["query_target"], temperature=model.temperature, reduction="sum",
                       candidate_ids=batch["candidate_ids"])  # fmt: skip
    loss = ntp / (batch["labels"][:, 1:] != -100).sum() + 0.7 * nsp / len(query)
    loss.backward()
    torch.testing.assert_close(got, loss.detach(), rtol=1e-6, atol=0)
    assert_same_gradients(got_grads, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize("frozen", ["gen", "ctx"])
def test_micro_batches_of_a_half_frozen_pair(frozen, trainer_of):
    grads = []
    for size in (None, 2):
        model = without_dropout(pair(mode="nsp"))
        getattr(model, frozen).requires_grad_(False)
        grads.append(step(trainer_of(model, micro_batch_size=size), INSTANCES)[1])
    assert not any(name.startswith(frozen) for name in grads[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)


def test_micro_batches_bound_the_memory(trainer_of):
    """A batch of 48 in micro-batches of 2 takes hardly more than a batch of 12, and far less than at once."""
    model = without_dropout(pair())
    many = [replace(instance, id=f"{instance.id} {i}") for i in range(6) for instance in INSTANCES]

    def peak(n, size):
        trainer = trainer_of(model, many, micro_batch_size=size)
        (batch,), counts = trainer.get_batch_samples(iter([trainer.collator(many[:n])]), 1, trainer.args.device)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return peak_bytes(lambda: trainer.training_step(model, batch, counts))

    few, all_in_parts, at_once = peak(12, 2), peak(48, 2), peak(48, None)
    assert all_in_parts < 1.3 * few and all_in_parts < 0.25 * at_once


def test_a_loss_scale_reaches_every_gradient_once(trainer_of):
    """float16 is trained with the loss scaled up; a power of 2 changes no bit of a gradient but its exponent."""
    plain, scaled = (trainer_of(without_dropout(pair(learn_temperature=True)), micro_batch_size=3) for _ in range(2))
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (want, want_grads, _), (got, got_grads, _) = step(plain, INSTANCES), step(scaled, INSTANCES)
    assert torch.equal(got, want)
    assert_same_gradients({name: g / 1024 for name, g in got_grads.items()}, want_grads)


def test_micro_batches_without_candidates_are_refused(trainer_of):
    with pytest.raises(ValueError, match="micro_batch_size: wanted None in mode 'ntp'"):
        trainer_of(pair(mode="ntp"), micro_batch_size=2)


# ---- candidates beside the batch's own


@pytest.mark.parametrize("size", [None, 2])
def test_the_queue_adds_the_passages_of_earlier_batches(size, trainer_of):
    """The loss of the second step is that of plain PyTorch over its own passages and those of the first."""
    model = without_dropout(pair(mode="nsp", temperature=0.5))
    trainer = trainer_of(model, queue_size=50, micro_batch_size=size)
    batches = [trainer.collator(INSTANCES[:4]), trainer.collator(INSTANCES[2:])]
    first, second = (run(model, batch) for batch in batches)
    step(trainer, INSTANCES[:4])
    loss, grads, _ = step(trainer, INSTANCES[2:])
    ids = torch.cat([batches[1]["candidate_ids"], batches[0]["candidate_ids"]])
    candidates = F.normalize(torch.cat([second.passages, first.passages]))
    scores = F.normalize(second.query) @ candidates.T / 0.5
    positive = batches[1]["candidate_ids"][batches[1]["query_target"]]
    again = (ids == positive[:, None]) & (torch.arange(len(ids)) >= len(second.passages))
    assert again.any()  # some positives are in the queue, too
    wanted = F.cross_entropy(scores.masked_fill(again, float("-inf")), batches[1]["query_target"])
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    assert len(trainer.queue.candidates()[1]) == len(first.passages) + len(second.passages)


def test_further_candidates_of_16_bit_weights(trainer_of):
    trainer = trainer_of(pair().bfloat16(), queue_size=50, extra_passages=2)
    for _ in range(2):
        loss, grads, _ = step(trainer, INSTANCES[:4])
        assert loss.isfinite() and {g.dtype for g in grads.values()} == {torch.bfloat16}


def test_extra_passages_are_drawn_anew_for_each_batch(trainer_of):
    trainer = trainer_of(pair(), extra_passages=3)
    names = ("extra_candidate_ids", "extra_passage_input_ids")
    draws = []
    for n in range(3):
        trainer.state.global_step = n // 2  # the last is the first of the second step
        batches = [trainer.collator(INSTANCES[:2]) for _ in range(2)]
        batches, _ = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
        for batch in batches:
            assert len(batch["extra_candidate_ids"]) == len(batch["extra_passage_input_ids"]) == 3
            assert not set(batch["extra_candidate_ids"].tolist()) & set(batch["candidate_ids"].tolist())
        draws.append([tuple(batch[names[0]].tolist()) for batch in batches])
    assert draws[0] == draws[1]
    assert len({*draws[0], *draws[2]}) == 4


@pytest.mark.parametrize("bf16", [False, True])
def test_extra_passages_are_candidates_without_gradient(bf16, trainer_of):
    """Loss and gradients are those of a batch that holds the vectors of all passages, the extra ones as constants."""
    results = []
    for size in (None, 3):
        torch.manual_seed(0)
        model = without_dropout(pair(mode="nsp", temperature=0.5))
        trainer = trainer_of(model, extra_passages=4, micro_batch_size=size, bf16=bf16)
        results.append(step(trainer, INSTANCES[:2]))
    batch = trainer.collator(INSTANCES[:2])
    (batch,), _ = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    rows = [trainer._passage_ids[i] for i in batch["extra_candidate_ids"]]
    names = ("input_ids", "attention_mask", "query_index", "passage_input_ids", "passage_attention_mask")
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            extra = model.embed_passages(**model.passage_batch([PASSAGES[id] for id in rows]))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(**{name: batch[name] for name in names})
        loss = info_nce(output.query, torch.cat([output.passages, extra]), batch["query_target"], temperature=0.5)
    loss.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for got, grads, _ in results:
        assert wanted.keys() <= grads.keys()
        rtol = 1e-2 if bf16 else 1e-5
        torch.testing.assert_close(got, loss.detach(), rtol=rtol, atol=0)
        for part in ("gen.", "ctx."):
            one, other = (torch.cat([g[n].flatten() for n in wanted if n.startswith(part)]) for g in (grads, wanted))
            assert (one - other).norm() < (0.05 if bf16 else 1e-5) * other.norm(), part


# ---- what is logged


@pytest.mark.filterwarnings("ignore:negatives do not accumulate")
@pytest.mark.parametrize("normalize, temperature", [(True, 0.05), (False, 2.0)])
def test_logged_losses_are_the_means_of_plain_pytorch(normalize, temperature, trainer_of):
    """Weights stand still, each step sees all data: what is logged is the loss of the whole, however it was cut up."""
    model = without_dropout(pair(nsp_weight=0.5, normalize=normalize, temperature=temperature))
    trainer = trainer_of(
        model, COMPLETE, learning_rate=0.0, max_steps=4, logging_steps=2, per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    trainer.train()
    batch = trainer.collator(COMPLETE)
    with torch.no_grad():
        output = run(model.eval(), batch)
        logits = output.hidden[:, :-1] @ model.lm_head[0].T
        ntp = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        query, passages = (F.normalize(x, dim=1) if normalize else x for x in output[1:])
        scores = query @ passages.T / temperature
        nsp = F.cross_entropy(scores, batch["query_target"])
        accuracy = (scores.argmax(dim=1) == batch["query_target"]).float().mean()
    assert list(losses(trainer)) == [2, 4]
    for log in losses(trainer).values():
        assert log["ntp_loss"] == pytest.approx(ntp.item(), rel=1e-5)
        assert log["nsp_loss"] == pytest.approx(nsp.item(), rel=1e-5)
        assert log["loss"] == pytest.approx((ntp + 0.5 * nsp).item(), rel=1e-5)
        assert log["retrieval_accuracy"] == pytest.approx(accuracy.item())


def test_a_log_covers_the_steps_since_the_last(tmp_path):
    each, third = (make_trainer(tmp_path, max_steps=6, logging_steps=n, save_strategy="no") for n in (1, 3))
    for trainer in (each, third):
        torch.manual_seed(0)  # of dropout
        trainer.train()
    one, mean = losses(each), losses(third)
    assert list(mean) == [3, 6]
    for name in ("loss", "ntp_loss", "nsp_loss"):
        for last in (3, 6):
            wanted = sum(one[step][name] for step in range(last - 2, last + 1)) / 3
            assert mean[last][name] == pytest.approx(wanted, rel=1e-6)


def test_speed_counts_real_tokens_and_training_time_only(trainer_of, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("cosup.train.time.perf_counter", lambda: now[0])
    every = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=INSTANCES)
    trainer = trainer_of(pair(), max_steps=4, logging_steps=2, per_device_train_batch_size=N, **every)

    def slow(function, seconds):
        def wrapped(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(trainer, "training_step", slow(trainer.training_step, 2.0))
    monkeypatch.setattr(trainer.model, "save_pretrained", slow(trainer.model.save_pretrained, 100.0))
    monkeypatch.setattr(trainer, "get_eval_dataloader", slow(trainer.get_eval_dataloader, 50.0))
    trainer.train()
    batch = trainer.collator(INSTANCES)
    tokens = (batch["attention_mask"].sum() + batch["passage_attention_mask"].sum()).item()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["tokens_per_second"] for log in logs] == [tokens / 2.0] * 2
    assert all(100 < log["peak_memory_MB"] < 1e5 for log in logs)


@pytest.mark.parametrize("size", [1, 3, N])
def test_held_out_ntp_loss_does_not_depend_on_the_batches(size, trainer_of):
    trainer = trainer_of(pair(), per_device_eval_batch_size=size, eval_dataset=COMPLETE)
    metrics = trainer.evaluate()
    whole = trainer.collator(COMPLETE)
    with torch.no_grad():
        output = trainer._losses(trainer.model.eval(), whole)
    assert metrics["eval_ntp_loss"] == pytest.approx(output.ntp_loss.item(), rel=1e-5)
    assert metrics["eval_nsp_loss"] == pytest.approx(output.nsp_loss.item(), rel=1e-5)  # all are candidates of all
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)


def test_what_is_told_once(trainer_of, recwarn):
    model = pair(max_length=60)
    trainer = trainer_of(model, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=1)
    trainer.train()
    places = ("cosup", str(Path(__file__).parent))  # of the fixture that makes the trainer
    told = [str(warning.message) for warning in recwarn if any(place in warning.filename for place in places)]
    assert sum("negatives do not accumulate: with 2 accumulation steps" in message for message in told) == 1
    assert sum("cut to max_length 60 (raise it to keep all): {'truncated': " in message for message in told) == 1


def test_rows_without_any_target_are_an_error(trainer_of):
    with pytest.raises(ValueError, match="max_length: 5 leaves no target in any of [0-9]+ rows; raise it"):
        trainer_of(pair(max_length=5), per_device_train_batch_size=2, max_steps=1).train()


# ---- checkpoints


def test_a_killed_run_goes_on_bit_for_bit(tmp_path):
    """SIGKILL amid an accumulated step of the second epoch; with dropout, shuffling, AdamW, a learned temperature."""
    worker = [sys.executable, str(Path(__file__).with_name("train_worker.py")), str(tmp_path / "killed"), "10"]
    process = subprocess.Popen(worker, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        whole = make_trainer(tmp_path / "whole", save_strategy="no")
        whole.train()
        lines = iter(process.stdout.readline, "")
        assert any("hanging" in line for line in lines), process.stderr.read()
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL

    resumed = make_trainer(tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    wanted, got = losses(whole), losses(resumed)
    assert list(got) == list(range(1, 25)) and len({log["loss"] for log in got.values()}) > 20
    assert {step: got[step] for step in range(1, 9)} == {
        step: wanted[step] for step in range(1, 9)
    }  # the killed process
    for number in range(9, 25):
        assert got[number] == wanted[number], number
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_log_interval_survives_a_stop(tmp_path):
    """Logged every 3 steps, saved every 4: the first log after the stop covers two steps from before it."""
    options = dict(logging_steps=3, max_steps=9)
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert list(losses(whole)) == [3, 6, 9]
    assert losses(resumed) == losses(whole)


def test_a_run_with_further_candidates_goes_on_bit_for_bit(tmp_path):
    """Queue, extra passages and micro-batches; stopped amid the second epoch, after the queue has turned over."""
    options = dict(queue_size=9, extra_passages=3, micro_batch_size=1, max_steps=11)
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert losses(resumed) == losses(whole)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.queue.candidates(), resumed.queue.candidates(), strict=True):
        assert torch.equal(a, b) and len(a) == 9
    for size in (0, 8):
        with pytest.raises(ValueError, match=f"queue_size: wanted 9 as in .*checkpoint-8/{_QUEUE}, got {size}"):
            make_trainer(tmp_path, **options | {"queue_size": size}).train(str(tmp_path / "checkpoint-8"))


@pytest.mark.parametrize("free, elsewhere", [(1 << 30, 1 << 20), (1 << 20, 1 << 30)])
def test_a_run_goes_on_bit_for_bit_with_other_memory_free(free, elsewhere, tmp_path):
    """Its budget is saved with it. A new run elsewhere has another budget, and with it other bits in both losses."""
    runs, held_out = [], []
    for place, folder, start in ((free, "", None), (elsewhere, "new", None), (elsewhere, "", "checkpoint-4")):
        with machine(place):
            trainer = make_trainer(tmp_path / folder, max_steps=6, queue_size=64)
            trainer.train(start and str(tmp_path / start))
            runs.append(trainer)
            held_out.append(trainer.evaluate(trainer.train_dataset))
    whole, new, resumed = runs
    for name in ("ntp_loss", "nsp_loss"):
        first, other = ([step.get(name) for step in losses(run).values()] for run in (whole, new))
        assert first != other
    assert losses(resumed) == losses(whole) and held_out[2] == held_out[0]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("saved", [[["NVIDIA H100", 1 << 26]], [["cpu", 1 << 26]] * 2])
def test_a_budget_of_other_devices_is_not_taken(saved, tmp_path):
    """Bits are other ones there anyway: on a processor of another kind, with another number of processes."""
    make_trainer(tmp_path, max_steps=4).train()
    file = tmp_path / "checkpoint-4" / _INTERVAL
    file.write_text(json.dumps(json.loads(file.read_text()) | {"workspaces": saved}))
    with machine(1 << 20):
        make_trainer(tmp_path, max_steps=5).train(resume_from_checkpoint=True)
        assert default_workspace(torch.device("cpu")) == 1 << 16


def test_half_a_checkpoint_is_passed_over(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8)
    with pytest.raises(ValueError, match="resume_from_checkpoint: wanted a whole checkpoint in .* found none"):
        trainer.train(resume_from_checkpoint=True)

    class Died(Exception):
        pass

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 8:
                dying.save_pretrained = die

    def die(*_, **__):
        raise Died

    trainer = make_trainer(tmp_path, [Die()], max_steps=8)
    dying = trainer.model.ctx  # gen is written already when it dies
    with pytest.raises(Died):
        trainer.train()
    half = tmp_path / "checkpoint-8"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]
    shutil.copytree(tmp_path / "checkpoint-4", half)  # as another program might have left it
    (half / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="resume_from_checkpoint: wanted a whole checkpoint, got '.*checkpoint-8'"):
        make_trainer(tmp_path, max_steps=8).train(resume_from_checkpoint=str(half))
    resumed = make_trainer(tmp_path, max_steps=8)
    resumed.train(resume_from_checkpoint="last")
    assert list(losses(resumed)) == list(range(1, 9))
    assert (half / "trainer_state.json").exists()


def test_a_checkpoint_of_before_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    make_trainer(tmp_path, max_steps=4).train()
    trainer = make_trainer(tmp_path, max_steps=4)
    monkeypatch.setattr(trainer, "_save_rng_state", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        trainer.train()
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-4"]
    make_trainer(tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_has_its_place_and_old_ones_go(trainer_of, tmp_path):
    options = dict(eval_strategy="steps", save_strategy="steps", eval_steps=2, save_steps=2, save_total_limit=2)
    options |= dict(load_best_model_at_end=True, max_steps=8, learning_rate=1e-2)
    trainer = trainer_of(shared(tiny_gen()), eval_dataset=tiny_instances(8), **options)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    checkpoints = sorted(tmp_path.iterdir())
    assert len(checkpoints) == 2 and all(re.fullmatch(r"checkpoint-\d", path.name) for path in checkpoints)
    for checkpoint in checkpoints:
        named = json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]
        assert Path(named).parent == tmp_path


DAMAGE = {
    "optimizer.pt": [None, {}, 5],
    "scheduler.pt": [None, 5, {"lr_lambdas": 5}],
    "rng_state.pth": [None, 5],
    "cosup_interval.json": [None, {"sums": [1]}, {"steps": "x"}, {"seconds": None}, {"workspaces": 5}],
    "cosup_queue.safetensors": [None, {"ids": torch.tensor(1)}, {"ids": torch.zeros(9, dtype=torch.int64)}],
    "trainer_state.json": [{name: "x"} for name in ("a", "global_step", "epoch", "log_history", "stateful_callbacks")],
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    make_trainer(folder, max_steps=4, queue_size=9).train()
    return folder


@pytest.mark.parametrize("name, content", [(name, content) for name in DAMAGE for content in DAMAGE[name]])
def test_a_damaged_file_of_a_checkpoint_is_named(name, content, stopped, tmp_path):
    shutil.copytree(stopped / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / name
    if content is None:
        path.write_bytes(path.read_bytes()[:9])
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    elif path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"{path}"):
        make_trainer(tmp_path, max_steps=8, queue_size=9).train(resume_from_checkpoint=True)


def test_a_checkpoint_killed_while_it_was_put_into_place_is_resumed_as_the_new_one(stopped, tmp_path):
    """All of it, not the weights of one run and the optimizer of another."""
    shutil.copytree(stopped / "checkpoint-4", tmp_path / "checkpoint-4")
    shutil.copytree(stopped / "checkpoint-4", tmp_path / "checkpoint-4/.cosup-next")
    for path in (tmp_path / "checkpoint-4").glob("*.*"):
        path.write_text("of before") if path.is_file() else None
    resumed = make_trainer(tmp_path, max_steps=5, queue_size=9)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: wanted at least 1, got 0"),
        ({"lr_scheduler_kwargs": {"zz": 1}}, "lr_scheduler_kwargs: .*zz"),
    ],
)
def test_options_that_are_none_are_told(options, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path, **options).train()


def test_names_that_accelerate_does_not_have_are_told():
    with pytest.raises(ValueError, match="arguments: .*zz"):
        CoSupConfig.parse(["--accelerator_config", '{"zz": 1}'])


def test_weights_alone_cannot_be_resumed(tmp_path):
    make_trainer(tmp_path, max_steps=4, save_only_model=True).train()
    with pytest.raises(ValueError, match="wanted optimizer state in .*checkpoint-4, got weights only"):
        make_trainer(tmp_path, max_steps=8).train(resume_from_checkpoint=True)


def test_a_checkpoint_is_a_saved_pair_and_ties_survive_a_resume(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=4)
    trainer.train()
    saved = GenCtxModel.from_pretrained(tmp_path / "checkpoint-4")
    for (name, a), b in zip(trainer.model.state_dict().items(), saved.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    resumed = make_trainer(tmp_path, max_steps=5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.model.lm_head[0] is resumed.model.gen.get_input_embeddings().weight  # GPT-2 ties


def test_the_best_checkpoint_comes_back(trainer_of):
    class Worse(TrainerCallback):  # each evaluation is worse than the one before
        def on_evaluate(self, args, state, control, metrics, **_):
            metrics["eval_loss"] = float(state.global_step)

    every = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, eval_dataset=INSTANCES)
    trainer = trainer_of(pair(), max_steps=3, load_best_model_at_end=True, callbacks=[Worse()], **every)
    trainer.train()
    best = GenCtxModel.from_pretrained(Path(trainer.args.output_dir) / "checkpoint-1")
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert torch.equal(best.lm_head[0], trainer.model.lm_head[0])


# ---- the config


def test_python_yaml_and_command_line_say_the_same(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "learning_rate: 1e-4\nnsp_weight: 2\nnormalize: false\nmode: nsp\nuse_cpu: true\n"
    )  # 1e-4: a string
    line = "--learning_rate 1e-4 --nsp_weight 2 --normalize false --mode nsp --use_cpu".split()
    options = dict(learning_rate=1e-4, nsp_weight=2.0, normalize=False, mode="nsp", use_cpu=True)
    made = [CoSupConfig(**options), CoSupConfig.parse(line), CoSupConfig.parse(yaml_file=file)]
    assert made[0].to_dict() == made[1].to_dict() == made[2].to_dict()
    assert made[0].model_config() == GenCtxConfig(nsp_weight=2.0, normalize=False, mode="nsp")
    assert CoSupConfig.parse(["--nsp_weight", "3"], yaml_file=file).nsp_weight == 3.0


def test_a_preset_gives_what_is_not_given_and_a_saved_pair_keeps_its_own(tmp_path):
    assert CoSupConfig(preset="paper", nsp_weight=0.1).model_config() == replace(GenCtxConfig.paper(), nsp_weight=0.1)
    assert CoSupConfig().model_config() == GenCtxConfig()
    pair(pooling="last", temperature=0.2).save_pretrained(tmp_path)
    kept = CoSupConfig(gen=str(tmp_path), mode="ntp").model_config()
    assert kept == GenCtxConfig(pooling="last", temperature=0.2, mode="ntp")
    assert CoSupConfig(gen=str(tmp_path), preset="default").model_config() == GenCtxConfig()


@pytest.mark.parametrize(
    "text, message",
    [
        ("lerning_rate: 1", "run.yaml: wanted names of CoSupConfig, got lerning_rate"),
        ("- 1", "run.yaml: wanted a mapping of names to values, got list"),
        ("learning_rate: fast", "run.yaml: argument --learning_rate.*invalid float value: 'fast'"),
        ("pooling: max", "pooling: wanted one of mean, last, token, got 'max'"),
        ("preset: mine", "preset: wanted default or paper, got 'mine'"),
        ("micro_batch_size: 0", "micro_batch_size: wanted at least 1 or None, got 0"),
        ("gather: all", "gather: wanted one of exact, detached, local, got 'all'"),
        ("queue_size: -1", "queue_size: wanted at least 0, got -1"),
        ("extra_passages: -1", "extra_passages: wanted at least 0, got -1"),
    ],
)
def test_a_wrong_yaml_file_is_told(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        CoSupConfig.parse(yaml_file=file)


def test_a_wrong_argument_is_told():
    with pytest.raises(ValueError, match="--lerning_rate"):
        CoSupConfig.parse(["--lerning_rate", "1"])
    with pytest.raises(ValueError, match="--max_steps.*invalid int value: 'x'"):
        CoSupConfig.parse(["--max_steps", "x"])


def test_from_files_to_a_trained_pair(tmp_path):
    write_jsonl(tmp_path / "passages.jsonl", PASSAGES.values())
    write_jsonl(tmp_path / "instances.jsonl", INSTANCES)
    gen, ctx = tiny_folder(tmp_path / "gen", tiny_gen()), tiny_folder(tmp_path / "ctx", tiny_encoder())
    config = CoSupConfig(
        gen=str(gen),
        ctx=str(ctx),
        instances=str(tmp_path / "instances.jsonl"),
        eval_instances=str(tmp_path / "instances.jsonl"),
        passages=str(tmp_path / "passages.jsonl"),
        output_dir=str(tmp_path / "run"),
        num_layers=1,
        max_steps=2,
        pooling="last",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = CoSupTrainer.from_config(config)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    trainer.save_model()
    again = GenCtxModel.from_pretrained(tmp_path / "run")
    assert again.config.pooling == "last" and again.gen.config.num_hidden_layers == 1
    assert torch.equal(again.lm_head[0], trainer.model.lm_head[0])
    for name in ("gen", "instances", "passages"):
        with pytest.raises(ValueError, match=f"{name}: wanted a path, got None"):
            CoSupTrainer.from_config(replace(config, **{name: None}))


def test_what_cannot_be_trained_is_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="train_dataset: wanted at least one instance"):
        CoSupTrainer(pair(), args, train_dataset=[], passages=PASSAGES)
    smooth = TrainingArguments(str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="label_smoothing_factor 0, got 0.1"):
        CoSupTrainer(pair(), smooth, train_dataset=INSTANCES, passages=PASSAGES)


def test_plain_training_arguments_work(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, disable_tqdm=True, save_strategy="no")
    trainer = CoSupTrainer(pair(), args, train_dataset=INSTANCES, passages=PASSAGES)
    trainer.train()
    assert json.dumps(trainer.state.log_history)
