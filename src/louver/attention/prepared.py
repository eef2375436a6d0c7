"""The CPU's fused step, kept ready with its index: between two steps of a model only the query and a token are new.

What a step follows from is looked at before each: the same policy and arguments, the same objects (``standing``: the store and its
buffers, the sketch and its tensors), the same switches. What the host changes within those (where rows begin and end, what is encoded)
the compiled step reads anew. Where anything differs, and where a query is not what was prepared for, the step goes the long way,
which finds out and says so; so do records, foreign values, several tokens, policies without a rule, and whatever is attended densely.
"""

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple
from weakref import ref

import torch

from louver.attention.packed import Form, PackedResult, form_of
from louver.index.sketch import SketchIndex, standing
from louver.kernels import crossover
from louver.kernels.cpu import native
from louver.kernels.cpu.native import share
from louver.kernels.cpu.prepared import parts_of, prepare, tensor_of
from louver.kv.device import DeviceStore
from louver.policies.base import BasePolicy
from louver.policies.spec import parse
from louver.protocols import AttendResult, Policy
from louver.shapes import Query
from louver.sketch.accounting import byte_weights

MOST = 8  # policies and arguments that an index is kept ready for


class Prepared(NamedTuple):
    """One step, and what it follows from."""

    policy: str | Policy  # as it was given: while it is held, nothing else has its id
    standing: list
    buffers: tuple[ref, ref]  # the keys' and values', which may be given back while the step is kept
    switches: tuple[str, bool]
    step: Callable[..., Any] | None  # None: asked for once so far
    form: Form


def attend_prepared(
    q: Query, index: SketchIndex, policy: str | Policy, softmax_scale: float | None, keep_best: bool
) -> AttendResult | None:
    """The step, if it is ready; None: it is not, and nothing happened."""
    held = index.prepared.get((policy if type(policy) is str else id(policy), softmax_scale, keep_best))
    if held is None or held.step is None or not _stands(held, index):
        return None
    store: Any = index.store
    try:
        given = share(q)
    except (BufferError, RuntimeError, TypeError):  # no tensor with an address
        return None
    done = held.step(given, len(store), *store.addresses(), torch.get_num_threads())
    return None if done is None else PackedResult(done[1], held.form, tensor_of(done[0]))


def keep_prepared(
    q: Query, index: SketchIndex, policy: str | Policy, softmax_scale: float | None, keep_best: bool
) -> None:
    """Get ready for more steps like the one just taken: at the second, for one alone would not pay."""
    parsed, sketch, store = parse(policy), index.sketch, index.store
    rule = parsed.rule() if isinstance(parsed, BasePolicy) else None  # frozen, so the rule stays
    plain = softmax_scale is None or type(softmax_scale) is float
    if rule is None or sketch is None or sketch.pages is not None or not plain or not isinstance(store, DeviceStore):
        return
    *now, keys, values = standing(index)
    if keys is None or values is None:
        return
    key = (policy if type(policy) is str else id(policy), softmax_scale, keep_best)
    held = index.prepared.get(key)
    weights = byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, sketch.config.frame_len)
    form, _ = form_of(parts_of(q, keys.shape[1]), weights, sketch.head_dim, parsed.drops)
    step = None
    if held is not None and held.form == form and _stands(held, index):
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        place = (store.kv_start, scale, parsed.sinks, parsed.recent, keep_best)
        step = prepare(q, keys, values, sketch, rule, *place)
    if len(index.prepared) >= MOST:
        index.prepared.clear()
    switches = (native.isa, crossover.enabled)
    index.prepared[key] = Prepared(policy, now, (ref(keys), ref(values)), switches, step, form)


def _stands(held: Prepared, index: SketchIndex) -> bool:
    """Whether all that the step follows from is as it was."""
    try:
        *now, keys, values = standing(index)
    except AttributeError:  # another kind of store, or nothing sketched
        return False
    return (
        all(map(is_, held.standing, now))
        and held.buffers[0]() is keys
        and held.buffers[1]() is values
        and held.switches == (native.isa, crossover.enabled)
    )
