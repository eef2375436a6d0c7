"""The CPU backend: compiled kernels (csrc/) with the reference backend's ops and signatures.

Native is all that a decode step computes over keys: encode_block; the fused step under a rule, and under what it is to certify; bounds,
tighten, count_tiers and attend_tiers, which policies that are neither go through; attend_dense, search, score and attend_selection; sum_reaches and
all_reach, for groups of keys.
resolve, settle and merge are the reference's own: the first works on histograms, no step needs the second, the third works on a few partial
outputs.
"""

from louver.kernels.cpu.attend import attend_dense, attend_tiers, step
from louver.kernels.cpu.bounds import bounds, count_tiers, tighten
from louver.kernels.cpu.encode import encode_block
from louver.kernels.cpu.groups import all_reach, sum_reaches
from louver.kernels.cpu.search import attend_selection, score, search
from louver.kernels.cpu.within import attend_mass, attend_within
from louver.kernels.reference import merge, resolve, settle

__all__ = [
    "all_reach",
    "attend_dense",
    "attend_mass",
    "attend_selection",
    "attend_tiers",
    "attend_within",
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
