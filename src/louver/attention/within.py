"""A step under ``error:EPS``: look, spend precision where the certificate comes from, and check what was asked.

    1. attend with the policy's first cuts: an output, its certificate, and every term of it
    2. lower the cuts where the certificate is above EPS |out|, by the terms; attend again
    3. once more, aiming lower by what was missed
    4. whoever still misses is exact everywhere, so its certificate is 0

A KV head that would read at least what dense attention reads is exact everywhere, in any pass (attention/dearer.py). Cuts only sink from
pass to pass, so the last pass reads all exact keys and values that any pass read; value codes that an earlier pass read of keys that
became exact are counted on top. What is asked is
certificate + arithmetic_bound <= EPS |out|; where arithmetic alone is more, or the output tiny, the certificate is 0 instead.
"""

import warnings
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from louver.attention.asked import everything_where
from louver.attention.dearer import blocks_of, dense_where_dearer
from louver.attention.fused import fused_step
from louver.errors import LouverWarning
from louver.index.sketch import SketchIndex
from louver.kernels import get_ops
from louver.kernels.ops import TierOutput
from louver.policies.output_error import OutputError
from louver.protocols import COUNTS, Cuts
from louver.shapes import PerQueryHead, Query, Values
from louver.sketch.accounting import value_frame_bytes
from louver.sketch.layout import Sketch

PASSES = 6  # that lower cuts by terms
FIRST_AIM = (
    2.5  # times what is allowed: heads of a group read for one another, and the terms' sum exceeds their joint maximum
)
AIM = 0.97  # of what is allowed: the output moves a little when precision is added


def attend_within(
    q: Query, index: SketchIndex, sketch: Sketch, values: Values, policy: OutputError, scale: float, record: bool
) -> tuple[TierOutput, Int[Tensor, "batch num_kv_heads"]]:
    """One decode step whose certificate is at most error |out| for every head, or 0; and the bytes that its counts don't cover."""
    store, ops = index.store, get_ops(index.backend)
    fused = fused_step(policy, ops, q, store.keys, values, sketch, (store.kv_start, store.kv_len, scale), record=record)
    if fused is not None and fused[1] is not None:
        if q.device.type == "cpu":  # elsewhere the host would wait for it
            _warn_of_arithmetic(fused[0], q, policy)
        return fused[0], fused[1]
    bounds = index.bounds(q, scale, policy.sinks, policy.recent)
    coded = torch.zeros_like(bounds.undecided)  # keys whose value code some pass has read

    def attend(cuts: Cuts, before: tuple[TierOutput, Cuts] | None = None) -> tuple[TierOutput, Cuts]:
        """The step under cuts, and the cuts it took; KV heads that keep the cuts of the pass before keep its results."""
        cuts = dense_where_dearer(cuts, bounds, sketch, False, ops)
        ops.count_tiers(bounds, cuts.unread, cuts.exact, sketch.config.frame_len, coded)
        place = (store.kv_start, store.kv_len, scale)
        same = None if before is None else (before[0], _changed(before[1], cuts, coded.shape[1]))
        step = ops.attend_tiers(
            q, store.keys, values, sketch, bounds, cuts, *place, drop=False, record=record, before=same
        )
        return step, cuts

    cuts = policy.cuts(bounds.summary)
    step, taken = attend(cuts)
    allowed = allowed_error(step, policy)
    aim = torch.full_like(allowed, FIRST_AIM)
    for _ in range(PASSES):
        if not bool((missed := ~(step.certificate <= allowed)).any()):
            break
        wanted = ops.settle(step.out, sketch, bounds, torch.where(missed, aim * allowed, torch.inf))
        cuts = _lower_where(missed, cuts, wanted)
        step, taken = attend(cuts, (step, taken))
        allowed = allowed_error(step, policy)
        reached = (allowed / step.certificate).nan_to_num(0.0, posinf=1.0).clamp(0, 1)
        aim = torch.where(reached < 1, aim * AIM * reached, aim)
    # Making one head of a group exact moves its neighbours' outputs, so look once more until nobody misses.
    while bool((missed := ~(step.certificate <= allowed_error(step, policy))).any()):
        cuts = everything_where(missed, cuts)
        step, taken = attend(cuts, (step, taken))
        if not bool((step.certificate > 0)[missed].any()) and not bool(torch.isnan(step.certificate).any()):
            continue
        break  # not finite: nothing can be promised, and the certificate says so
    _warn_of_arithmetic(step, q, policy)
    frame_len, counted = sketch.config.frame_len, dict(zip(COUNTS, step.counts.unbind(-1), strict=True))
    again = (coded.sum(-1) - counted["coarse"]) * (sketch.dims // 2)
    frames = (blocks_of(coded, frame_len) - counted["value_blocks"]) * value_frame_bytes(sketch.dims)
    return step, again + frames


def allowed_error(step: TierOutput, policy: OutputError) -> PerQueryHead:
    """The certificate that meets what was asked: error |out| less arithmetic, and no less than 0."""
    norm = step.out.double().norm(dim=-1) * (1 - 1e-5)  # rounded down, and with it the difference
    allowed = (policy.error * norm).float() - step.arithmetic_bound
    return allowed.nan_to_num(0.0, posinf=0.0, neginf=0.0).clamp_min(0)


def _warn_of_arithmetic(step: TierOutput, q: Query, policy: OutputError) -> None:
    norm = step.out.float().norm(dim=-1)
    if bool(((step.arithmetic_bound > policy.error * norm) & (norm > 0)).any()):
        warnings.warn(
            f"{policy.spec} asks for less than the arithmetic of exact attention can promise in {q.dtype} for some heads; "
            "their keys are all exact, and arithmetic_bound says what is left",
            LouverWarning,
            stacklevel=5,
        )


def _changed(before: Cuts, after: Cuts, num_kv_heads: int) -> Bool[Tensor, "batch num_kv_heads"]:
    """The KV heads of which a query head's thresholds moved."""
    moved = (before.exact != after.exact) | (before.unread != after.unread)
    return moved.unflatten(1, (num_kv_heads, -1)).any(2)


def _lower_where(missed: Tensor, cuts: Cuts, wanted: Cuts) -> Cuts:
    def lowered(name: str) -> Tensor:
        before = getattr(cuts, name)
        return torch.where(missed, torch.minimum(before, getattr(wanted, name)), before)

    return replace(cuts, **{name: lowered(name) for name in ("unread", "fine", "exact")})
