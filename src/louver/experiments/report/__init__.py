"""Self-contained HTML that needs no network: the report of a folder of result rows, and the profile of a model."""

from louver.experiments.report.build import build, build_one
from louver.experiments.report.profile import PROFILE

__all__ = ["PROFILE", "build", "build_one"]
