"""The experiments, one file each: a module with an ``EXPERIMENT``. A new file here is a new command and a new section."""

import importlib
import pkgutil

from louver.experiments.experiment import Experiment


def experiments() -> dict[str, Experiment]:
    """Every experiment there is, by name."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return {module.EXPERIMENT.name: module.EXPERIMENT for module in modules}
