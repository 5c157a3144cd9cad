"""A patched model trains over processes as in one: DistributedDataParallel, FSDP2, distributed checkpoints."""

import patched_ranks
import pytest
import ranks
import torch
from transformers import LlamaForCausalLM

from tiny import tiny_gen

WORLD = patched_ranks.WORLD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patched")
    ranks.run_script(patched_ranks.__file__, WORLD, folder)
    return folder


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp without cosup", "fsdp tied", "fsdp after", "head kept"])
def test_losses_of_ranks_are_those_of_one_process(name, folder):
    """Of three steps with AdamW: the third sees what the gradients of two did."""
    wanted, _ = patched_ranks.alone("tied" in name)
    losses = [torch.load(folder / f"{name}.{rank}") for rank in range(WORLD)]
    targets = [[(labels[rows, 1:] != -100).sum().item() for rows in (slice(2), slice(2, 4))]
               for _, labels in map(patched_ranks.rows, range(patched_ranks.STEPS))]  # fmt: skip
    assert all(first == second for first, second in targets)
    assert [sum(step) / WORLD for step in zip(*losses, strict=True)] == pytest.approx(wanted, rel=1e-5)


def test_the_trainer_sharded_by_accelerate(folder, tmp_path):
    wanted = patched_ranks.trained(tmp_path, tiny_gen().train())
    for rank in range(WORLD):
        assert torch.load(folder / f"trainer.{rank}") == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("name", ["fsdp", "fsdp tied", "head kept"])
def test_the_head_is_gathered_once_a_step(name, folder):
    """For the loss, which makes its gradients in the same pass; layers twice, forward and backward."""
    head = "model.embed_tokens.weight" if "tied" in name else "lm_head.weight"
    for rank in range(WORLD):
        gathered = torch.load(folder / f"{name}.{rank}.gathered")
        assert gathered.count(head) == patched_ranks.STEPS
        assert gathered.count("model.layers.0.mlp.up_proj.weight") == 2 * patched_ranks.STEPS


@pytest.mark.parametrize("tied", [False, True])
def test_a_distributed_checkpoint_becomes_a_plain_folder(tied, folder):
    _, wanted = patched_ranks.alone(tied)
    model = LlamaForCausalLM.from_pretrained(folder / f"plain{tied}")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, wanted[name], rtol=0, atol=1e-4)
    assert not torch.allclose(model.lm_head.weight, tiny_gen(tied=tied).lm_head.weight, atol=1e-3)


def test_a_head_that_is_given_back_before_the_loss(folder):
    for rank in range(WORLD):
        assert "reshard_after_forward=False" in torch.load(folder / f"head.{rank}")
