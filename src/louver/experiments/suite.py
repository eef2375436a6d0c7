"""All experiments in a row: one capture, then every experiment of the catalog on it, each with its rows in a folder.

Quick settings (each experiment's own) and two layers unless ``full``; then eight layers and the experiments' defaults.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from louver.errors import InputFileError, LouverError
from louver.experiments import capture as captures
from louver.experiments.catalog import experiments
from louver.experiments.demo_model import demo_model, load_model
from louver.experiments.experiment import Experiment, Progress, no_progress
from louver.experiments.journal import Journal
from louver.experiments.rows import write_rows

QUICK_TOKENS, FULL_TOKENS = 4096, 8192
CAPTURE = "capture.safetensors"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to run. Every field changes results."""

    out: Path
    model: str | None = None  # a folder or a name on the model hub; None: the offline model
    full: bool = False
    only: tuple[str, ...] = ()  # names; none: all of them

    def __post_init__(self) -> None:
        if bad := [name for name in self.only if name not in experiments()]:
            raise InputFileError(f"no experiment {bad[0]!r}; there are {', '.join(experiments())}")


def run(
    config: Config,
    on_progress: Progress = no_progress,
    say: Callable[[str], None] = lambda line: None,
    loaded: tuple[Any, Any] | None = None,
) -> tuple[list[Path], dict[str, str]]:
    """Capture, measure, and write one file of rows per experiment.

    Returns:
        The files written, and by name why an experiment could not run: what one of them lacks does not stop the others.

    Raises:
        InputFileError, UnsupportedModelError: there is no capture to be had from the model.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    chosen = [described for name, described in experiments().items() if not config.only or name in config.only]
    capture = config.out / CAPTURE
    if any("capture" in _fields(described) for described in chosen):
        say(f"Capturing into {capture}")
        _capture(config, on_progress, loaded).save(capture)
    written, failed = [], {}
    for described in chosen:
        settings = settings_of(described, config, capture)
        command = command_line(described, settings)
        say(command)
        path = config.out / f"{described.name}.json"
        journal = Journal.beside(path)
        try:
            rows, more = described.measure(described.config(**settings), on_progress, journal)
        except LouverError as error:
            failed[described.name] = str(error)
            continue
        write_rows(path, rows, seed=settings.get("seed", 0), command=command, **more)
        journal.close()
        written.append(path)
    return written, failed


def settings_of(described: Experiment, config: Config, capture: Path) -> dict[str, Any]:
    """The Config fields that differ from an experiment's defaults in this run."""
    settings: dict[str, Any] = {} if config.full else dict(described.quick)
    if "capture" in _fields(described):
        settings["capture"] = capture
    if "model" in _fields(described) and config.model is not None:
        settings["model"] = config.model
    return settings


def command_line(described: Experiment, settings: Mapping[str, Any]) -> str:
    """The command that does the same."""
    words = ["louver", "experiment", described.name]
    for name, value in settings.items():
        text = ",".join(str(x) for x in value) if isinstance(value, tuple) else str(value)
        option = name.replace("_", "-")
        words += [f"--{'' if value else 'no-'}{option}"] if isinstance(value, bool) else [f"--{option}", text]
    return " ".join(words)


def _fields(described: Experiment) -> set[str]:
    return {field.name for field in dataclasses.fields(described.config)}


def _capture(config: Config, on_progress: Progress, loaded: tuple[Any, Any] | None) -> captures.Capture:
    model, tokenizer = loaded or (demo_model() if config.model is None else load_model(config.model))
    layers = None
    if not config.full:
        attended = captures.full_attention_layers(model)
        layers = tuple(sorted({attended[len(attended) // 6], attended[2 * len(attended) // 3]}))
    tokens = FULL_TOKENS if config.full else QUICK_TOKENS
    wanted = captures.Config(model=config.model, layers=layers, max_tokens=tokens)
    return captures.run(wanted, on_progress, (model, tokenizer))
