"""An index finds the same keys however it came to be: built at once, grown, cut back, rearranged, copied."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    assert_extras_within_slack,
    assert_nothing_lost,
    assert_same_sketch,
    build_case,
    some_taus,
    true_scores,
)
from louver import FlatIndex, Selection, SketchIndex, attend
from louver.kernels import available_backends, crossover
from louver.kv import DeviceStore
from louver.protocols import KeyIndex, SelectionLike
from louver.sketch import SketchConfig
from strategies import cases, seeds

backends = pytest.mark.parametrize("backend", available_backends())
few = settings(max_examples=8)


def same_answers(one, other, case, seed=0):
    """Both indexes select the same keys at every threshold that hurts."""
    kv_len = case.keys.shape[2]
    for tau in some_taus(case, seed):
        assert torch.equal(one.search(case.q, tau).mask(kv_len), other.search(case.q, tau).mask(kv_len))


@given(case=cases(), seed=seeds())
def test_a_flat_index_loses_nothing(case, seed):
    index = FlatIndex.build(case.keys, case.values, kv_start=case.kv_start, kv_len=case.kv_len)
    for tau in some_taus(case, seed):
        selected = index.search(case.q, tau).mask(case.keys.shape[2])
        assert_nothing_lost(selected, case, tau)
        assert_extras_within_slack(selected, case, tau)
    assert index.memory_bytes() == 0


@backends
@given(case=cases(("lattice", "duplicates", "zero_query")), seed=seeds())
def test_sketch_and_flat_agree_on_whole_numbers(backend, case, seed):
    same_answers(
        case.index(backend), FlatIndex.build(case.keys, kv_start=case.kv_start, kv_len=case.kv_len), case, seed
    )


@backends
@few
@given(case=cases(("offset", "spread", "duplicates"), ragged=False, max_blocks=3), step=st.sampled_from((1, 3, 50)))
def test_growing_token_by_token_equals_building_at_once(backend, case, step):
    whole = case.index(backend, values=None)
    store = DeviceStore()
    index = SketchIndex(store, config=case.config, backend=backend)
    for at in range(0, case.keys.shape[2], step):
        store.append(case.keys[:, :, at : at + step], None)
        index.refresh()
    if case.keys.shape[2]:
        assert_same_sketch(index.sketch, whole.sketch)
        same_answers(index, whole, case)


@backends
@few
@given(case=cases(("offset", "spread"), ragged=False, max_blocks=4), keep=st.floats(0, 1), seed=seeds())
def test_what_is_cut_back_and_regrown_is_as_new(backend, case, keep, seed):
    kv_len = case.keys.shape[2]
    if not kv_len:
        return
    store = DeviceStore()
    store.append(torch.cat([case.keys[:, :, : int(keep * kv_len)], case.keys.flip(2)], 2), None)
    index = SketchIndex(store, config=case.config, backend=backend)
    index.refresh()
    index.truncate(int(keep * kv_len))
    store.append(case.keys[:, :, int(keep * kv_len) :], None)
    index.refresh()
    whole = case.index(backend, values=None)
    assert_same_sketch(index.sketch, whole.sketch)
    same_answers(index, whole, case, seed)


@backends
def test_answers_hold_after_every_truncation(backend):
    case = build_case(2, kv_len=70, batch=1)
    index = case.index(backend)
    for kv_len in (69, 64, 48, 47, 17, 16, 1, 0):
        index.truncate(kv_len)
        found = index.search(case.q, torch.zeros(1, 4)).mask(70)
        expected = (true_scores(case) >= 0) & (torch.arange(70) < kv_len)
        assert torch.equal(found, expected)
        assert found.shape[2] == 70 and index.sketch.num_blocks.item() == kv_len // 16


@backends
@pytest.mark.parametrize("ids", [[0, 1, 2], [2, 0], [1, 1, 1, 0], [2]])
def test_rows_can_be_rearranged_repeated_and_dropped(backend, ids):
    case = build_case(7, kv_len=60, batch=3, ragged=True)
    index = case.index(backend)
    before = index.search(case.q, torch.zeros(3, 4)).mask(60)
    index.select_batch(torch.tensor(ids))
    after = index.search(case.q[ids], torch.zeros(len(ids), 4))
    assert torch.equal(after.mask(60), before[ids])
    assert torch.equal(after.num_keys, (case.kv_len - case.kv_start)[ids])


@backends
def test_repeated_rows_grow_apart(backend):
    case = build_case(7, kv_len=60, batch=1)
    store = DeviceStore()
    store.append(case.keys, case.values)
    index = SketchIndex(store, config=case.config, backend=backend)
    index.refresh()
    index.select_batch(torch.tensor([0, 0]))
    new = torch.randn(2, 2, 40, 64)
    store.append(new, new)
    index.refresh()
    q = case.q.repeat(2, 1, 1)
    for row in range(2):
        keys = torch.cat([case.keys[0], new[row]], 1)[None]
        alone = SketchIndex.build(keys, config=case.config, backend=backend)
        expected = alone.search(q[:1], torch.zeros(1, 4)).mask(100)
        assert torch.equal(index.search(q, torch.zeros(2, 4)).mask(100)[row], expected[0])


@backends
def test_a_copy_goes_its_own_way(backend):
    case = build_case(7, kv_len=64, batch=1)
    store = DeviceStore()
    store.append(case.keys, case.values)
    index = SketchIndex(store, config=case.config, backend=backend)
    index.refresh()
    before = index.search(case.q, torch.zeros(1, 4)).mask(64)
    twin = copy.deepcopy(index)
    twin.truncate(10)
    twin.store.append(torch.full((1, 2, 54, 64), 7.0), torch.zeros(1, 2, 54, 64))
    twin.refresh()
    assert torch.equal(index.search(case.q, torch.zeros(1, 4)).mask(64), before)
    assert index.store.keys[0, 0, 20, 0] != 7 and twin.store.keys[0, 0, 20, 0] == 7


@backends
@few
@given(case=cases(("offset", "spread"), ragged=True), seed=seeds())
def test_a_metric_changes_no_answer(backend, case, seed):
    batch, _, kv_len, head_dim = case.keys.shape
    queries = torch.randn(batch, case.q.shape[1], 9, head_dim) * torch.rand(head_dim) ** 4
    tau = some_taus(case, seed)[0]
    for metric in ("frame", "diagonal"):
        config = SketchConfig(frame_len=case.config.frame_len, metric=metric)
        index = case.index(backend, metric_queries=queries, config=config)
        selected = index.search(case.q, tau).mask(kv_len)
        assert_nothing_lost(selected, case, tau)
        assert_extras_within_slack(selected, case, tau)


@backends
def test_a_metric_that_fits_tightens_the_bounds(backend):
    case = build_case(3, kv_len=256, head_dim=64, batch=1)
    shape = 10 ** torch.linspace(-2, 1, 64)
    queries = torch.randn(1, 4, 50, 64) * shape
    widths = [
        case.index(backend, metric_queries=m).bounds(case.q * shape, 1.0).half_width.mean() for m in (None, queries)
    ]
    assert widths[1] < 0.8 * widths[0]


@backends
def test_the_metric_is_fixed_by_the_first_block(backend):
    case = build_case(3, kv_len=64, batch=1)
    index = case.index(backend, metric_queries=torch.randn(1, 4, 8, 64))
    before = index.sketch.query_weight.clone()
    index.fix_metric(torch.randn(1, 4, 8, 64) * 100)
    index.refresh()
    assert torch.equal(index.sketch.query_weight, before)


@backends
def test_padding_found_out_late_is_still_padding(backend):
    """The store learns of left padding after the first blocks were encoded: they are encoded anew."""
    case = build_case(3, kv_len=64)
    store = DeviceStore()
    store.append(case.keys, case.values)
    index = SketchIndex(store, config=case.config, backend=backend)
    index.refresh()
    store.kv_start = torch.tensor([5, 40], dtype=torch.int32)
    index.refresh()
    expected = case.index(backend, kv_start=torch.tensor([5, 40], dtype=torch.int32))
    tau = torch.zeros(2, 4)
    assert torch.equal(index.search(case.q, tau).mask(64), expected.search(case.q, tau).mask(64))
    assert index.sketch.num_blocks.tolist() == [3, 1]


@backends
def test_few_keys_are_scanned_where_few_matter(backend):
    """The point of an index: on keys with structure, a search for the top 1% reads a small part of the rest."""
    case = build_case(1, kv_len=2048, head_dim=128, batch=1, config=SketchConfig())
    keys = case.keys + 3 * torch.randn(1, 2, 1, 128)
    index = SketchIndex.build(keys, config=SketchConfig(), backend=backend)
    scores = (case.q.unflatten(1, (2, 2)) @ keys.mT).flatten(1, 2)
    found = index.search(case.q, scores.topk(20, -1).values[..., -1])
    assert found.scanned_fraction < 0.22
    assert 20 / 2048 <= found.selected_fraction < 21 / 2048


def test_the_protocols_are_met():
    case = build_case(0, kv_len=20)
    for index in (case.index(), FlatIndex.build(case.keys)):
        assert isinstance(index, KeyIndex)
        assert index.guarantee == "exact"
        selection = index.search(case.q, torch.zeros(2, 4))
        assert isinstance(selection, SelectionLike) and isinstance(selection, Selection)


@backends
def test_an_empty_index_answers_with_nothing(backend):
    keys = torch.zeros(2, 1, 0, 64)
    for index in (SketchIndex.build(keys, keys, backend=backend), FlatIndex.build(keys, keys)):
        found = index.search(torch.randn(2, 3, 64), torch.full((2, 3), -torch.inf))
        assert found.indices.numel() == 0 and found.indptr.tolist() == [0] * 7
        assert found.selected_fraction == found.scanned_fraction == 0


@backends
@pytest.mark.parametrize("spec", ["topk:3", "exact:0.1", "mass:0.1", "error:0.2"])
def test_a_tensor_that_torch_negates_as_it_is_read(backend, spec):
    """What ``z.conj().imag`` is: its memory holds the other sign."""
    case = build_case(3, kv_len=60)
    negated = torch._neg_view
    tau = torch.full((2, 4), 3.0)
    for q, keys, values in (
        (negated(-case.q), case.keys, case.values),
        (case.q, *map(negated, (-case.keys, -case.values))),
    ):
        index, plain = SketchIndex.build(keys, values, config=case.config, backend=backend), case.index(backend)
        assert torch.equal(index.search(q, tau).mask(60), plain.search(case.q, tau).mask(60))
        with crossover.switched(False):
            for _ in range(3):  # the third is a step that was ready
                result = attend(q, index, policy=spec)
            assert torch.equal(result.out, attend(case.q, plain, policy=spec).out)
        result = attend(q, plain, values, policy="topk:3")
        assert torch.equal(result.out, attend(case.q, plain, case.values, policy="topk:3").out)
