"""What Louver is compared with. None of these has a guarantee: every row measured with one says guarantee = "none".

Caches in fewer bits: ``Fp8``, ``Kivi4``. Selections that serve a model's layers: StreamingLLM, H2O, SnapKV, Quest, Twilight and the
indexes of faiss, by name through ``served``. ``OracleDrop`` knows what nobody knows.
"""

from louver.experiments.baselines.ann import Ann, AnnIndex, AnnOptions
from louver.experiments.baselines.fp8 import Fp8
from louver.experiments.baselines.h2o import H2O
from louver.experiments.baselines.kivi import Kivi4
from louver.experiments.baselines.oracle import OracleDrop
from louver.experiments.baselines.quest import Quest
from louver.experiments.baselines.snapkv import SnapKV
from louver.experiments.baselines.spec import NAMES, is_baseline, served
from louver.experiments.baselines.streaming import StreamingLLM
from louver.experiments.baselines.twilight import Twilight

__all__ = [
    "H2O",
    "NAMES",
    "Ann",
    "AnnIndex",
    "AnnOptions",
    "Fp8",
    "Kivi4",
    "OracleDrop",
    "Quest",
    "SnapKV",
    "StreamingLLM",
    "Twilight",
    "is_baseline",
    "served",
]
