"""A step whose KV heads have policies of their own (``A/B/C``): a fused step for each run of heads with the same policy, joined.

KV heads are independent of one another, so narrowing the cache and the sketch to some of them changes nothing for those. It takes no
copy where one row owns the blocks; elsewhere the step goes through ``looks`` as any policy without a rule.
"""

from dataclasses import fields, replace
from itertools import groupby

import torch
from torch import Tensor

from louver.kernels import get_ops
from louver.kernels.ops import TierOutput
from louver.policies.per_head import PerHead
from louver.protocols import CutRule
from louver.shapes import Cache, PerRow, Query
from louver.sketch.layout import PER_BLOCK, Sketch

PER_HEAD = PER_BLOCK | {"query_weight", "value_mean"}


def head_rules(policy: object, sketch: Sketch, num_kv_heads: int) -> list[CutRule] | None:
    """The rule of every KV head, in order; None where the step can't be split by heads."""
    if not isinstance(policy, PerHead) or sketch.key_codes.shape[0] != 1:
        return None
    rules = [rule for member in policy.members if (rule := member.rule()) is not None]
    if len(rules) < len(policy.members) or num_kv_heads % len(rules):
        return None
    return [rule for rule in rules for _ in range(num_kv_heads // len(rules))]


def attend_by_heads(
    q: Query,
    keys: Cache,
    values: Cache,
    sketch: Sketch,
    rules: list[CutRule],
    backend: str,
    kv_start: PerRow,
    kv_len: PerRow,
    softmax_scale: float,
    sinks: int,
    recent: int,
    keep_best: bool,
    record: bool,
) -> TierOutput:
    """One decode step under a rule per KV head."""
    step, group_size, parts, first = get_ops(backend).step, q.shape[1] // len(rules), [], 0
    for rule, same in groupby(rules):
        here = slice(first, first := first + len(list(same)))
        part = q[:, here.start * group_size : here.stop * group_size]
        place = (kv_start, kv_len, softmax_scale, sinks, recent, keep_best, record)
        parts.append(step(part, keys[:, here], values[:, here], narrowed(sketch, here), rule, *place))
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found, 1)

    return TierOutput(**{f.name: joined(f.name) for f in fields(TierOutput)})  # pyright: ignore[reportArgumentType] - as in the parts


def narrowed(sketch: Sketch, heads: slice) -> Sketch:
    """A view of some KV heads of a sketch whose blocks have one owner."""
    return replace(sketch, **{n: x[:, heads].contiguous() for n, x in sketch.tensors() if n in PER_HEAD})
