"""Graphs that a CPU can replay: a replay calls the body again, and insists that whatever a CUDA graph would have by address is still there."""

from contextlib import nullcontext

from louver.attention import LouverAttention
from louver.attention.replayed import ReplayedSteps
from louver.kernels import crossover


class FakeGraph:
    def __init__(self, graphs, body, result):
        self.graphs, self.body, self.result = graphs, body, result
        self.addresses = graphs.addresses(self)

    def replay(self):
        assert self.graphs.here == self.graphs.captured_at[id(self)], "replayed where it was not captured"
        assert self.addresses == self.graphs.addresses(self), "a graph was replayed over memory that had moved"
        done = self.body()
        if self.graphs.breaks:
            raise RuntimeError("no launch today")
        self.graphs.replays += 1
        if self.result is not None:
            self.result.copy_(done[0])


class FakeGraphs:
    """In place of kernels/triton/graphs.py, for one layer."""

    def __init__(self, rounded=64):
        self.here, self.rounded, self.fails, self.breaks = "here", rounded, False, False
        self.layer, self.captures, self.replays, self.captured_at = None, [], 0, {}

    def on(self, device):
        return nullcontext()

    def place(self, device):
        return self.here

    def stays(self, at):
        return at == self.here

    def copying(self, at):
        return lambda into, given: [x.copy_(y) for x, y in zip(into, given, strict=True)]

    def decided(self, tokens):
        return -(-tokens // self.rounded) * self.rounded, crossover.enabled

    def serves(self, q, sketch, keys, values):
        return True

    def capture(self, body, at):
        if self.fails:
            raise RuntimeError("no capture today")
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
