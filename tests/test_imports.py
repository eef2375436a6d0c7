"""``import louver`` stays cheap: no command line, no model library, no plots, no GPU compiler."""

import subprocess
import sys

import pytest

HEAVY = ("transformers", "triton", "matplotlib", "typer", "rich", "vllm")
LIST_LOADED = f"import sys, {{module}}; print(*(m for m in {HEAVY} if m in sys.modules))"


def loaded_by(module: str) -> set[str]:
    code = LIST_LOADED.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_louver_loads_nothing_heavy():
    assert loaded_by("louver") == set()


@pytest.mark.parametrize("module", ["louver.experiments", "louver.cli"])
def test_models_and_plots_load_only_when_used(module):
    assert loaded_by(module) <= {"typer", "rich"}
