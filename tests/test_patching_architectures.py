"""cosup.patch on the architectures of transformers: a sample of them, and with --release all."""

import pytest
import torch

from architectures import CLASSES, PAGE, compare, page, survey

SAMPLE = {
    "llama": "exact",
    "bamba": "exact",  # attention beside a state; a z-loss
    "bert": "exact",  # a transform before its head, and a bias
    "bloom": "exact",
    "cohere": "exact",  # scaled logits
    "gemma2": "exact",  # soft capped
    "gemma3": "exact",  # images beside text
    "gemma3n_text": "exact",  # layers that share keys; soft capped
    "git": "exact",  # the loss is over the text after an image
    "gpt2": "exact",
    "granite": "exact",  # divided logits
    "inkling2_text": "exact",  # soft capped, then the padding of the vocabulary cut off
    "mamba": "exact",
    "mixtral": "exact",  # a loss of its experts
    "prophetnet": "refused",
    "qwen3_5": "exact",  # linear and full attention; a language model out of a composite config
    "whisper": "exact",
    "xlm": "exact",
}


@pytest.fixture(autouse=True)
def one_thread():
    """Products this small only lose by more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("model_type", SAMPLE)
def test_a_sample(model_type):
    if model_type not in CLASSES:
        pytest.skip(f"this transformers has no {model_type}")
    verdict = compare(model_type)
    assert verdict.status == SAMPLE[model_type], verdict.reason


@pytest.mark.release
def test_all():
    verdicts = survey()
    assert not [f"{name}: {verdict.reason}" for name, verdict in verdicts.items() if verdict.status == "wrong"]
    assert sum(verdict.status == "exact" for verdict in verdicts.values()) >= 150
    assert page(verdicts) == PAGE.read_text(), "python tests/architectures.py writes what was found"
