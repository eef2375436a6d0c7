"""Metrics: the space in which a residual radius is taken. The choice changes speed, never results.

For any positive weights w, |q . e| <= |q / w| |w e| (Cauchy-Schwarz in the space scaled by w). A key's residual e is known
when it is encoded, the query is not, so the best w balances the two: w_d = (E[q_d^2] / E[e_d^2])^(1/4) minimises the expected
product. Inside a frame the residual of channel d is proportional to the frame's scale, which gives a metric per block
for no storage at all (``frame``): w_d^2 = rms(q_d) / scale_d.

Louver stores ``query_weight`` = 1 / rms(q_d) and works with the squared inverse u_d = 1 / w_d^2 = scale_d * query_weight_d.
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from louver.shapes import group_heads

Metric = Literal["frame", "diagonal", "identity"]
SMALLEST_SHARE = 1e-3  # a channel no query used still gets this share of the mean energy, so weights stay finite


def query_weight(
    queries: Float[Tensor, "batch num_q_heads q_len head_dim"], num_kv_heads: int, valid: Tensor | None = None
) -> Float[Tensor, "batch num_kv_heads head_dim"]:
    """1 / rms of each query channel over a KV head's group, from a prompt's queries.

    valid is bool [batch, q_len], False where the token is padding. Queries that are not finite are ignored.
    """
    energy = group_heads(_energy(queries, valid), num_kv_heads).sum(2)
    mean = energy.mean(-1, keepdim=True)
    energy = energy / torch.where(mean > 0, mean, 1.0)
    energy = torch.where(mean > 0, energy, 1.0) + SMALLEST_SHARE
    return energy.rsqrt()


def _energy(queries: Tensor, valid: Tensor | None) -> Float[Tensor, "batch num_q_heads head_dim"]:
    """Sums of squares over the valid tokens; NaN and infinity count as 0, and nothing as more than 1e12."""
    if not queries.is_cuda and (valid is None or bool(valid.all())):
        energy = queries.float().square().sum(2)
        if bool((energy <= 1e24).all()):  # so no channel exceeds 1e12, and none is NaN: one pass was enough
            return energy
    x = torch.nan_to_num(queries.float(), nan=0.0, posinf=0.0, neginf=0.0).clamp(-1e12, 1e12)
    return (x if valid is None else x * valid[:, None, :, None]).square().sum(2)


def inverse_weight(
    scale: Float[Tensor, "*blocks head_dim"], weight: Float[Tensor, "*#blocks head_dim"], metric: Metric
) -> Float[Tensor, "*blocks head_dim"]:
    """u_d = 1 / w_d^2 for each channel of each block, from the frame's scale and the stored query weight."""
    if metric == "frame":
        return scale * weight
    if metric == "diagonal":
        return weight.expand_as(scale)
    return torch.ones_like(scale)
