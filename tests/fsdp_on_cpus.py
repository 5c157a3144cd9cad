"""FSDP in processes of a CPU."""

from accelerate import PartialState
from accelerate.utils import DistributedType


class FSDPOnCPUs:
    """A base before TrainingArguments. accelerate shards on GPUs only, and its state says what these processes are."""

    def __post_init__(self):
        self.fsdp = True
        super().__post_init__()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
