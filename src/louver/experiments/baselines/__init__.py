"""What Louver is compared with. None of these has a guarantee: every row measured with one says guarantee = "none"."""

from louver.experiments.baselines.fp8 import Fp8
from louver.experiments.baselines.kivi import Kivi4
from louver.experiments.baselines.oracle import OracleDrop

__all__ = ["Fp8", "Kivi4", "OracleDrop"]
