"""drop:F: attend only the true top F of the keys, as the best selector one can imagine would.

No method that drops keys can do better at the same number of keys, and none knows the true scores without reading every key.
Guarantee: none. Cost: charged as if a 4-bit index found the keys: half a byte per channel and 3% for its overhead.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from louver.protocols import Guarantee

INDEX_FRACTION = 0.125 + 0.03


@dataclass(frozen=True, kw_only=True)
class OracleDrop:
    """Softmax attention over the share of keys with the largest scores."""

    guarantee: ClassVar[Guarantee] = "none"
    fraction: float  # of the keys, per query; changes results

    @property
    def spec(self) -> str:
        """Its name in result rows."""
        return f"drop:{self.fraction:g}"

    def kept(self, scores: Tensor) -> Tensor:
        """Bool, the true top of scores [..., kv_len]."""
        k = max(1, int(self.fraction * scores.shape[-1]))
        return scores >= scores.topk(k, -1).values[..., -1:]

    def bytes_fraction(self, kept: Tensor) -> float:
        """Bytes read, given what a GQA group keeps together: bool [kv_heads, kv_len]."""
        return INDEX_FRACTION + kept.double().mean().item()

    def output(self, scores: Tensor, values: Tensor, softmax_scale: float) -> Tensor:
        """Attention output [..., head_dim] from scores [..., kv_len], -inf where a query may not look."""
        return (scores.masked_fill(~self.kept(scores), -torch.inf) * softmax_scale).softmax(-1) @ values
