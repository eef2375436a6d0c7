"""One decode step: bounds -> policy -> cuts -> a kernel, and the evidence that comes with the result."""

from collections.abc import Callable
from dataclasses import fields, replace

import torch
from torch import Tensor

from louver.attention.dense import DenseResult, attend_everything
from louver.attention.heads import attend_by_heads, head_rules
from louver.attention.looks import attend_in_looks
from louver.attention.prepared import attend_prepared, keep_prepared
from louver.attention.retrieval import attend_retrieval
from louver.attention.within import attend_within
from louver.errors import PolicyError, ShapeError
from louver.index.sketch import SketchIndex
from louver.kernels import get_ops
from louver.kernels.cpu import native
from louver.kernels.cpu.crossover import is_short
from louver.kernels.ops import TierOutput
from louver.policies.base import Dense
from louver.policies.output_error import OutputError
from louver.policies.spec import DEFAULT_POLICY, parse
from louver.protocols import AttendResult, KeyIndex, Policy, StepStats
from louver.shapes import Keys, Query, Values, check_keys_values, check_query, check_scale, is_finite
from louver.sketch.accounting import byte_weights
from louver.sketch.layout import Sketch


def attend(
    q: Query,
    index: KeyIndex,
    values: Values | None = None,
    policy: str | Policy = DEFAULT_POLICY,
    *,
    softmax_scale: float | None = None,
    keep_best: bool = False,
    record: bool = False,
) -> AttendResult:
    """Attention of one query token per row over an index, spending precision where its bounds demand it.

    Args:
        q: [batch, num_q_heads, head_dim], float32, float16 or bfloat16.
        index: over keys [batch, num_kv_heads, kv_len, head_dim].
        values: [batch, num_kv_heads, kv_len, head_dim]; default: the index's own.
        policy: a specification such as ``"exact:0.01"`` or ``"topk:64+sinks:4"``, or a policy.
        softmax_scale: logit per score; default head_dim ** -0.5.
        keep_best: never let a retrieval policy select nothing (a model's cache asks for this).
        record: fill ``exact_mask``.

    Raises:
        ShapeError, NonFiniteError: the query does not fit the index, or is not finite.
        PolicyError: the policy needs sketched values and the index has none.
    """
    own_alone = values is None and not record
    if own_alone and isinstance(index, SketchIndex):
        done = attend_prepared(q, index, policy, softmax_scale, keep_best)
        if done is not None:
            return done
    given, policy = policy, parse(policy)
    index.refresh()
    keys, own = index.store.keys, index.store.values
    check_query(q, keys, _finite_check(index))
    q = q.resolve_neg()  # kernels read memory
    own_values = values is None or own is None
    values = own if values is None else values
    if values is None:
        raise ShapeError("attention needs values: give them to build() or to attend()")
    check_keys_values(keys, values)
    values = values.resolve_neg()
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    check_scale(scale)
    if isinstance(policy, Dense):
        return attend_everything(q, index.store, values, scale, record)
    if isinstance(index, SketchIndex):
        result = _attend_sketch(q, index, keys, values, own_values, policy, scale, keep_best, record)
        if own_alone and index.backend == "cpu" and not isinstance(result, DenseResult):
            keep_prepared(q, index, given, softmax_scale, keep_best)
        return result
    return attend_retrieval(q, index, values, policy, scale, keep_best, record)


def _finite_check(index: KeyIndex) -> Callable[[Tensor], bool]:
    return native.is_finite if isinstance(index, SketchIndex) and index.backend == "cpu" else is_finite


def attend_many(
    q: Tensor, index: SketchIndex, policy: Policy, softmax_scale: float, keep_best: bool = False, record: bool = False
) -> AttendResult:
    """Attention of the q_len tokens appended last, q [batch, num_q_heads, q_len, head_dim]; each sees the tokens up to its own.

    The result has batch * q_len rows, those of one row's tokens side by side.
    """
    check_scale(softmax_scale)
    index.refresh()
    if q.dim() != 4 or q.shape[0] != index.store.keys.shape[0]:
        batch = index.store.keys.shape[0]
        raise ShapeError(
            f"q has shape {tuple(q.shape)}; wanted [batch, num_q_heads, q_len, head_dim] with batch={batch}"
        )
    rows, q_len, kv_len = q.resolve_neg().transpose(1, 2), q.shape[2], index.store.keys.shape[2]

    def step(q: Query, seen: SketchIndex) -> AttendResult:
        keys, values = seen.store.keys, seen.store.values
        assert values is not None
        check_query(q, keys, _finite_check(seen))
        return _attend_sketch(q, seen, keys, values, True, policy, softmax_scale, keep_best, record)

    if index.backend in ("cpu", "reference"):  # a row's tokens in one step
        steps = [step(rows[i], index.tokens_of(i, q_len)) for i in range(q.shape[0])]
        return _joined(steps, torch.cat)
    steps = [step(rows[:, i], index.prefix(kv_len - q_len + 1 + i)) for i in range(q_len)]
    return _joined(steps, lambda parts: torch.stack(parts, 1).flatten(0, 1))


def _joined(results: list[AttendResult], join: Callable[[list[Tensor]], Tensor]) -> AttendResult:
    """The results of several steps of one layer as one."""
    first = results[0]
    if len(results) == 1:
        return first
    parts = {f.name: [getattr(r, f.name) for r in results] for f in fields(first) if f.name != "stats"}
    masks = parts.pop("exact_mask")
    if masks[0] is not None:
        width = max(mask.shape[2] for mask in masks)
        parts["exact_mask"] = [torch.nn.functional.pad(mask, (0, width - mask.shape[2])) for mask in masks]
    more = [r.stats.index_bytes for r in results if r.stats.index_bytes is not None]
    table, index_bytes = join([r.stats.table for r in results]), join(more) if more else None
    stats = replace(first.stats, table=table, index_bytes=index_bytes)
    return AttendResult(stats=stats, **{name: join(x) for name, x in parts.items()})


def _attend_sketch(
    q: Query,
    index: SketchIndex,
    keys: Keys,
    values: Values,
    own_values: bool,
    policy: Policy,
    scale: float,
    keep_best: bool,
    record: bool,
) -> AttendResult:
    sketch = index.sketch
    assert sketch is not None, "attend() refreshes the index first"
    if not own_values:
        # The sketch knows the index's own values; of others it knows nothing.
        sketch = replace(sketch, value_codes=None, value_spread=torch.full_like(sketch.value_spread, torch.inf))
    if not policy.drops and sketch.value_codes is None:
        raise PolicyError(
            f"policy {policy.spec!r} drops nothing, so it needs sketched values; "
            "build the index with the values it is to attend, or use a retrieval policy such as 'budget:0.05'"
        )
    ops, store, rule = get_ops(index.backend), index.store, policy.rule()
    place = (store.kv_start, store.kv_len, scale)
    rules = head_rules(policy, sketch, keys.shape[1])
    fused = rule is not None or rules is not None
    if fused and index.backend == "cpu" and is_short(keys, *place[:2]):
        return attend_everything(q, store, values, scale, record, ops.attend_dense)
    if rule is not None:
        step = ops.step(q, keys, values, sketch, rule, *place, policy.sinks, policy.recent, keep_best, record)
    elif rules is not None:
        how = (policy.sinks, policy.recent, keep_best, record)
        step = attend_by_heads(q, keys, values, sketch, rules, index.backend, *place, *how)
    elif isinstance(policy, OutputError):
        step, more = attend_within(q, index, sketch, values, policy, scale, record)
        result = result_of(step, sketch, policy)
        return replace(result, stats=replace(result.stats, index_bytes=more))
    else:
        step = attend_in_looks(q, index, sketch, values, policy, scale, keep_best, record)
    return result_of(step, sketch, policy)


def result_of(step: TierOutput, sketch: Sketch, policy: Policy) -> AttendResult:
    """What a kernel's step over a sketch is to those who asked for it."""
    weights = byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, sketch.config.frame_len)
    return AttendResult(
        out=step.out,
        lse=step.lse,
        stats=StepStats(table=step.counts, byte_weights=weights, head_dim=sketch.head_dim, drops=policy.drops),
        certificate=step.certificate,
        arithmetic_bound=step.arithmetic_bound,
        dropped_mass_bound=step.dropped_mass_bound,
        tau=step.tau,
        exact_mask=step.exact_mask,
    )
