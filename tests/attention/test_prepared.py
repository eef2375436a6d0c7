"""Steps kept ready on the CPU: the same bits as steps taken the long way, and taken the long way whenever anything has changed."""

import copy
import gc
import pickle
import random
import weakref

import pytest
import torch

from helpers import build_case, within_certificate
from louver import LouverAttention, SketchIndex, attend
from louver.attention import prepared
from louver.attention.packed import PackedResult
from louver.errors import NonFiniteError, ShapeError
from louver.kernels import crossover
from louver.kernels.cpu import native
from louver.kernels.cpu.crossover import most_tokens
from louver.kv import DeviceStore
from louver.policies import parse
from louver.sketch import SketchConfig
from strategies import generator

# Without a compiler there is nothing to test; .ci/run fails where they are not built, so there these run.
pytestmark = pytest.mark.skipif(not native.available(), reason="the extension was not built")
CONFIG = SketchConfig(frame_len=8)
FIELDS = ("out", "lse", "certificate", "arithmetic_bound", "dropped_mass_bound", "tau")
SPECS = ["exact:0.1", "exact:0.1+sinks:2+recent:5+unread:0", "topk:5", "budget:0.2+recent:3", "fixed:3"]


@pytest.fixture(autouse=True)
def _no_dispatch():
    with crossover.switched(False):
        yield


def same(one, other):
    for name in FIELDS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert torch.equal(one.stats.table, other.stats.table)
    assert one.stats.byte_weights == other.stats.byte_weights
    assert (one.stats.drops, one.stats.head_dim) == (other.stats.drops, other.stats.head_dim)
    assert one.exact_mask is other.exact_mask is None


def step(q, index, policy="exact:0.1", **how):
    """Whether a step was ready. It gives what a copy of the index, which has none, gives."""
    result = attend(q, index, policy=policy, **how)
    same(result, attend(q, copy.deepcopy(index), policy=policy, **how))
    return isinstance(result, PackedResult)


def ready(policy="exact:0.1", q=None, **how):
    """A case, and an index that is ready for its query."""
    case = build_case(3, **(dict(kv_len=90, config=CONFIG) | how))
    index = case.index("cpu")
    assert [step(case.q if q is None else q, index, policy) for _ in range(4)] == [False, False, True, True]
    return case, index


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "head_dim, group_size, dtype", [(64, 3, torch.bfloat16), (33, 5, torch.float32), (80, 1, torch.float16)]
)
def test_the_same_bits(spec, head_dim, group_size, dtype):
    case, index = ready(spec, head_dim=head_dim, group_size=group_size, dtype=dtype, ragged=True, batch=3)
    for seed in range(3):
        q = torch.randn(case.q.shape, generator=generator(seed)).to(dtype)
        for keep_best in (False, True):
            for scale in (None, 0.25):
                made = [step(q, index, spec, keep_best=keep_best, softmax_scale=scale) for _ in range(3)]
                assert made[-1]
    result = attend(case.q, index, policy=spec)
    assert isinstance(result, PackedResult) and result.out.is_contiguous()
    assert within_certificate(case, result).all()


def test_every_instruction_set_and_number_of_threads(monkeypatch):
    case, index = ready()
    before = torch.get_num_threads()
    try:
        for isa in native.load().instruction_sets():
            monkeypatch.setattr(native, "isa", isa)
            assert not step(case.q, index)
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                made = [step(case.q, index) for _ in range(2)]
            assert made[-1]
    finally:
        torch.set_num_threads(before)


def test_a_result_is_the_callers_own_and_outlives_everything():
    case, index = ready()
    held = [attend(case.q * (1 + i), index, policy="exact:0.1") for i in range(4)]
    other = copy.deepcopy(index)
    expected = [attend(case.q * (1 + i), other, policy="exact:0.1") for i in range(2)]
    del index
    gc.collect()
    for i in range(2):
        assert isinstance(held[i], PackedResult)
        same(held[i], expected[i])
    same(copy.deepcopy(held[2]), held[2])
    same(pickle.loads(pickle.dumps(held[3])), held[3])
    lse = held[3].lse
    del held
    gc.collect()
    assert torch.isfinite(lse).all()


def test_a_policy_object_and_its_specification():
    case, index = ready()
    for policy in (parse("topk:3"), parse("topk:4")):
        assert [step(case.q, index, policy) for _ in range(3)] == [False, False, True]
    for seed in range(20):  # the ids of what is gone are given anew
        assert not step(case.q, index, parse(f"topk:{seed + 5}"))
    assert len(index.prepared) <= prepared.MOST


def test_tokens_come_and_blocks_fill():
    random_, layer = generator(1), LouverAttention("exact:0.1", config=CONFIG, backend="cpu")
    made = 0
    for tokens in [60] + [1] * 60:
        layer.append(*torch.randn(2, 2, 2, tokens, 32, generator=random_).unbind())
        q = torch.randn(2, 4, 32, generator=random_)
        result = layer.attend(q, 0.2)
        same(result, copy.deepcopy(layer).attend(q, 0.2))
        made += isinstance(result, PackedResult)
    assert made > 25
    assert layer.index.sketch.num_blocks.tolist() == [15, 15]


def changes():
    """Name -> what it does to an index over [2, 2, 90, 64] that was ready; after each the next step goes the long way."""
    new_start = torch.tensor([3, 11], dtype=torch.int32)

    def another_start(index):
        index.store.kv_start = new_start

    def in_place(index):
        index.store.kv_start.add_(1)

    def in_place_and_encoded_for_others(index):
        start = index.store.kv_start
        index.store.kv_start = torch.tensor([1, 2], dtype=torch.int32)  # as many blocks
        index.refresh()
        index.store.kv_start = start

    def appended(index):
        index.store.append(torch.randn(2, 2, 9, 64), torch.randn(2, 2, 9, 64))

    def replaced(index):
        index.sketch.value_spread = index.sketch.value_spread * 2

    def restored(index):
        index.restore(index.state())

    def moved(name):
        return lambda index: getattr(index.store, name).untyped_storage().share_memory_()

    def of_other_strides(name):
        def change(index):
            store = index.store
            buffers = {"keys": store.whole[0], "values": store.whole[1]}
            buffers[name] = buffers[name].as_strided((2, 2, 90, 64), (64, 128, 256, 1))
            assert buffers[name].data_ptr() == getattr(store, name).data_ptr()
            index.store = DeviceStore.wrap(*buffers.values(), store.kv_start, store.kv_len)

        return change

    def on_another_backend(index):
        index.backend = "reference"

    return {
        "another kv_start": another_start,
        "kv_start in place": in_place,
        "encoded for another kv_start meanwhile": in_place_and_encoded_for_others,
        "a block to encode, and buffers that grew": appended,
        "truncated": lambda index: index.truncate(71),
        "rows exchanged": lambda index: index.select_batch(torch.tensor([1, 0])),
        "a tensor of the sketch replaced": replaced,
        "restored": restored,
        "keys moved": moved("keys"),
        "values moved": moved("values"),
        "keys of other strides": of_other_strides("keys"),
        "values of other strides": of_other_strides("values"),
        "another backend": on_another_backend,
        "rows that end earlier": lambda index: index.store.kv_len.sub_(1),
    }


@pytest.mark.parametrize("name", changes())
def test_what_changes_between_two_steps_is_seen(name):
    case, index = ready()
    changes()[name](index)
    served = step(case.q, index)
    assert served == (name == "rows that end earlier")  # read anew at every step
    if name != "another backend":
        assert [step(case.q, index) for _ in range(3)][-1], "it is ready for what is there now"


def test_a_switch_turned_between_two_steps():
    case, index = ready()
    with crossover.switched(True):
        assert attend(case.q, index, policy="exact:0.1").certificate.max() == 0, "90 tokens are attended densely"
    assert [step(case.q, index) for _ in range(3)][-1]


def test_rows_that_become_short_are_attended_densely():
    """Of several rows it is their sum that counts, and their ends can move within one tensor."""
    case = build_case(3, kv_len=2000, batch=2)
    with crossover.switched(True):
        index = case.index("cpu")
        assert [step(case.q, index) for _ in range(3)][-1]
        index.store.kv_len.fill_(100)
        assert attend(case.q, index, policy="exact:0.1").certificate.max() == 0


def test_a_row_that_becomes_short_within_its_last_block_is_attended_densely():
    most = int(most_tokens(64, 4))
    frame_len = next(n for n in (16, 15) if most % n < n - 1)
    case = build_case(3, kv_len=most + 1, batch=1, config=SketchConfig(frame_len=frame_len))
    with crossover.switched(True):
        index = case.index("cpu")
        assert [step(case.q, index) for _ in range(3)][-1]
        index.store.truncate(most)
        assert attend(case.q, index, policy="exact:0.1").certificate.max() == 0


def test_what_is_not_the_prepared_step_goes_the_long_way():
    case, index = ready()
    assert attend(case.q, index, policy="exact:0.1", record=True).exact_mask.shape == (2, 4, 90)
    others = attend(case.q, index, torch.zeros_like(case.values), policy="topk:3")
    assert not isinstance(others, PackedResult) and (others.out == 0).all()
    strided = case.q.transpose(1, 2).contiguous().transpose(1, 2)
    assert not strided.is_contiguous()
    for q in (case.q[:, [0, 2]], case.q.half(), strided):
        assert [step(case.q, index) for _ in range(3)][-1]
        assert not step(q, index)
    assert not step(case.q, index, softmax_scale=0.3)
    assert not isinstance(attend(case.q, index, policy="exact:0.1/exact:0.2"), PackedResult)
    assert not isinstance(attend(case.q, index, policy="mass:0.1"), PackedResult)
    for _ in range(3):
        attend(case.q, index, policy="dense")
        attend(case.q, index, policy="error:0.3")
        attend(case.q, SketchIndex.build(case.keys, case.values, backend="reference"), policy="exact:0.1")
    assert [step(case.q, index) for _ in range(3)][-1]


@pytest.mark.parametrize("index", ["flat", "ball"])
def test_other_indexes_have_none(index):
    layer = LouverAttention("topk:3", index=index)
    layer.append(*torch.randn(2, 1, 2, 40, 32).unbind())
    assert not any(isinstance(layer.attend(torch.randn(1, 2, 32), 0.2), PackedResult) for _ in range(3))


def test_errors_are_those_of_the_long_way():
    case, index = ready()
    for value in (torch.nan, torch.inf):
        q = case.q.clone()
        q[1, 3, 63] = value
        with pytest.raises(NonFiniteError, match="q holds NaN or infinity"):
            attend(q, index, policy="exact:0.1")
    for message, q in {
        "batch=1": case.q[:1],
        "head_dim=32": case.q[..., :32].contiguous(),
        "num_q_heads=3": case.q[:, :3].contiguous(),
    }.items():
        with pytest.raises(ShapeError, match=message):  # more of them in bad_input.py
            attend(q, index, policy="exact:0.1")
    for scale in (0.0, torch.nan, -1.0):
        with pytest.raises(ShapeError, match="softmax_scale"):
            attend(case.q, index, policy="exact:0.1", softmax_scale=scale)
    assert step(case.q, index), "none of it mattered"


def test_a_copy_is_not_ready_and_old_buffers_are_given_back():
    layer = LouverAttention("exact:0.1", config=CONFIG, backend="cpu")
    layer.append(*torch.randn(2, 1, 2, 50, 32).unbind())
    q = torch.randn(1, 4, 32)
    for _ in range(3):
        layer.attend(q, 0.2)
    assert layer.index.prepared and not copy.deepcopy(layer).index.prepared and not copy.copy(layer.index).prepared
    buffers = [weakref.ref(x) for x in layer.store.whole]
    layer.append(*torch.randn(2, 1, 2, 50, 32).unbind())
    gc.collect()
    assert not any(x() for x in buffers)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_in_between(seed):
    dice, draw, batch = random.Random(seed), generator(seed), 2
    layer = LouverAttention(SPECS[seed], config=CONFIG, backend="cpu")
    made, kv_start = 0, None

    def append(tokens):
        layer.append(*torch.randn(2, batch, 2, tokens, 32, generator=draw).unbind())

    append(37)
    for _ in range(60):
        what = dice.choice(["steps"] * 4 + ["crop", "rows", "prompt", "padding", "several", "threads"])
        if what == "crop":
            layer.truncate(dice.randrange(20, layer.kv_len + 1))
        elif what == "rows":
            layer.select_batch(torch.tensor([dice.randrange(batch) for _ in range(batch)]))
            kv_start = None
        elif what == "prompt":
            append(dice.randrange(1, 20))
            layer.observe(torch.randn(batch, 4, 1, 32, generator=draw), kv_start, 0.2)
        elif what == "padding":
            kv_start = torch.tensor([dice.randrange(9) for _ in range(batch)], dtype=torch.int32)
        elif what == "several":
            append(3)
            q = torch.randn(batch, 4, 3, 32, generator=draw)
            twin = copy.deepcopy(layer)
            same(layer.attend_many(q, 0.2, kv_start), twin.attend_many(q, 0.2, kv_start))
        elif what == "threads":
            torch.set_num_threads(dice.choice([1, 2]))
        for _ in range(dice.randrange(5)):
            append(1)
            q, twin = torch.randn(batch, 4, 32, generator=draw), copy.deepcopy(layer)
            result = layer.attend(q, 0.2, kv_start)
            same(result, twin.attend(q, 0.2, kv_start))
            made += isinstance(result, PackedResult)
    assert made > 10


def test_what_a_step_reads_outlives_whatever_another_thread_gives_the_store_meanwhile():
    case, index = ready()
    store, prepared_step = index.store, next(iter(index.prepared.values()))
    store._kv_start, store._kv_len = store._kv_start.clone(), store._kv_len.clone()  # nobody else holds these
    seen = [weakref.ref(x) for x in (store._kv_start, store._kv_len)]

    def interrupted(*given):
        store._kv_start, store._kv_len = store._kv_start.clone(), store._kv_len.clone()
        gc.collect()
        assert all(x() is not None for x in seen)
        return None

    prepared_step.step = interrupted
    attend(case.q, index, policy="exact:0.1")
    gc.collect()
    assert all(x() is None for x in seen)


def test_an_emptied_store_is_no_store_of_before():
    _, index = ready()
    held = next(iter(index.prepared.values()))
    index.store.clear()
    gc.collect()
    assert not held.stands(index)
