"""Experiments: one file each, with a Config, run(config) -> rows. Plots only read rows."""

from louver.experiments.demo_model import demo_model

__all__ = ["demo_model"]
