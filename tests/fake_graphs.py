"""Graphs that a CPU can replay: a replay calls the body again, and insists that whatever a CUDA graph would have by address is still there."""

from contextlib import contextmanager

from louver.attention import LouverAttention
from louver.attention.replayed import ReplayedSteps
from louver.errors import BackendError
from louver.kernels import crossover

ITS_DEVICE, ANOTHER_DEVICE = "the layer's", "another"


class FakeGraph:
    def __init__(self, graphs, body, result):
        self.graphs, self.body, self.result = graphs, body, result
        self.addresses = graphs.addresses(self)

    def replay(self):
        assert self.graphs.now == self.graphs.captured_at[id(self)], "replayed where it was not captured"
        assert self.addresses == self.graphs.addresses(self), "a graph was replayed over memory that had moved"
        done = self.body()
        if self.graphs.breaks:
            raise RuntimeError("no launch today")
        self.graphs.replays += 1
        if self.result is not None:
            self.result.copy_(done[0])


class FakeGraphs:
    """In place of kernels/triton/graphs.py, for one layer. A stream, ``here``, is one of the ``current`` device, as torch's default is."""

    def __init__(self, rounded=64):
        self.here, self.current, self.rounded = "here", ITS_DEVICE, rounded
        self.fails, self.compiles, self.breaks = False, True, False
        self.layer, self.captures, self.replays, self.captured_at = None, [], 0, {}

    @property
    def now(self):
        """Where a launch would go."""
        return self.current, self.here

    @contextmanager
    def on(self, device):
        before, self.current = self.current, ITS_DEVICE
        try:
            yield
        finally:
            self.current = before

    def place(self, device):
        assert self.current == ITS_DEVICE, "asked for a place on another device"
        return None if self.here is None else self.now

    def stays(self, at):
        return at == self.now

    def copying(self, at):
        if not self.compiles:
            raise BackendError("no compiler today")
        assert at == self.now, "compiled for another device"

        def copy(into, given):
            assert at == self.now, "copied on another device"
            for x, y in zip(into, given, strict=True):
                x.copy_(y)

        return copy

    def decided(self, tokens):
        return -(-tokens // self.rounded) * self.rounded, crossover.enabled

    def serves(self, q, sketch, keys, values):
        return True

    def capture(self, body, at):
        if self.fails:
            raise RuntimeError("no capture today")
        assert at == self.now, "captured on another device"
        done = body()
        result = None if done is None else done[0].clone()
        graph = FakeGraph(self, body, result)
        self.captured_at[id(graph)] = at
        self.captures.append(graph)
        return graph, None if done is None else (result, done[1])

    def addresses(self, graph):
        """Of all that a graph of the layer reads and writes: the buffers, and, where it attends, the sketch and the rows' ends."""
        store, sketch = self.layer.store, self.layer.index.sketch
        held = list(store.buffers)
        if graph.result is not None:
            held += [store.kv_start, store.kv_len, *(x for _, x in sketch.tensors())]
        return [(x.data_ptr(), x.shape) for x in held]


def replayed(policy, graphs=None, **options):
    """A layer whose single-token steps are replayed, on any device."""
    layer, graphs = LouverAttention(policy, **options), graphs or FakeGraphs()
    graphs.layer = layer
    layer._replayed = ReplayedSteps(graphs=graphs)
    return layer
