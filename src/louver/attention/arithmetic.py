"""How far exact attention itself may be from real arithmetic: the part of an error that no policy can spend."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from louver.geometry.rounding import UNIT_OF, gamma, logit_slack, norm_above
from louver.shapes import Keys, PerQueryHead, Query, Values

Valid = Bool[Tensor, "batch kv_len"]  # False: padding
SMALLEST_NORMAL = {torch.float16: 2.0**-14, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}


def attention_arithmetic(
    q: Query,
    keys: Keys,
    values: Values,
    softmax_scale: float,
    num_terms: Int[Tensor, "batch num_q_heads"],
    valid: Valid | None = None,
    out: Query | None = None,
) -> PerQueryHead:
    """Bound on |computed - real| for softmax attention over num_terms keys per head, accumulated in float32.

    Each logit is off by at most d nats, so each weight by a factor e^d, which moves the output by at most
    (e^(2d) - 1) 2 max|v|; the sums add 2 gamma(n) max|v|, the output's dtype one rounding. A fused kernel also rounds each weight
    to the dtype of q before it multiplies the values, and where it is subnormal there the error is absolute. +inf where a valid
    key or value is not finite, or ``out``, which may have overflowed its dtype.
    """
    group_size = q.shape[1] // keys.shape[1]
    off = logit_error(q, keys, softmax_scale, valid)
    largest = largest_norm(values, group_size, valid)
    num_terms = num_terms.double()
    unit, tiny = UNIT_OF[q.dtype], SMALLEST_NORMAL[q.dtype] * UNIT_OF[q.dtype]
    sums = (2 * gamma(num_terms + 8) + num_terms * tiny).float()
    weights = 0.0 if q.dtype == torch.float32 else 2 * unit
    bound = (2 * torch.expm1(2 * off) * (1 + weights) + sums + weights + unit) * largest
    if out is not None:
        bound = torch.where(torch.isfinite(out).all(-1), bound, torch.inf)
    return torch.where(num_terms > 0, bound * (1 + 1e-5) + q.shape[2] ** 0.5 * tiny, 0.0)  # of nothing, exactly 0


def logit_error(q: Query, keys: Keys, softmax_scale: float, valid: Valid | None = None) -> PerQueryHead:
    """Largest error of a logit less the shift, and of its exponential, in nats, for any valid key of the cache."""
    reach = norm_above(q.float()) * largest_norm(keys, q.shape[1] // keys.shape[1], valid)
    return 1.01 * softmax_scale * gamma(q.shape[2] + 8) * reach + logit_slack(2 * softmax_scale * reach)


def largest_norm(x: Tensor, group_size: int, valid: Valid | None = None) -> Float[Tensor, "batch num_q_heads"]:
    """At least the norm of every valid key or value (default: all) of a query head's KV head; 0 where there are none.

    +inf where one is not finite.
    """
    norm = torch.nan_to_num(norm_above(x.float()), nan=torch.inf, posinf=torch.inf)
    if valid is not None:
        norm = torch.where(valid[:, None], norm, 0.0)
    largest = norm.amax(-1) if norm.shape[-1] else norm.new_zeros(norm.shape[:-1])
    return largest.repeat_interleave(group_size, 1)
