"""A step under a policy that a backend follows in a fixed sequence of its own launches: the host decides nothing, so it can be captured.

Every backend follows a rule (``step``). One that has ``attend_within`` follows an asked error too, one that has ``attend_mass`` a share of the
mass, and one that has ``attend_in_looks`` whatever can be said as a union of: so many scores, a distance from the best, a share of the
mass, a score.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from louver.kernels.ops import TierOutput
from louver.kernels.reference.sample import sample_scores
from louver.policies.mass import Mass
from louver.policies.output_error import FIRST, OutputError
from louver.policies.relative import Relative
from louver.policies.sampled import Sampled
from louver.policies.union import Union
from louver.protocols import COUNTS, Policy
from louver.shapes import Cache, PerRow, Query
from louver.sketch.layout import Sketch


def follows(policy: Policy, ops: ModuleType) -> bool:
    """Whether a backend follows a policy without waiting for the host, for the shapes that its kernels serve."""
    if policy.rule() is not None:
        return True
    if isinstance(policy, OutputError):
        return hasattr(ops, "attend_within")
    if isinstance(policy, Mass) and hasattr(ops, "attend_mass"):
        return True
    return hasattr(ops, "attend_in_looks") and wanted_by(policy) is not None


def fused_step(
    policy: Policy,
    ops: ModuleType,
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    place: tuple[PerRow, PerRow, float],
    keep_best: bool = False,
    record: bool = False,
) -> tuple[TierOutput, Tensor | None] | None:
    """One decode step, and bytes per row and KV head that its counts don't cover; None where the backend doesn't follow.

    place: kv_start, kv_len, softmax_scale.
    """
    ends, rule = (policy.sinks, policy.recent), policy.rule()
    if rule is not None:
        return ops.step(q, keys, values, sketch, rule, *place, *ends, keep_best, record), None
    if not follows(policy, ops):
        return None
    if isinstance(policy, OutputError):
        return ops.attend_within(q, keys, values, sketch, FIRST, policy.error, *place, *ends, record)
    if isinstance(policy, Mass) and hasattr(ops, "attend_mass"):
        return ops.attend_mass(q, keys, values, sketch, policy.dropped_mass, *place, *ends, keep_best, record), None
    wanted = wanted_by(policy)
    assert wanted is not None, "follows() said so"
    if policy.sample is not None or "tau" in wanted:
        tau = torch.full(q.shape[:2], wanted.get("tau", torch.inf), dtype=torch.float32, device=q.device)
        if policy.sample is not None:
            sample = getattr(ops, "sample_scores", sample_scores)(q, keys, *place[:2], policy.sample)
            for member in members_of(policy):
                tau = torch.minimum(tau, member.threshold(sample)) if isinstance(member, Sampled) else tau
        wanted["tau"] = tau
    if keep_best and not wanted.keys() & {"nats", "dropped_mass"}:  # those keep it anyway
        wanted["count"] = max(1, wanted.get("count", 0))
    step = ops.attend_in_looks(q, keys, values, sketch, wanted, *place, *ends, record)
    if step is None:
        return None
    return (step if policy.sample is None else with_sample(step, policy.sample.size)), None


def members_of(policy: Policy) -> Iterator[Policy]:
    """The policies that a union consists of, unions within it included; of another policy, itself."""
    if isinstance(policy, Union):
        for member in policy.members:
            yield from members_of(member)
    else:
        yield policy


def wanted_by(policy: Policy) -> dict[str, Any] | None:
    """What a dropping policy asks for, as a backend's ``attend_in_looks`` takes it; None where that can't say it.

    The estimate of a sampled policy is not among it: it is a score, known once the sample is.
    """
    if not policy.drops:
        return None
    if isinstance(policy, Mass):
        return {"dropped_mass": policy.dropped_mass}
    if isinstance(policy, Relative):
        return {"nats": policy.nats}
    if isinstance(policy, Sampled):
        return {}
    if isinstance(policy, Union):
        found = [wanted_by(member) for member in policy.members]
        merged: dict[str, Any] = {}
        for wanted in found:
            if wanted is None:
                return None
            for name, asked in wanted.items():
                lowest = min if name in ("dropped_mass", "tau") else max
                merged[name] = lowest(merged.get(name, asked), asked)
        return merged
    rule = policy.rule()
    if rule is None:
        return None
    return {"tau": rule.tau} if rule.tau is not None else {"share": rule.share, "count": rule.count}


def with_sample(step: TierOutput, size: int) -> TierOutput:
    """The step, with the keys of a sample among those it scanned."""
    counts = step.counts.clone()
    counts[..., COUNTS.index("scanned")] += counts[..., COUNTS.index("keys")].clamp_max(size)
    return replace(step, counts=counts)
