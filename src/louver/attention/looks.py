"""A step under a policy that no rule expresses: it looks at the bounds, has the best keys scored, and looks again.

Every op is asked for by the seam, so the policy works with every backend's bounds; the step is slower than one that a backend
fuses, never different in kind. What is counted as read is the union over the looks.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from louver.attention.asked import asked_mass, everything_where
from louver.attention.dearer import dense_where_dearer
from louver.index.sketch import SketchIndex
from louver.kernels import get_ops
from louver.kernels.ops import TierOutput
from louver.kernels.reference.sample import sample_scores
from louver.kernels.reference.step import keep_the_best
from louver.policies.mass import Mass
from louver.policies.relative import Relative
from louver.policies.sampled import Sampled
from louver.policies.union import Union
from louver.protocols import COUNTS, Policy
from louver.shapes import Query, Values
from louver.sketch.layout import Sketch


def attend_in_looks(
    q: Query,
    index: SketchIndex,
    sketch: Sketch,
    values: Values,
    policy: Policy,
    scale: float,
    keep_best: bool,
    record: bool,
) -> TierOutput:
    """One decode step. A dropped mass that was asked for is met in any case: a head that could not is attended exactly, with its group.

    So is a KV head whose mass would cost at least what dense attention reads (attention/dearer.py).
    """
    store, ops = index.store, get_ops(index.backend)
    place = (store.kv_start, store.kv_len, scale)
    fused = getattr(ops, "attend_in_looks", None)
    if fused is not None and (wanted := wanted_by(policy)) is not None:
        tau = torch.full(q.shape[:2], wanted.get("tau", torch.inf), device=q.device)
        if policy.sample is not None:
            sample_of = getattr(ops, "sample_scores", sample_scores)
            sample = sample_of(q, store.keys, *place[:2], policy.sample)
            tau = torch.minimum(tau, _sampled_tau(policy, sample))
        if policy.sample is not None or "tau" in wanted:
            wanted["tau"] = tau
        if keep_best:
            wanted["count"] = max(1, wanted.get("count", 0))
        done = fused(q, store.keys, values, sketch, wanted, *place, policy.sinks, policy.recent, record)
        if done is not None:
            return done if policy.sample is None else _with_sample(done, policy.sample.size)
    bounds = index.bounds(q, scale, policy.sinks, policy.recent)
    if policy.sample is not None:
        sample = sample_scores(q, store.keys, store.kv_start, store.kv_len, policy.sample)
        bounds = replace(bounds, summary=replace(bounds.summary, sample=sample))
    summary = bounds.summary
    cuts, scored = policy.cuts(summary), torch.full_like(summary.shift, torch.inf)
    for look in range(1, policy.looks):
        last = look == policy.looks - 1
        scored = torch.minimum(scored, cuts.exact if last else cuts.fine)
        summary = ops.tighten(q, store.keys, bounds, scored, *place, retire=last)
        cuts = policy.cuts(replace(summary, sample=bounds.summary.sample))
    if policy.looks > 1:
        cuts = replace(cuts, unread=scored)
    if keep_best:
        cuts = keep_the_best(cuts, summary)
    asked = asked_mass(policy)
    if asked is not None:
        cuts = dense_where_dearer(cuts, bounds, sketch, policy.drops, ops)
    step = ops.attend_tiers(q, store.keys, values, sketch, bounds, cuts, *place, policy.drops, record)
    if asked is not None and bool((failed := ~(step.dropped_mass_bound <= asked)).any()):
        group = failed.shape[1] // bounds.undecided.shape[1]
        shared = (
            failed.unflatten(1, (-1, group)).any(2).repeat_interleave(group, 1)
        )  # all of it is read: let all heads have it
        cuts = everything_where(shared, cuts)
        step = ops.attend_tiers(q, store.keys, values, sketch, bounds, cuts, *place, policy.drops, record)
    if policy.sample is not None:
        step = _with_sample(step, policy.sample.size)
    return step


def wanted_by(policy: Policy) -> dict[str, Any] | None:
    """What a dropping policy asks for, as the arguments of a backend's own ``attend_in_looks``; None where they can't say it.

    The estimate of a sampled policy is not among them: it is a score, and known only once the sample is.
    """
    if isinstance(policy, Union):
        found = [wanted_by(member) for member in policy.members]
        if any(x is None for x in found) or not policy.drops:
            return None
        merged: dict[str, Any] = {}
        for name, lower in (("share", max), ("count", max), ("nats", max), ("dropped_mass", min), ("tau", min)):
            asked = [x[name] for x in found if x is not None and name in x]
            if asked:
                merged[name] = lower(asked)
        return merged
    if isinstance(policy, Mass):
        return {"dropped_mass": policy.dropped_mass}
    if isinstance(policy, Relative):
        return {"nats": policy.nats}
    if isinstance(policy, Sampled):
        return {}
    rule = policy.rule()
    if rule is None or not policy.drops:
        return None
    return {"tau": rule.tau} if rule.tau is not None else {"share": rule.share, "count": rule.count}


def _sampled_tau(policy: Policy, sample: Tensor) -> Tensor:
    members = policy.members if isinstance(policy, Union) else (policy,)
    return torch.stack([m.threshold(sample) for m in members if isinstance(m, Sampled)]).amin(0)


def _with_sample(step: TierOutput, size: int) -> TierOutput:
    """The step, with the keys of a sample among those it scanned."""
    counts = step.counts.clone()
    counts[..., COUNTS.index("scanned")] += counts[..., COUNTS.index("keys")].clamp_max(size)
    return replace(step, counts=counts)
