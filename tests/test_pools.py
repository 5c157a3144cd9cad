"""The experiment of `cosup bench pools` on a little text."""

import pytest
import torch

from cosup import pools
from cosup.data.schema import write_jsonl
from cosup.data.wiki import WikiFiles
from pairs import pair
from tiny import tiny_instances, tiny_passages


def test_pools_are_as_wide_as_said():
    assert {setting.pool for setting in pools.SETTINGS} == {64, 512, 4096}
    assert all(pools.QUERIES % setting.batch == 0 for setting in pools.SETTINGS)


@pytest.mark.parametrize("setting", [pools.Setting(4), pools.Setting(8), pools.Setting(4, queue=6, extra=3)])
def test_a_setting_trains_on_its_pool(setting, tmp_path, monkeypatch):
    instances = [instance for instance in tiny_instances(120)[:60] if len(instance.references) == 1]
    for name, items in (("passages", tiny_passages(120).values()), ("train", instances), ("test", instances[:9])):
        write_jsonl(tmp_path / name, items)
    monkeypatch.setattr(pools.wiki_data, "build", lambda: WikiFiles(*(tmp_path / name for name in WikiFiles._fields)))
    monkeypatch.setattr(pools, "MICRO_BATCH", 4)
    seen = []
    loss = pools.CoSupTrainer._loss
    monkeypatch.setattr(
        pools.CoSupTrainer,
        "_loss",
        lambda self, output, inputs, mode, counts=None, further=None, group=None: (
            seen.append((len(output.query), len(output.passages) + (0 if further is None else len(further[0]))))
            or loss(self, output, inputs, mode, counts, further, group)
        ),
    )
    torch.manual_seed(0)
    row = pools._measure(pair(mode="nsp", max_length=64), setting, 24, 1e-3, False, tmp_path)
    steps = [candidates for queries, candidates in seen if queries]  # second passes have none
    assert row["steps"] == len(steps) == 24 // setting.batch
    negatives = max(len(instance.hard_negatives) for instance in instances) * setting.batch
    assert row["pool"] <= steps[-1] <= row["pool"] + negatives
    assert 0 <= row["R@10"] <= 1 and row["seconds"] > 0 and row["peak_memory_MB"] > 0
