"""What a policy promises of a step beyond its threshold, and what happens where a step can't keep it: everything is exact."""

from dataclasses import replace

import torch
from torch import Tensor

from louver.kernels.ops import TierOutput
from louver.policies.mass import Mass
from louver.policies.output_error import OutputError
from louver.policies.union import Union
from louver.protocols import AttendResult, Cuts, Policy


def asked_mass(policy: Policy) -> float | None:
    """The share of the mass a policy certifies to drop at most; None where it certifies none."""
    if isinstance(policy, Mass):
        return policy.dropped_mass
    if isinstance(policy, Union):
        return min((x for m in policy.members if (x := asked_mass(m)) is not None), default=None)
    return None


def everything_where(failed: Tensor, cuts: Cuts) -> Cuts:
    """Cuts that treat every key of the failed heads exactly."""

    def lowered(cut: Tensor) -> Tensor:
        return torch.where(failed, -torch.inf, cut)

    return replace(cuts, unread=lowered(cuts.unread), fine=lowered(cuts.fine), exact=lowered(cuts.exact))


def num_asked_violations(policy: Policy, result: AttendResult | TierOutput) -> int:
    """Query heads whose certificate exceeds what the policy asks for: of a mass, or of an output error."""
    asked = asked_mass(policy)
    count = 0 if asked is None else int((~(result.dropped_mass_bound <= asked)).sum())
    if isinstance(policy, OutputError):
        allowed = policy.error * result.out.double().norm(dim=-1)
        certified = result.certificate.double() + result.arithmetic_bound.double() <= allowed
        count += int((~(certified | (result.certificate == 0))).sum())
    return count
