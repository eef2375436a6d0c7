"""Serving the decode steps of one layer."""

from louver.attention.dense import DenseAttention
from louver.attention.layer import LouverAttention
from louver.attention.paged import PagedAttention, PagedRows
from louver.attention.sparse import attend

__all__ = ["DenseAttention", "LouverAttention", "PagedAttention", "PagedRows", "attend"]
