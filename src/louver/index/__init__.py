"""Indexes: find every key above a threshold. Search only; what to search for is a policy's business."""

from louver.index.ball import BallIndex
from louver.index.ball_row import BallConfig
from louver.index.flat import FlatIndex
from louver.index.pages import SketchPages
from louver.index.results import Selection
from louver.index.sketch import SketchIndex

__all__ = ["BallConfig", "BallIndex", "FlatIndex", "Selection", "SketchIndex", "SketchPages"]
