"""Models as the experiments on whole models take them."""

from pathlib import Path
from typing import Any

from louver.experiments.demo_model import FOLDER_NAME, HUB_ID, demo_model, load_model
from louver.experiments.experiment import Progress, no_progress
from louver.experiments.generation import DEMO


def load(name: str, on_progress: Progress = no_progress, loaded: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """(model, tokenizer): the offline model for "demo"; 16-bit on a GPU, since that is how models decode there.

    Raises:
        InputFileError: there is no such model.
    """
    if loaded is not None:
        return loaded
    on_progress("Load the model", 0, 1)
    model, tokenizer = demo_model() if name == DEMO else load_model(name)
    on_progress("Load the model", 1, 1)
    return model.half() if model.device.type == "cuda" else model, tokenizer


def model_name(model: Any) -> str:
    """What to call it in a row."""
    name = Path(getattr(model.config, "name_or_path", "")).name or "unnamed"
    return HUB_ID if name == FOLDER_NAME else name
