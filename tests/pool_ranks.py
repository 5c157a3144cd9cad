"""What each process of test_gradcache.py and test_queue.py runs; started by `ranks.run`."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cosup import cached_encode


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
