"""The Triton backend: the ops of a decode step on a GPU.

``step``, ``attend_in_looks``, ``attend_within``, ``sample_scores``, ``encode_block`` and ``attend_dense`` are kernels: all that a decode step
asks for, under any policy. The others are asked for outside the hot path (a search by hand) and run the reference's tensor code on the
device.
"""

from louver.kernels.reference import (
    all_reach,
    attend_selection,
    attend_tiers,
    bounds,
    count_tiers,
    merge,
    resolve,
    score,
    search,
    settle,
    sum_reaches,
    tighten,
)
from louver.kernels.triton.dense import attend_dense
from louver.kernels.triton.encode import encode_block
from louver.kernels.triton.looks import attend_in_looks
from louver.kernels.triton.sample import sample_scores
from louver.kernels.triton.step import step
from louver.kernels.triton.within import attend_within

__all__ = [
    "all_reach",
    "attend_dense",
    "attend_in_looks",
    "attend_selection",
    "attend_tiers",
    "attend_within",
    "bounds",
    "count_tiers",
    "encode_block",
    "merge",
    "resolve",
    "sample_scores",
    "score",
    "search",
    "settle",
    "step",
    "sum_reaches",
    "tighten",
]
