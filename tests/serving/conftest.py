"""vLLM on a CPU, in this process, on the offline model. Run by `make test-vllm`, in an environment of its own."""

import os

import pytest

from serving.engine import ENVIRONMENT


@pytest.fixture(scope="session", autouse=True)
def _environment():
    """Set when the first of these tests runs: other tests do without."""
    os.environ |= ENVIRONMENT


@pytest.fixture(scope="session")
def folder(_environment):
    """The offline model, as safetensors."""
    from louver.experiments.demo_model import demo_folder

    return demo_folder()
