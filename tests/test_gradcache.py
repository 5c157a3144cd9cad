"""Encoding in micro-batches, each twice: the gradients of one large batch in the memory of a small one."""

import pool_ranks
import pytest
import ranks
import torch
from torch import nn

from cosup import cached_encode, info_nce
from cosup.bench.measure import peak_bytes
from tiny import VOCABULARY, tiny_encoder, tiny_gen


def graph_kept(encode, micro_batches):
    return torch.cat([encode(batch) for batch in micro_batches])


def encoder(seed=0, *, recompute=False):
    """A Bert that drops out, and what it makes of rows of tokens: the mean of their states."""
    model = tiny_encoder(seed).train()
    assert any(module.p > 0 for module in model.modules() if isinstance(module, nn.Dropout))
    if recompute:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model, lambda ids: model(ids).last_hidden_state.mean(dim=1)


def gradients(join, pairs, autocast=False):
    """Loss, gradients and the random number that comes next, of queries by the first encoder, passages by the last."""
    torch.manual_seed(1)
    ids = torch.randint(VOCABULARY, (2, 24, 10)).split(5, dim=1)  # the last micro-batch is smaller
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        query = join(pairs[0][1], [part[0] for part in ids])
        passages = join(pairs[-1][1], [part[1] for part in ids])
    loss = info_nce(query.float(), passages.float(), temperature=0.2)
    parameters = [p for model, _ in pairs for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)  # Bert's pooler has no part
    return loss, torch.cat([g.flatten() for g in grads if g is not None]), torch.rand(1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("encoders", [1, 2])
def test_gradients_are_those_of_the_kept_graph(encoders, recompute, autocast):
    """With dropout; with gradient checkpoints inside; under autocast; for one encoder and for two."""
    pairs = [encoder(seed, recompute=recompute) for seed in range(encoders)]
    want, got = (gradients(join, pairs, autocast) for join in (graph_kept, cached_encode))
    again = gradients(graph_kept, pairs, autocast)[0]
    torch.manual_seed(2)
    assert torch.equal(want[0], again) and torch.equal(want[0], got[0])
    assert want[1].norm() > 0.1
    assert (got[1] - want[1]).norm() < 1e-6 * want[1].norm()
    assert torch.equal(want[2], got[2])  # the second pass draws nothing from the stream


def test_dropout_differs_between_micro_batches():
    model, encode = encoder()
    ids = torch.randint(VOCABULARY, (1, 10))
    one, other = cached_encode(encode, [ids, ids])
    assert not torch.allclose(one, other)


def test_memory_is_that_of_one_micro_batch():
    """Four times as many micro-batches cost their vectors and nothing else; with the graph kept they cost all."""
    model = nn.Sequential(nn.Linear(32, 2048), nn.GELU(), nn.Dropout(0.1), nn.Linear(2048, 32))
    activation = 256 * 2048 * 4  # bytes of one inner layer of one micro-batch

    def peak(join, n):
        x = torch.randn(n, 256, 32)

        def step():
            return torch.autograd.grad(join(model, x).sum(), tuple(model.parameters()))

        step()
        return peak_bytes(step)

    few, many, kept = peak(cached_encode, 4), peak(cached_encode, 16), peak(graph_kept, 16)
    vectors = 12 * 256 * 32 * 4
    assert many - few < 3 * vectors < activation  # as parts, joined, and their gradient
    assert kept > 16 * activation > 2 * many


def test_any_micro_batch():
    """A micro-batch may be a dict, as a causal language model wants it; an iterator will do."""
    gen = tiny_gen()
    rows = [{"input_ids": torch.randint(VOCABULARY, (2, n))} for n in (3, 5)]
    vectors = cached_encode(lambda batch: gen.model(**batch).last_hidden_state[:, -1], iter(rows))
    vectors.sum().backward()
    assert vectors.shape == (4, 32) and gen.get_input_embeddings().weight.grad.abs().sum() > 0


def test_inside_of_data_parallel_ranks():
    ranks.run(pool_ranks.cached_encode_in_data_parallel, 2)


def test_no_micro_batch_is_refused():
    with pytest.raises(ValueError, match="micro_batches: wanted at least one, got none"):
        cached_encode(lambda batch: batch, [])
