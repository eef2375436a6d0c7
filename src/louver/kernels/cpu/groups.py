"""sum_reaches and all_reach: native twins of the reference's ops."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from louver.kernels.cpu import native
from louver.kernels.cpu.native import share
from louver.kernels.reference.groups import Groups, OfGroups


def sum_reaches(
    group: Groups, upper: OfGroups, slack: Float[Tensor, "heads rows"], tau: Float[Tensor, "heads rows"]
) -> Bool[Tensor, "heads rows n"]:
    """Whether a key's bounds reach tau in their sum; see louver.kernels.reference.sum_reaches."""
    return _reach(group, upper, slack, tau, False)


def all_reach(
    group: Groups,
    upper: OfGroups,
    slack: Float[Tensor, "heads subspaces rows"],
    tau: Float[Tensor, "heads rows subspaces"],
) -> Bool[Tensor, "heads rows n"]:
    """Whether a key's bounds reach tau in every subspace; see louver.kernels.reference.all_reach."""
    return _reach(group, upper, slack, tau, True)


def _reach(group: Groups, upper: OfGroups, slack: Tensor, tau: Tensor, everywhere: bool) -> Tensor:
    out = torch.empty(group.shape[0], upper.shape[2], group.shape[2], dtype=torch.bool)
    parts = (x.contiguous() for x in (group, upper, slack, tau))
    native.load().groups_reach(
        *(share(x) for x in parts), everywhere, share(out.view(torch.uint8)), native.num_threads(), native.isa
    )
    return out
