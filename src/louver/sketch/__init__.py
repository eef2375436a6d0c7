"""The sketch: nested frames over blocks of keys and values."""

from louver.sketch.layout import Sketch, SketchConfig

__all__ = ["Sketch", "SketchConfig"]
