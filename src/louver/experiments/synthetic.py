"""Keys and queries made to be hard, from one seeded generator.

``heavy_tailed``: Gaussian keys with channel offsets that neighbours share, as real keys have, and 1.2% of them pushed along the
queries' direction, so that a small share of the keys carries the mass.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

OFFSET_TOKENS = 128  # neighbours that share their channel offsets
PUSHED_SHARE = 0.012
NUM_METRIC_QUERIES = 64


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """A decode step's tensors, and queries like its own for the metric."""

    q: Tensor  # [batch, num_q_heads, head_dim]
    keys: Tensor  # [batch, num_kv_heads, kv_len, head_dim]
    values: Tensor
    metric_queries: Tensor  # [batch, num_q_heads, 64, head_dim]


def heavy_tailed(
    kv_len: int,
    *,
    num_q_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Synthetic:
    """One decode step over kv_len keys; the same arguments give the same tensors on the same kind of device.

    Example:
        >>> heavy_tailed(256, num_q_heads=4, num_kv_heads=2, head_dim=64).keys.shape
        torch.Size([1, 2, 256, 64])
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    lead = (batch, num_kv_heads)
    direction = normal(*lead, 1, head_dim)
    keys = torch.empty(*lead, kv_len, head_dim, dtype=dtype, device=device)
    values = torch.empty_like(keys)
    for row in range(batch):
        for head in range(num_kv_heads):
            offsets = normal(-(-kv_len // OFFSET_TOKENS), head_dim).repeat_interleave(OFFSET_TOKENS, 0)[:kv_len]
            along = direction[row, head] / direction[row, head].norm()
            reach = 6 * (0.7 + 0.6 * uniform(kv_len, 1)) * (uniform(kv_len, 1) < PUSHED_SHARE)
            keys[row, head] = 0.6 * normal(kv_len, head_dim) + 0.8 * offsets + reach * along
            values[row, head] = normal(kv_len, head_dim)
    group = num_q_heads // num_kv_heads
    q = direction + 0.6 * normal(*lead, group, head_dim)
    more = direction[:, :, None] + 0.6 * normal(*lead, group, NUM_METRIC_QUERIES, head_dim)
    return Synthetic(q=q.flatten(1, 2).to(dtype), keys=keys, values=values, metric_queries=more.flatten(1, 2).to(dtype))
