"""What a few minutes of a GPU must find out about cosup, in the order of need: ``cosup bench gpu``."""

from cosup.bench.gpu.campaign import run

__all__ = ["run"]
