"""Louver: long-context LLM decoding that reads a fraction of the KV cache and certifies what it did not read.

Every cached key gets a 4-bit sketch with proven bounds on its score. A decode step is exact for the keys the bounds can't rule
out, approximate where they prove that little can be at stake, and says how far its output can be from dense attention.
``louver.integrations.transformers.attach`` puts it into a Hugging Face model.
"""

from louver.attention import DenseAttention as DenseAttention
from louver.attention import LouverAttention as LouverAttention
from louver.attention import attend as attend
from louver.errors import LouverError as LouverError
from louver.index import BallIndex as BallIndex
from louver.index import FlatIndex as FlatIndex
from louver.index import Selection as Selection
from louver.index import SketchIndex as SketchIndex
from louver.kernels import available_backends as available_backends
from louver.policies import Budget as Budget
from louver.policies import ExactFraction as ExactFraction
from louver.policies import Fixed as Fixed
from louver.policies import TopK as TopK
from louver.policies import parse as parse_policy
from louver.protocols import AttendResult as AttendResult
from louver.protocols import StepStats as StepStats
from louver.sketch import SketchConfig as SketchConfig

__all__ = [
    "AttendResult",
    "BallIndex",
    "Budget",
    "DenseAttention",
    "ExactFraction",
    "Fixed",
    "FlatIndex",
    "LouverAttention",
    "LouverError",
    "Selection",
    "SketchConfig",
    "SketchIndex",
    "StepStats",
    "TopK",
    "attend",
    "available_backends",
    "parse_policy",
]
__version__ = "0.1.0"
