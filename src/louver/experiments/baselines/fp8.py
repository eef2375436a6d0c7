"""An FP8 cache: e4m3 with one scale per tensor, as serving engines offer it.

Source: vLLM's kv_cache_dtype="fp8" with a scale per tensor (layer, keys or values); here per KV head, which can only help it.
Guarantee: none. Cost: one byte per element, half of a 16-bit cache.
"""

from typing import ClassVar

import torch
from torch import Tensor

from louver.protocols import Guarantee

LARGEST = 448.0  # of e4m3


class Fp8:
    """Keys and values rounded to e4m3."""

    spec: ClassVar[str] = "fp8"
    guarantee: ClassVar[Guarantee] = "none"

    def bytes_fraction(self, head_dim: int) -> float:
        """Bytes a step reads over those of a 16-bit cache."""
        return 0.5

    def coded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [num_kv_heads, kv_len, head_dim] as such a cache gives them back."""
        return _rounded(keys), _rounded(values)


def _rounded(x: Tensor) -> Tensor:
    scale = x.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / LARGEST
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * scale
