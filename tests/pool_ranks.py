"""What each process of test_gradcache.py and test_queue.py runs; started by `ranks.run`."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cosup import cached_encode
from cosup.nn import CandidateQueue


class Encoder(nn.Module):
    """Encodes in micro-batches inside of its forward, so that the second pass is inside of the wrapper too."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, micro_batches):
        return cached_encode(self.layers, micro_batches)


def cached_encode_in_data_parallel(rank, world):
    """The gradient on each rank is the mean over ranks."""
    torch.manual_seed(0)
    model, x = Encoder(), torch.randn(world, 5, 2, 4)
    mean = sum(model.layers(rows).square().sum() for part in x for rows in part) / world
    want = torch.autograd.grad(mean, list(model.parameters()))
    parallel = DistributedDataParallel(model)  # its hooks live as long as it
    parallel(x[rank]).square().sum().backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], list(want))


def queue_is_the_same_on_every_rank(rank, world):
    """As one process that enqueues what all ranks have, in rank order; ranks have 0 to 3 vectors, and once 9 of 5."""
    torch.manual_seed(0)
    queue, alone = CandidateQueue(5, 2, process_group=dist.group.WORLD), CandidateQueue(5, 2)
    for step in range(7):
        counts = [(step + r) % 4 if step != 4 else 9 for r in range(world)]
        vectors, ids = torch.randn(sum(counts), 2), torch.randint(100, (sum(counts),))
        alone.enqueue(vectors, ids)
        queue.enqueue(vectors.split(counts)[rank], ids.split(counts)[rank])
        torch.testing.assert_close(queue.state_dict(), alone.state_dict(), rtol=0, atol=0)
