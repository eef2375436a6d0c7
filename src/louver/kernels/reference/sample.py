"""sample_scores: exact scores of a uniform random sample of each row's keys.

A reservoir without state: token i of a row carries a pseudo-random tag that depends on the seed and i alone, and the sample
is the ``size`` tokens with the smallest tags. Every set of that size is equally likely, and a new token changes the sample by at most
one key, as in a reservoir kept along the way; but truncated, copied and rearranged rows need no care, and no host waits.
Cost: a hash per token, and ``size`` keys read per KV head.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.kernels.reference.paging import contiguous
from louver.kernels.reference.rows import exact_scores
from louver.protocols import Sample
from louver.shapes import Cache, PerRow, Query


def sample_scores(
    q: Query,
    keys: Cache,
    kv_start: PerRow,
    kv_len: PerRow,
    sample: Sample,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> Float[Tensor, "batch num_q_heads size"]:
    """Scores (float32) of the sampled keys; NaN where a row has fewer than ``size``."""
    keys = contiguous(keys, block_table)
    size = min(sample.size, keys.shape[2])
    length = (kv_len - kv_start).clamp_min(0)
    chosen, present = reservoir(length, keys.shape[2], size, sample.seed)
    position = (chosen + kv_start[:, None]).clamp_max(max(0, keys.shape[2] - 1))
    index = position[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3]).long()
    scores, _ = exact_scores(q, keys.gather(2, index))
    scores = scores.masked_fill(~present[:, None], torch.nan)
    return torch.nn.functional.pad(scores, (0, sample.size - size), value=torch.nan)


def reservoir(length: Int[Tensor, " batch"], longest: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Positions [batch, size] of a row's sample, counted from its first token, and which of them exist."""
    position = torch.arange(longest, device=length.device)
    tag = torch.where(position < length[:, None], tags(position, seed), torch.iinfo(torch.int64).max)
    smallest = tag.topk(size, -1, largest=False)
    return smallest.indices, smallest.values != torch.iinfo(torch.int64).max


def tags(position: Int[Tensor, " n"], seed: int) -> Int[Tensor, " n"]:
    """A 62-bit hash of (seed, position): two rounds of multiply and shift, after Steele et al., SplitMix, 2014."""
    x = position + _signed(0x9E3779B97F4A7C15 * (seed + 1))
    for factor in (0xBF58476D1CE4E5B9, 0x94D049BB133111EB):
        x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _signed(factor)
    return (x ^ ((x >> 31) & 0x1FFFFFFFF)) & (2**62 - 1)


def _signed(x: int) -> int:
    """The 64-bit two's complement reading of x."""
    return (x + 2**63) % 2**64 - 2**63
