"""What needs no optional package runs without any; what needs one names the extra that brings it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys

sys.modules.update(dict.fromkeys(("faiss", "bm25s", "pymilvus", "gguf", "flash_attn", "sentence_transformers", "trl")))

import json
from pathlib import Path

import pytest

import cosup
from cosup.evaluate import evaluate
from tiny import tiny_encoder, tiny_gen, tiny_instances, tiny_passages, tiny_tokenizer

folder = Path(sys.argv[1])
passages, instances = tiny_passages(12), tiny_instances(12)
model = cosup.GenCtxModel(tiny_gen(), tiny_encoder(), tiny_tokenizer(), tiny_tokenizer())
config = cosup.CoSupConfig(output_dir=str(folder / "pair"), max_steps=2, per_device_train_batch_size=3, use_cpu=True,
                           report_to=[], save_strategy="no", disable_tqdm=True)
assert cosup.CoSupTrainer(model, config, train_dataset=instances, passages=passages).train().global_step == 2

cosup.SequenceIndex.from_model(model, passages.values()).save(folder / "index")
index = cosup.SequenceIndex.load(folder / "index", model.fingerprint())
assert index.search(model.embed_passages(**model.passage_batch([passages["p5"]])), k=12)[1][0][0] == passages["p5"]
(answer,) = model.generate(["Which is number 5?"], index, max_new_tokens=8)
assert answer.tokens
assert evaluate(model, instances, index, bm25=False)["retrieval"]["Gen"]["queries"]

with pytest.raises(RuntimeError, match=r"BM25 needs bm25s: pip install 'cosup\\[bm25\\]'"):
    evaluate(model, instances, index)
faiss = r"needs FAISS: pip install 'cosup\\[faiss\\]'"
with pytest.raises(RuntimeError, match="factory: 'HNSW32' " + faiss):
    cosup.SequenceIndex.from_model(model, passages.values(), factory="HNSW32")
manifest = json.loads((folder / "index/manifest.json").read_text())
manifest["sha256"]["index.faiss"] = manifest["sha256"].pop("vectors.safetensors")
(folder / "index/manifest.json").write_text(json.dumps(manifest))
(folder / "index/vectors.safetensors").rename(folder / "index/index.faiss")
with pytest.raises(RuntimeError, match="index/index.faiss " + faiss):
    cosup.SequenceIndex.load(folder / "index", None)
"""


def test_training_an_index_and_generation_need_no_optional_package(tmp_path: Path):
    command = [sys.executable, "-c", SCRIPT, tmp_path]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
