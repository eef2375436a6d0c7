"""Single-token steps of a layer as replays of CUDA graphs, captured on the way: for the host a step is two launches and three copies.

    append    the new key and value, copied to where a graph expects them; the graph writes them behind the last token
    attend    the query likewise; the graph runs the policy's step over what the clock counts; output and evidence are copied out

A graph repeats addresses, shapes and whatever the host decided. So what all of them follow from is a key, looked at before every replay: the
same key twice and a third time, and the step is captured; another key, and the graph is dropped. Between steps a cache may be cropped, its
rows moved, its buffers grown, another thread or stream take over: the key says so, or the clock is set anew. What has no key (several
tokens, a prompt, a recorded step, a capture that is under way) is launched as ever, and gives the same bits. Where a layer's device is not
the current one, as in a model spread over several, it is made so for the look, the copies and the replay.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable
from weakref import ref

import torch
from torch import Tensor

from louver.attention.fused import follows, fused_step
from louver.attention.packed import Form, PackedResult, pack
from louver.errors import BackendError, LouverWarning
from louver.index.sketch import SketchIndex
from louver.kernels import get_ops, resolve_backend
from louver.kv.clock import Clock
from louver.kv.device import DeviceStore
from louver.protocols import AttendResult, KeyIndex, Policy
from louver.shapes import Keys, Query, Values
from louver.sketch.accounting import byte_weights
from louver.sketch.layout import Sketch

R = TypeVar("R")
K = TypeVar("K")
T = TypeVar("T")
LAUNCHED = 2  # steps of a key before it is captured: a capture takes as long as a few


@runtime_checkable
class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Launch it."""
        ...


Copying = Callable[
    [Sequence[Tensor], Sequence[Tensor]], None
]  # (into, given): one launch; tensors of one shape and dtype


@runtime_checkable
class Graphs(Protocol):
    """A backend's way to capture (kernels/triton/graphs.py)."""

    def on(self, device: torch.device) -> AbstractContextManager:
        """The device as the current one. What follows, and replays, ask for that."""
        ...

    def place(self, device: torch.device) -> Any:
        """Where launches go, hashable; None where nothing can be replayed."""
        ...

    def stays(self, at: Any) -> bool:
        """Whether ``place`` would say this again: no, if its device is not the current one. Asked twice a layer, so quick."""
        ...

    def copying(self, at: Any) -> Copying:
        """What copies tensors there; a BackendError where it can't be compiled."""
        ...

    def decided(self, tokens: int) -> tuple[int, Hashable]:
        """What the host decides of a step by its length: up to how many tokens it stays so, and by which switches."""
        ...

    def serves(self, q: Tensor, sketch: Sketch, keys: Tensor, values: Tensor) -> bool:
        """Whether kernels take these shapes."""
        ...

    def capture(self, body: Callable[[], Any], at: Any) -> tuple[Graph, Any]:
        """Call body, then capture what it launches; the graph, and the tensors that replays write."""
        ...


class Buffers:
    """Where the tokens of a store are: the same objects, or another key. Not held, for they are most of a card's memory."""

    __slots__ = ("_keys", "_values")

    def __init__(self, store: DeviceStore) -> None:
        keys, values = store.buffers
        self._keys, self._values = ref(keys), ref(values)

    def are(self, store: DeviceStore) -> bool:
        """Whether they are the store's."""
        keys = store._keys
        return keys is not None and keys is self._keys() and store._values is self._values()


class AppendKey(NamedTuple):
    """What an append follows from."""

    at: Any
    buffers: Buffers

    def stands(self, graphs: Graphs, store: DeviceStore) -> bool:
        return graphs.stays(self.at) and self.buffers.are(store)


class AttendKey(NamedTuple):
    """What an attend follows from, by identity where that will do: fields of others, not properties, which take 5 µs between two layers."""

    at: Any
    buffers: Buffers
    kv_start: Tensor
    sketch: ref[Sketch]
    version: int
    decided: tuple[int, Hashable]
    policy: Policy
    softmax_scale: float
    query: tuple[torch.Size, torch.dtype, torch.device]

    def stands(
        self, graphs: Graphs, q: Query, store: Any, sketch: Sketch, policy: Policy, softmax_scale: float
    ) -> bool:
        return (
            self.sketch() is sketch
            and sketch.version == self.version
            and store._kv_start is self.kv_start
            and self.buffers.are(store)
            and graphs.stays(self.at)
            and graphs.decided(store._len) == self.decided
            and (policy is self.policy or policy == self.policy)
            and softmax_scale == self.softmax_scale
            and (q.shape, q.dtype, q.device) == self.query
        )


class Slot(Generic[K, T]):
    """One captured sequence, with the key it was captured under."""

    def __init__(self) -> None:
        self.held: T | None = None
        self.key: K | None = None
        self._steps = 0

    def begin(self, key: K) -> None:
        """Another key, asked for the first time."""
        self.held, self.key, self._steps = None, key, 1

    def again(self, make: Callable[[], T | None] | None) -> T | None:
        """What make gave for the key, made once that was asked for LAUNCHED times; None before, and where it gave nothing.

        make is None where it is too early for it; it is then made a step later.
        """
        if self._steps < LAUNCHED:
            self._steps += 1
        elif self._steps == LAUNCHED and make is not None:
            self._steps += 1
            self.held = make()
        return self.held


class Appending(NamedTuple):
    """A captured append: it reads ``new`` and moves ``clock`` on."""

    graph: Graph
    new: list[Tensor]
    clock: Clock
    copy: Copying


class Attending(NamedTuple):
    """A captured attend: it reads ``q``, and how many tokens there are from ``clock``, and writes ``packed``."""

    graph: Graph
    clock: Clock
    q: list[Tensor]
    packed: list[Tensor]
    form: Form
    copy: Copying


class ReplayedSteps:
    """What was captured of one layer.

    Args:
        backend: whose graphs; one that has none launches every step.
        graphs: those to capture with, in place of the backend's.
    """

    def __init__(self, backend: str = "auto", graphs: Graphs | None = None) -> None:
        self._backend, self._graphs = backend, graphs
        self._looked = graphs is not None  # for the backend's graphs
        self._appending, self._attending = Slot[AppendKey, Appending](), Slot[AttendKey, Attending]()
        self._len = -1  # tokens of the store as the clock has them

    def __reduce__(self) -> tuple:
        return ReplayedSteps, (self._backend,)  # a copied layer has other buffers, and captures them itself

    def _graphs_on(self, device: torch.device) -> Graphs | None:
        if not self._looked:
            self._looked = True
            if device.type == "cuda":
                self._graphs = getattr(get_ops(resolve_backend(self._backend, device)), "graphs", None)
        return self._graphs

    def append(self, store: DeviceStore, keys: Keys, values: Values) -> bool:
        """Take one token a row into the store by a replay. False: it was not, and nothing happened."""
        slot, graphs = self._appending, self._graphs or self._graphs_on(keys.device)
        if graphs is None or not store.takes(keys, values):
            return False
        key = slot.key
        if key is None or not key.stands(graphs, store):
            with graphs.on(keys.device):
                if key is not None and key.stands(graphs, store):  # another device was the current one
                    return self.append(store, keys, values)
                at = graphs.place(keys.device)
            if at is not None:
                slot.begin(AppendKey(at, Buffers(store)))
            return False
        taken = slot.held or slot.again(lambda: self._capture_append(graphs, key.at, store, keys, values))
        if taken is None:
            return False
        if store.kv_len is not taken.clock.kv_len or self._len != len(store):
            taken.clock.set(len(store))  # a crop, say, or a prompt
        self._len = -1  # until it is done: a failure leaves the clock ahead
        taken.copy(taken.new, (keys, values))
        taken.graph.replay()
        store.advance(taken.clock.kv_len)
        self._len = store._len
        return True

    def attend(self, q: Query, index: KeyIndex, policy: Policy, softmax_scale: float) -> AttendResult | None:
        """One step by a replay, if the last token came by one; None: not now."""
        graphs, taken, slot = self._graphs, self._appending.held, self._attending
        if graphs is None or self._appending.key is None or not isinstance(index, SketchIndex):
            return None
        index.refresh()
        store: Any = index.store
        sketch = index.sketch
        assert sketch is not None, "refresh() makes it"
        counted = taken is not None and store._kv_len is taken.clock.kv_len and self._len == store._len
        key = slot.key
        if key is None or not key.stands(graphs, q, store, sketch, policy, softmax_scale):
            with graphs.on(q.device):
                if key is not None and key.stands(graphs, q, store, sketch, policy, softmax_scale):
                    return self.attend(q, index, policy, softmax_scale)
                at = graphs.place(q.device)
            if at is not None:
                slot.begin(self._attend_key(graphs, at, q, store, sketch, policy, softmax_scale))
            return None
        step = slot.held
        if step is None or not counted:
            clock = taken.clock if counted and taken is not None else None
            step = slot.again(
                None if clock is None else lambda: self._capture_attend(graphs, key, q, index, sketch, clock)
            )
            if step is None or clock is None:
                return None
        assert taken is not None
        if step.clock is not taken.clock:  # of another batch that came in between
            self._attending = Slot()
            return None
        step.copy(step.q, (q,))
        step.graph.replay()
        (packed,) = step.packed
        piece = torch.empty_like(packed)
        step.copy((piece,), step.packed)
        return PackedResult(piece, step.form)

    def _attend_key(
        self, graphs: Graphs, at: Any, q: Query, store: Any, sketch: Sketch, policy: Policy, softmax_scale: float
    ) -> AttendKey:
        return AttendKey(
            at,
            Buffers(store),
            store.kv_start,
            ref(sketch),
            sketch.version,
            graphs.decided(len(store)),
            policy,
            softmax_scale,
            (q.shape, q.dtype, q.device),
        )

    def _capture_append(
        self, graphs: Graphs, at: Any, store: DeviceStore, keys: Keys, values: Values
    ) -> Appending | None:
        with torch.inference_mode(False), torch.no_grad():
            new = [torch.empty_like(x, requires_grad=False) for x in (keys, values)]
            clock, buffers, held = Clock(keys.shape[0], keys.device), store.buffers, len(store)

            def write() -> None:
                clock.tick()
                for buffer, x in zip(buffers, new, strict=True):
                    buffer.index_copy_(2, clock.position, x)

            for x, given in zip(new, (keys, values), strict=True):
                x.copy_(given)
            clock.set(held)
            captured = self._captured(lambda: (graphs.copying(at), graphs.capture(write, at)))
        if captured is None:
            return None
        copy, (graph, _) = captured
        return Appending(graph, new, clock, copy)

    def _capture_attend(
        self, graphs: Graphs, key: AttendKey, q: Query, index: SketchIndex, sketch: Sketch, clock: Clock
    ) -> Attending | None:
        policy, tokens = key.policy, key.decided[0]
        store: Any = index.store
        keys, values = (x[:, :, :tokens] for x in store.buffers)
        ops, place = get_ops(index.backend), (store.kv_start, clock.kv_len, key.softmax_scale)
        if not follows(policy, ops) or not graphs.serves(q, sketch, keys, values) or sketch.pages is not None:
            return None
        weights = byte_weights(sketch.head_dim, sketch.dims, sketch.num_slices, sketch.config.frame_len)
        with torch.inference_mode(False), torch.no_grad():
            held = q.detach().clone(memory_format=torch.contiguous_format)

            def run() -> tuple[Tensor, Form]:
                done = fused_step(policy, ops, held, keys, values, sketch, place, keep_best=True)
                assert done is not None, "follows() and serves() said so"
                return pack(*done, weights, sketch.head_dim, policy.drops)

            captured = self._captured(lambda: (graphs.copying(key.at), graphs.capture(run, key.at)))
        if captured is None:
            return None
        copy, (graph, (packed, form)) = captured
        return Attending(graph, clock, [held], [packed], form, copy)

    def _captured(self, capture: Callable[[], R]) -> R | None:
        """What capture gives; where it can't, this layer's steps are launched from here on."""
        try:
            return capture()
        except (BackendError, RuntimeError) as error:
            self._graphs = None
            warnings.warn(
                f"steps can't be captured in a CUDA graph here, so they stay as slow to launch as they were: {error}",
                LouverWarning,
                stacklevel=2,
            )
            return None
