"""The tables of README.md and docs/: which rows and columns each shows, a file per subject."""

from shown import bounds, offload, policies, quality, speed
from shown.table import Table

__all__ = ["TABLES", "Table"]

TABLES = bounds.TABLES | offload.TABLES | policies.TABLES | quality.TABLES | speed.TABLES
