"""sum_reaches and all_reach: which keys' bounds reach a threshold, where bounds belong to groups of keys in every subspace."""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

Groups = Int[Tensor, "heads subspaces n"]  # int16 or int32: the group of each key
OfGroups = Float[Tensor, "heads subspaces rows groups"]


def sum_reaches(
    group: Groups, upper: OfGroups, slack: Float[Tensor, "heads rows"], tau: Float[Tensor, "heads rows"]
) -> Bool[Tensor, "heads rows n"]:
    """Whether the sum of a key's bounds over the subspaces, and slack, is not below tau."""
    return ~(add_up(group, upper) + slack[..., None] < tau[..., None])


def all_reach(
    group: Groups,
    upper: OfGroups,
    slack: Float[Tensor, "heads subspaces rows"],
    tau: Float[Tensor, "heads rows subspaces"],
) -> Bool[Tensor, "heads rows n"]:
    """Whether a key's bound and slack are below tau in no subspace."""
    inside = torch.ones(group.shape[0], upper.shape[2], group.shape[2], dtype=torch.bool, device=group.device)
    for s in range(group.shape[1]):
        inside &= ~(at_keys(group, upper, s) + slack[:, s, :, None] < tau[..., s, None])
    return inside


def add_up(group: Groups, of_groups: OfGroups) -> Float[Tensor, "heads rows n"]:
    """Sum over subspaces of what each key's groups have, always in the same order (Fagin's rule relies on it)."""
    total = at_keys(group, of_groups, 0)
    for s in range(1, group.shape[1]):
        total = total + at_keys(group, of_groups, s)
    return total


def at_keys(group: Groups, of_groups: Tensor, subspace: int) -> Shaped[Tensor, "heads rows n"]:
    """What each key's group has in one subspace."""
    index = group[:, subspace, None].long().expand(-1, of_groups.shape[2], -1)
    return of_groups[:, subspace].gather(-1, index)
