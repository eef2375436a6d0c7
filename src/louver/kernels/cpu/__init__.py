"""The CPU backend: compiled kernels (csrc/) with the reference backend's ops and signatures.

Native are encode_block, bounds, step and attend_dense, which is what a decode step under a rule needs, and search, score and
attend_selection. The rest is the reference's own, on the same tensors: a policy that is not a rule goes through native bounds and
the reference's attend_tiers.
"""

from louver.kernels.cpu.attend import attend_dense, step
from louver.kernels.cpu.search import attend_selection, score, search
from louver.kernels.cpu.sketch import bounds, encode_block
from louver.kernels.reference import attend_tiers, merge, resolve

__all__ = [
    "attend_dense",
    "attend_selection",
    "attend_tiers",
    "bounds",
    "encode_block",
    "merge",
    "resolve",
    "score",
    "search",
    "step",
]
