"""How far exact attention itself may be from real arithmetic: the part of an error that no policy can spend."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.geometry.rounding import UNIT_OF, gamma, logit_slack
from louver.shapes import Keys, PerQueryHead, Query, Values

SMALLEST_NORMAL = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def attention_arithmetic(
    q: Query, keys: Keys, values: Values, softmax_scale: float, num_terms: Int[Tensor, "batch num_q_heads"]
) -> PerQueryHead:
    """Bound on |computed - real| for softmax attention over num_terms keys per head, accumulated in float32.

    Each logit is off by at most d nats, so each weight by a factor e^d, which moves the output by at most
    (e^(2d) - 1) 2 max|v|; the sums add 2 gamma(n) max|v|, the output's dtype one rounding.
    """
    group_size = q.shape[1] // keys.shape[1]
    reach = q.float().norm(dim=-1) * _largest_norm(keys, group_size) * (1 + 1e-5)
    off = 1.01 * softmax_scale * gamma(q.shape[2] + 2) * reach + logit_slack(2 * softmax_scale * reach)
    largest = _largest_norm(values, group_size) * (1 + 1e-5)
    sums = 2 * gamma(num_terms.double().clamp_min(1) + 8).float()
    tiny = q.shape[2] ** 0.5 * SMALLEST_NORMAL[q.dtype] * UNIT_OF[q.dtype]
    return torch.expm1(2 * off) * 2 * largest + (sums + UNIT_OF[q.dtype]) * largest + tiny


def _largest_norm(x: Tensor, group_size: int) -> Float[Tensor, "batch num_q_heads"]:
    norm = torch.nan_to_num(x.float()).norm(dim=-1)
    largest = norm.amax(-1) if norm.shape[-1] else norm.new_zeros(norm.shape[:-1])
    return largest.repeat_interleave(group_size, 1)
