"""One page from a folder of result rows: self-contained HTML that needs no network."""

from louver.experiments.report.build import build

__all__ = ["build"]
