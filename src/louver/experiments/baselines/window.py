"""What the queries of a prompt attended to, for the baselines that choose tokens by it."""

import torch
from torch import Tensor

from louver.experiments.baselines.selecting import RowMask, Weights
from louver.shapes import Keys, group_heads

CHUNK_QUERIES = 64  # so that a long prompt's attention is never held as a whole


def prompt_attention(queries: Tensor, keys: Keys, valid: RowMask, softmax_scale: float) -> Weights:
    """Causal attention of the last q_len tokens' queries [batch, num_q_heads, q_len, head_dim], added up over the queries.

    Padded queries count for nothing.
    """
    kv_len, q_len = keys.shape[2], queries.shape[2]
    first = kv_len - q_len
    place = torch.arange(kv_len, device=keys.device)
    total = torch.zeros(*queries.shape[:2], kv_len, device=keys.device)
    for start in range(0, q_len, CHUNK_QUERIES):
        q = queries[:, :, start : start + CHUNK_QUERIES].float()
        positions = torch.arange(first + start, first + start + q.shape[2], device=keys.device)
        logits = (group_heads(q, keys.shape[1]) @ keys.float()[:, :, None].mT).flatten(1, 2) * softmax_scale
        seen = valid[:, None, None] & (place <= positions[:, None])
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        total += torch.where(valid[:, None, positions, None], weights, 0.0).sum(2)
    return total
