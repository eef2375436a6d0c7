"""The reference backend: every op in plain torch, on any device. It is the specification the fast backends are tested against."""

from louver.kernels.reference.attend import attend_dense, attend_selection, attend_tiers
from louver.kernels.reference.bounds import bounds
from louver.kernels.reference.counts import count_tiers
from louver.kernels.reference.encode import encode_block
from louver.kernels.reference.groups import all_reach, sum_reaches
from louver.kernels.reference.merge import merge
from louver.kernels.reference.resolve import resolve
from louver.kernels.reference.search import score, search
from louver.kernels.reference.settle import settle
from louver.kernels.reference.step import step
from louver.kernels.reference.tighten import tighten

__all__ = [
    "all_reach",
    "attend_dense",
    "attend_selection",
    "attend_tiers",
    "bounds",
    "count_tiers",
    "encode_block",
    "merge",
    "resolve",
    "score",
    "search",
    "settle",
    "step",
    "sum_reaches",
    "tighten",
]
