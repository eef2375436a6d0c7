"""Indexes: find every key above a threshold. Search only; what to search for is a policy's business."""

from louver.index.flat import FlatIndex
from louver.index.results import Selection
from louver.index.sketch import SketchIndex

__all__ = ["FlatIndex", "Selection", "SketchIndex"]
