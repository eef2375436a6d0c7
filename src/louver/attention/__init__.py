"""Serving the decode steps of one layer."""

from louver.attention.dense import DenseAttention

__all__ = ["DenseAttention"]
