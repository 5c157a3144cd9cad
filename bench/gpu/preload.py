"""What every stage needs, imported once before they are forked. Nothing here may start CUDA."""

import cosup  # noqa: F401
import cosup.bench.gpu.correct
import cosup.bench.gpu.speed
import cosup.bench.gpu.variants
import cosup.nn
import cosup.ops  # noqa: F401
