"""Text in: the JSONL schema, public data fetched by name and sha256, and the collator that makes batches of it."""

from cosup.data.collate import GenCtxCollator
from cosup.data.schema import Instance, Passage, Reference, read_instances, read_passages, write_jsonl

__all__ = ["GenCtxCollator", "Instance", "Passage", "Reference", "read_instances", "read_passages", "write_jsonl"]
