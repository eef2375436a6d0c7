"""The CPU's fused step, kept ready with its index: between two steps of a model only the query and a token are new.

What a step follows from is looked at before each: the same policy and arguments, the same objects (buffers, the sketch and its tensors),
the same switches. Where rows begin and end, and what is encoded, the compiled step reads anew (csrc/bindings_prepared.cpp). Where anything
differs, and where a query is not what was prepared for, the step goes the long way, which finds out and says so; so do records, foreign
values, several tokens, policies without a rule, and whatever is attended densely.
"""

from collections.abc import Callable
from typing import Any
from weakref import ref

import torch

from louver.attention.packed import Form, PackedResult, form_of
from louver.index.sketch import SketchIndex
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


class Prepared:
    """One step, and what it follows from, as it was when the step was taken the long way."""

    __slots__ = ("backend", "dispatch", "form", "isa", "keys", "policy", "step", "values", "view")

    def __init__(self, policy: str | Policy, index: Any, form: Form) -> None:
        store = index.store
        self.policy = policy  # as it was given: while it is held, nothing else has its id
        self.backend, self.view = index.backend, native.sketch_view(index.sketch)
        self.keys, self.values = ref(store._keys), ref(store._values)  # not to keep old buffers
        self.isa, self.dispatch = native.isa, crossover.enabled
        self.form = form
        self.step: Callable[..., Any] | None = None  # asked for once so far

    def stands(self, index: Any) -> bool:
        """Whether all of it is as it was. Fields of others, not their properties: between two layers each call takes 5 µs."""
        store = index.store
        try:
            return (
                index.sketch._native_view is self.view  # gone when a tensor of the sketch was replaced
                and store._keys is not None
                and store._keys is self.keys()
                and store._values is not None
                and store._values is self.values()
                and index._seen == store.history.count  # else it has tokens to forget
                and index.backend is self.backend
                and native.isa is self.isa
                and crossover.enabled is self.dispatch
            )
        except AttributeError:  # nothing is sketched
            return False


def attend_prepared(
    q: Query, index: SketchIndex, policy: str | Policy, softmax_scale: float | None, keep_best: bool
) -> AttendResult | None:
    """The step, if it is ready; None: it is not, and nothing happened."""
    try:
        held = index.prepared.get((policy if type(policy) is str else id(policy), softmax_scale, keep_best))
        if held is None or held.step is None or not q.is_cpu or not held.stands(index):
            return None
        given = share(q)
    except (AttributeError, BufferError, RuntimeError, TypeError):  # no tensor with an address, or no number
        return None
    store: Any = index.store
    kept = store.parts()  # while the step reads them: another thread may give the store others
    done = held.step(given, len(store), *[x.data_ptr() for x in kept], torch.get_num_threads())
    return None if done is None else PackedResult(done[1], held.form, tensor_of(done[0]))


def keep_prepared(
    q: Query, index: SketchIndex, policy: str | Policy, softmax_scale: float | None, keep_best: bool
) -> None:
    """Get ready for more steps like the one just taken: at the second, for one alone would not pay."""
    parsed, sketch, store = parse(policy), index.sketch, index.store
    rule = parsed.rule() if isinstance(parsed, BasePolicy) else None  # frozen, so the rule stays
    plain = softmax_scale is None or isinstance(softmax_scale, float)
    if rule is None or sketch is None or sketch.pages is not None or not plain or not isinstance(store, DeviceStore):
        return
    key = (policy if type(policy) is str else id(policy), softmax_scale, keep_best)
    before = index.prepared.get(key)
    keys, values = store.whole
    weights = byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, sketch.config.frame_len)
    form = form_of(parts_of(q, keys.shape[1]), weights, sketch.head_dim, parsed.drops)[0]
    now = Prepared(policy, index, form)
    if before is not None and before.form == form and before.stands(index):
        scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
        ends = (parsed.sinks, parsed.recent, keep_best)
        now.step = prepare(q, keys, values, sketch, rule, store.kv_start, scale, *ends)
    if len(index.prepared) >= MOST:
        index.prepared.clear()
    index.prepared[key] = now
