"""The Triton backend: the ops of a decode step on a GPU.

``step``, ``attend_in_looks``, ``attend_within``, ``sample_scores``, ``encode_block`` and ``attend_dense`` are kernels: all that a decode step
asks for, under any policy. The others are asked for outside the hot path (a search by hand) and run the reference's tensor code on the
device. ``graphs`` captures what a decode step launches.
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
from louver.kernels.triton import dense, encode, graphs, looks, sample, within
from louver.kernels.triton import step as steps
from louver.kernels.triton.device import on_its_device

attend_dense = on_its_device(dense.attend_dense)
attend_in_looks = on_its_device(looks.attend_in_looks)
attend_within = on_its_device(within.attend_within)
encode_block = on_its_device(encode.encode_block)
sample_scores = on_its_device(sample.sample_scores)
step = on_its_device(steps.step)

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
    "graphs",
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
