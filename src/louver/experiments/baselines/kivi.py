"""A 4-bit cache in KIVI's layout: keys in groups of 32 tokens per channel, values in groups of 32 channels per token.

Source: Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750; asymmetric codes with a
16-bit scale and zero point per group. The last, incomplete group of keys stays exact. Guarantee: none.
"""

from typing import ClassVar

import torch
from torch import Tensor

from louver.protocols import Guarantee

BITS = 4
GROUP = 32


class Kivi4:
    """Keys and values in 4 bits."""

    spec: ClassVar[str] = "kivi4"
    guarantee: ClassVar[Guarantee] = "none"

    def bytes_fraction(self, head_dim: int) -> float:
        """Bytes a step reads over those of a 16-bit cache: codes, and two 16-bit numbers per group."""
        return (BITS + 2 * 16 / GROUP) / 16

    def coded(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [num_kv_heads, kv_len, head_dim] as such a cache gives them back."""
        whole = keys.shape[1] // GROUP * GROUP
        coded = _rounded(keys[:, :whole].mT.unflatten(-1, (-1, GROUP))).flatten(-2).mT
        width = GROUP if values.shape[-1] % GROUP == 0 else values.shape[-1]
        parts = _rounded(values.unflatten(-1, (-1, width))).flatten(-2)
        return torch.cat([coded, keys[:, whole:]], 1), parts


def _rounded(x: Tensor) -> Tensor:
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**BITS - 1)).clamp_min(1e-9)
    return ((x - low) / scale).round() * scale + low
