"""A step under a policy that no rule expresses: it looks at the bounds, has the best keys scored, and looks again.

Every op is asked for by the seam, so the policy works with every backend's bounds; the step is slower than one that a backend
fuses (attention/fused.py), never different in kind. What is counted as read is the union over the looks.
"""

from dataclasses import replace

import torch

from louver.attention.asked import asked_mass, everything_where
from louver.attention.dearer import dense_where_dearer
from louver.attention.fused import fused_step, with_sample
from louver.index.sketch import SketchIndex
from louver.kernels import get_ops
from louver.kernels.ops import TierOutput
from louver.kernels.reference.sample import sample_scores
from louver.kernels.reference.step import keep_the_best
from louver.protocols import Policy
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
    fused = fused_step(policy, ops, q, store.keys, values, sketch, place, keep_best, record)
    if fused is not None:
        return fused[0]
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
        step = with_sample(step, policy.sample.size)
    return step
