"""merge: combine partial attention outputs over disjoint sets of keys."""

import torch
from jaxtyping import Float
from torch import Tensor


def merge(
    outs: Float[Tensor, "parts batch num_q_heads head_dim"], lses: Float[Tensor, "parts batch num_q_heads"]
) -> tuple[Float[Tensor, "batch num_q_heads head_dim"], Float[Tensor, "batch num_q_heads"]]:
    """out = sum_i e^(lse_i - lse) out_i with lse = log sum_i e^(lse_i); a part with lse = -inf does not count.

    lse is float32; out keeps the dtype of outs. All parts empty gives zeros and -inf.
    """
    lse = torch.logsumexp(lses.float(), 0)
    weight = torch.exp(lses.float() - torch.where(torch.isneginf(lse), 0.0, lse))
    parts = torch.where(weight[..., None] > 0, outs.float(), 0.0)
    return (weight[..., None] * parts).sum(0).to(outs.dtype), lse
