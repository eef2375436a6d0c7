"""Fixtures that more than one folder of tests uses."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("LOUVER_CROSSOVER", "off")  # tests are short, and about the sketch
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads(request):
    """Small tensors are slower on many threads than on one; a model is not."""
    before = torch.get_num_threads()
    if request.node.get_closest_marker("model") is None:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm():
    """SmolLM2-135M-Instruct and its tokenizer, loaded once. Tests marked ``model`` only; leave it as you found it."""
    from louver.experiments import demo_model

    return demo_model()
