"""resolve: from histograms and a rule to thresholds. Pure tensor code, no shape that depends on data."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.protocols import BoundSummary, CutRule, Cuts


def resolve(rule: CutRule, summary: BoundSummary) -> Cuts:
    """The thresholds a rule stands for under this step's bounds."""
    if rule.drop and rule.tau is not None:
        tau = torch.full_like(summary.shift, rule.tau)
        return Cuts(unread=tau, fine=tau, exact=tau)
    need = keys_needed(rule, summary)
    enough = edge_above_which(summary.upper_count, need, summary.edges)
    if rule.drop:
        # The need-th largest lower bound: no member of the true top can be below it.
        tau = edge_above_which(summary.lower_count, need, summary.edges)
        return Cuts(unread=tau, fine=torch.maximum(enough, tau), exact=tau, rank=need)
    mass_floor = summary.decided_mass + summary.lower_mass.sum(-1)
    below = summary.upper_mass.flip(-1).cumsum(-1).flip(-1)  # mass of the bins from i on
    read_bins = (below > rule.unread_mass * mass_floor[..., None]).sum(-1, keepdim=True)
    unread = torch.minimum(summary.edges.gather(-1, read_bins)[..., 0], enough)
    return Cuts(unread=unread, fine=enough, exact=enough)


def keys_needed(rule: CutRule, summary: BoundSummary) -> Int[Tensor, "batch num_q_heads"]:
    """max(1, ceil(share * valid keys), count) per query head, int64."""
    share = (summary.num_keys.double() * rule.share - 1e-9).ceil().long().clamp_min(max(1, rule.count))
    return share[:, None].expand(summary.shift.shape)


def edge_above_which(
    count: Int[Tensor, "batch num_q_heads bins"],
    need: Int[Tensor, "batch num_q_heads"],
    edges: Float[Tensor, "batch num_q_heads bins_plus_1"],
) -> Float[Tensor, "batch num_q_heads"]:
    """The highest edge with at least need keys at or above it; -inf where there are fewer."""
    full_bins = (count.cumsum(-1) < need[..., None]).sum(-1, keepdim=True)
    return edges.gather(-1, (full_bins + 1).clamp_max(edges.shape[-1] - 1))[..., 0]
