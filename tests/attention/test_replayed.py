"""Steps replayed from graphs: captured, replayed and dropped when they should be, and the same bits as steps that are launched."""

import copy
import random

import pytest
import torch

from fake_graphs import ANOTHER_DEVICE, ITS_DEVICE, FakeGraphs, replayed
from louver.attention import LouverAttention
from louver.errors import LouverWarning, ShapeError
from louver.kernels import crossover
from louver.policies import parse
from louver.sketch import SketchConfig

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 32, 32**-0.5
CONFIG = SketchConfig(frame_len=8)
FIELDS = ("out", "lse", "certificate", "arithmetic_bound", "dropped_mass_bound", "tau")


@pytest.fixture(autouse=True)
def _no_dispatch():
    with crossover.switched(False):
        yield


class Twins:
    """A replayed layer and a launched one that are told the same."""

    def __init__(self, policy="exact:0.1", batch=2, prompt=37, seed=0, graphs=None):
        self.random, self.batch = torch.Generator().manual_seed(seed), batch
        self.graphs = graphs or FakeGraphs()
        self.one = replayed(policy, self.graphs, config=CONFIG)
        self.other = LouverAttention(policy, config=CONFIG)
        self.handed_out, self.kv_start = [], None
        self.append(prompt)
        self.observe(prompt)
        self.one.index.sketch.reserve(
            40
        ) if policy != "dense" else None  # it would grow, and move, with every second block

    def draw(self, *shape):
        return torch.randn(shape, generator=self.random)

    def append(self, tokens):
        keys, values = self.draw(self.batch, KV_HEADS, tokens, DIM), self.draw(self.batch, KV_HEADS, tokens, DIM)
        mine, others = self.one.append(keys, values), self.other.append(keys, values)
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))

    def observe(self, tokens):
        queries = self.draw(self.batch, HEADS, tokens, DIM)
        for layer in (self.one, self.other):
            layer.observe(queries, self.kv_start, SCALE)

    def attend(self):
        q = self.draw(self.batch, HEADS, DIM)
        results = [layer.attend(q, SCALE, self.kv_start) for layer in (self.one, self.other)]
        self.handed_out.append(results)
        same(*results)

    def steps(self, count):
        for _ in range(count):
            self.append(1)
            self.attend()

    def both(self, name, *args):
        for layer in (self.one, self.other):
            getattr(layer, name)(*args)


def same(one, other):
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.stats.table, other.stats.table)
    assert one.stats.byte_weights == other.stats.byte_weights
    assert one.stats.drops == other.stats.drops
    assert (one.exact_mask is None) == (other.exact_mask is None)


@pytest.mark.parametrize("policy", ["exact:0.1", "exact:0.1+sinks:2+recent:5", "topk:5", "budget:0.1", "fixed:3"])
def test_steps_are_captured_once_and_replayed(policy):
    twins = Twins(policy)
    twins.steps(2)
    assert not twins.graphs.captures
    twins.steps(20)  # 8-token blocks fill, 64 tokens are not passed
    assert len(twins.graphs.captures) == 2
    assert twins.graphs.replays == 2 * 20
    twins.steps(10)  # at 64 tokens the buffers grow and the host decides anew: three launched steps, and other graphs
    assert len(twins.graphs.captures) == 4
    assert twins.graphs.replays == 2 * 27
    for results in twins.handed_out:  # none was written over
        same(*results)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_in_between(seed):
    policy = ["exact:0.1", "topk:5", "budget:0.1"][seed % 3]
    twins, dice = Twins(policy, seed=seed), random.Random(seed)
    held = twins.graphs
    for _ in range(20):
        twins.steps(dice.randrange(7))
        what = dice.randrange(9)
        if what == 0:
            twins.both("truncate", dice.randrange(20, twins.one.kv_len))
        elif what == 1:
            ids = torch.tensor([dice.randrange(twins.batch) for _ in range(dice.randrange(1, 4))])
            twins.both("select_batch", ids)
            twins.batch, twins.kv_start = len(ids), None if twins.kv_start is None else twins.kv_start[ids]
        elif what == 2:
            twins.append(dice.randrange(2, 20))
        elif what == 3:
            twins.append(1)  # and no attention, as where a model is attended densely
        elif what == 4:
            held.here = dice.choice(["here", "there", None])
        elif what == 5:
            twins.one.record = twins.other.record = dice.random() < 0.5
        elif what == 6:
            twins.steps(12)
        elif what == 7:
            held.current = dice.choice([ITS_DEVICE, ANOTHER_DEVICE])
        else:
            start = torch.tensor([dice.randrange(9) for _ in range(twins.batch)], dtype=torch.int32)
            twins.both("observe", twins.draw(twins.batch, HEADS, 1, DIM), start, SCALE)
            twins.kv_start = start
        if dice.random() < 0.5:
            twins.attend()  # the same tokens once more, or what is left of them
    assert held.replays > 20
    for results in twins.handed_out:
        same(*results)


def test_a_cache_that_grows_moves_and_is_captured_anew():
    twins = Twins(prompt=64, graphs=FakeGraphs(rounded=1024))
    capacity = twins.one.store.capacity
    twins.steps(capacity - 64 + 10)
    assert twins.one.store.capacity > capacity
    appends = [graph for graph in twins.graphs.captures if graph.result is None]
    assert len(appends) == 2


def test_a_copy_goes_its_own_way():
    twins = Twins()
    twins.steps(6)
    copied, replays = copy.deepcopy(twins.one), twins.graphs.replays
    keys = twins.draw(2, KV_HEADS, 1, DIM)
    copied.append(keys, keys)
    copied.attend(twins.draw(2, HEADS, DIM), SCALE)
    assert twins.graphs.replays == replays
    assert copied.kv_len == twins.one.kv_len + 1
    twins.steps(6)
    assert twins.graphs.replays == replays + 12


def test_the_switch_of_the_dispatch_is_part_of_the_key():
    twins = Twins()
    twins.steps(10)
    captures, replays = len(twins.graphs.captures), twins.graphs.replays
    with crossover.switched(True):
        for _ in range(5):
            twins.append(1)
            twins.one.attend(twins.draw(2, HEADS, DIM), SCALE)
    assert len(twins.graphs.captures) == captures + 1
    assert twins.graphs.replays == replays + 5 + 3


def test_another_policy_or_scale_is_captured_anew():
    twins = Twins()
    twins.steps(8)
    for layer in (twins.one, twins.other):
        layer.policy = parse("exact:0.3")
    twins.steps(8)
    assert len(twins.graphs.captures) == 3
    q = twins.draw(2, HEADS, DIM)
    same(*(layer.attend(q, 0.5) for layer in (twins.one, twins.other)))


def test_where_nothing_can_be_captured_steps_are_launched():
    twins = Twins()
    twins.graphs.fails = True
    twins.steps(2)
    with pytest.warns(LouverWarning, match="no capture today"):
        twins.steps(1)
    twins.steps(5)
    assert twins.graphs.replays == 0


@pytest.mark.parametrize("captured", [0, 1])
def test_where_copies_do_not_compile_steps_are_launched(captured):
    """Those of an append, the first to be captured, or those of an attend."""
    twins = Twins()
    twins.steps(2)
    if captured:
        twins.append(1)
    twins.graphs.compiles = False
    with pytest.warns(LouverWarning, match="no compiler today"):
        twins.attend() if captured else twins.append(1)
    replays = twins.graphs.replays
    twins.steps(5)
    assert twins.graphs.replays == replays == captured


def test_steps_on_another_device_than_the_current_one():
    """As those of a model spread over several: captured and replayed on the device of the layer, which is current only for so long."""
    twins = Twins()
    graphs, graphs.current = twins.graphs, ANOTHER_DEVICE
    twins.steps(10)
    assert len(graphs.captures) == 2
    assert graphs.replays == 2 * 8
    assert set(graphs.captured_at.values()) == {(ITS_DEVICE, "here")}
    assert graphs.current == ANOTHER_DEVICE
    graphs.current = ITS_DEVICE  # the same place
    twins.steps(5)
    graphs.current = ANOTHER_DEVICE
    twins.steps(5)
    assert len(graphs.captures) == 2
    assert graphs.replays == 2 * 18
    graphs.breaks = True
    keys = twins.draw(2, KV_HEADS, 1, DIM)
    with pytest.raises(RuntimeError, match="no launch"):
        twins.one.append(keys, keys)
    assert graphs.current == ANOTHER_DEVICE


def test_a_replay_that_fails_leaves_the_cache_as_it_was():
    twins = Twins()
    twins.steps(8)
    twins.graphs.breaks, held = True, twins.one.kv_len
    keys = twins.draw(2, KV_HEADS, 1, DIM)
    with pytest.raises(RuntimeError, match="no launch"):
        twins.one.append(keys, keys)
    assert twins.one.kv_len == held
    twins.graphs.breaks = False
    twins.steps(8)


def test_wrong_tokens_and_queries_are_refused_as_ever():
    twins = Twins()
    twins.steps(8)
    with pytest.raises(ShapeError, match="cannot append"):
        twins.one.append(*[torch.zeros(2, KV_HEADS, 1, DIM, dtype=torch.float16)] * 2)
    with pytest.raises(ShapeError, match="cannot append"):
        twins.one.append(*[torch.zeros(3, KV_HEADS, 1, DIM)] * 2)
    with pytest.raises(ShapeError, match="num_q_heads=5"):
        twins.one.attend(torch.zeros(2, 5, DIM), SCALE)
    twins.steps(3)


def test_what_the_host_must_decide_is_launched():
    """A policy that no kernel follows alone, and dense attention, which is torch's: only the new token is written by a replay."""
    for policy in ("exact:0.1/exact:0.3", "dense"):
        twins = Twins(policy)
        twins.steps(8)
        assert [graph.result for graph in twins.graphs.captures] == [None]


def test_blocks_that_close_while_there_is_room_end_nothing():
    """A sketch is made with the room of its store, so that what was captured stands until the store itself grows."""
    twins = Twins(prompt=37, graphs=FakeGraphs(rounded=1024))
    graphs, layer = FakeGraphs(rounded=1024), replayed("exact:0.1", config=CONFIG, reserve_tokens=200)
    graphs.layer, layer._replayed._graphs = layer, graphs
    keys = twins.draw(2, KV_HEADS, 37, DIM)
    layer.append(keys, keys)
    layer.observe(twins.draw(2, HEADS, 37, DIM), None, SCALE)
    for _ in range(150):  # 18 blocks of 8
        token = twins.draw(2, KV_HEADS, 1, DIM)
        layer.append(token, token)
        layer.attend(twins.draw(2, HEADS, DIM), SCALE)
    assert len(graphs.captures) == 2
    assert layer.index.sketch.capacity >= 200 // 8


def test_what_is_equal_stands_and_what_is_another_object_in_memory_does_not():
    twins = Twins()
    twins.steps(8)
    captures = len(twins.graphs.captures)
    for layer in (twins.one, twins.other):
        layer.policy = parse("exact:0.1")
    twins.steps(8)
    assert len(twins.graphs.captures) == captures
    sketch = twins.one.index.sketch
    sketch.key_codes = sketch.key_codes.clone()  # somebody replaced a tensor of the sketch
    twins.steps(8)
    assert len(twins.graphs.captures) == captures + 1


def test_queries_and_tokens_that_are_not_contiguous():
    twins = Twins()
    twins.steps(6)
    replays = twins.graphs.replays
    keys = twins.draw(2, 1, DIM, KV_HEADS).permute(0, 3, 1, 2)
    for layer in (twins.one, twins.other):
        layer.append(keys, keys.flip(1))
    q = twins.draw(2, DIM, HEADS).mT
    same(*(layer.attend(q, SCALE) for layer in (twins.one, twins.other)))
    assert twins.graphs.replays == replays + 2
