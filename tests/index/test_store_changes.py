"""A store that is cut, rearranged or emptied behind an index's back: the index notices, before it is refreshed and after."""

import copy

import pytest
import torch

from helpers import build_case
from louver import BallIndex, FlatIndex, SketchIndex, attend
from louver.index import BallConfig
from louver.kernels import available_backends, crossover
from louver.kernels.cpu import native
from louver.kv import DeviceStore
from louver.kv.history import History
from louver.sketch import SketchConfig
from strategies import generator

CONFIG = SketchConfig(frame_len=16)
MAKE = {
    **{b: lambda store, b=b: SketchIndex(store, config=CONFIG, backend=b) for b in available_backends()},
    "balls": lambda store: BallIndex(store, config=BallConfig(buffer_len=8, subspaces=4)),
    "balls about keys": lambda store: BallIndex(store, config=BallConfig(buffer_len=8, center="key")),
}
SPECS = ("topk:3", "mass:0.1", "exact:0.1", "error:0.1")


def tokens(seed, count, batch=2, heads=2, dims=64):
    return torch.randn(2, batch, heads, count, dims, generator=generator(seed)).mul(3).unbind()


def cut(store):
    store.truncate(37)


def cut_and_grown_by_others(store):
    store.truncate(37)
    store.append(*tokens(5, 63))


def cut_twice_and_grown(store):
    store.truncate(50)
    store.append(*tokens(5, 20))
    store.truncate(60)
    store.append(*tokens(6, 90))


def cut_to_nothing_and_grown(store):
    store.truncate(0)
    store.append(*tokens(5, 100))


def other_rows(*ids):
    return lambda store: store.select_batch(torch.tensor(ids))


def emptied(batch, heads, dims):
    def change(store):
        store.clear()
        store.append(*tokens(5, 100, batch, heads, dims))

    return change


def padded(store):
    store.kv_start = torch.tensor([3, 40], dtype=torch.int32)


def padded_in_place(store):
    store.kv_start.copy_(torch.tensor([3, 40]))


CHANGES = {
    "cut": cut,
    "cut and grown by other tokens": cut_and_grown_by_others,
    "cut twice and grown": cut_twice_and_grown,
    "cut to nothing and grown": cut_to_nothing_and_grown,
    "rows exchanged": other_rows(1, 0),
    "a row dropped": other_rows(1),
    "a row repeated": other_rows(1, 0, 1),
    "emptied and filled": emptied(2, 2, 64),
    "emptied and filled in another shape": emptied(1, 1, 32),
    "padded": padded,
    "padded in place": padded_in_place,
}


def changed(make, change, refreshed):
    """A store, its index from before the change, and queries for what the store holds now."""
    store = DeviceStore()
    store.append(*tokens(3, 100))
    index = MAKE[make](store)
    index.refresh()
    CHANGES[change](store)
    if refreshed:
        index.refresh()
    batch, num_kv_heads, _, head_dim = store.keys.shape
    return store, index, torch.randn(batch, 2 * num_kv_heads, head_dim, generator=generator(1))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("refreshed", [False, True])
def test_no_key_is_lost_or_read_that_is_not_there(make, change, refreshed):
    store, index, q = changed(make, change, refreshed)
    keys = store.keys
    for tau in (torch.full(q.shape[:2], 20.0), torch.full(q.shape[:2], -torch.inf)):
        found, flat = index.search(q, tau), FlatIndex(store).search(q, tau)
        assert torch.equal(found.mask(keys.shape[2]), flat.mask(keys.shape[2]))
        assert (found.num_scanned <= found.num_keys[:, None]).all()
    fresh = MAKE[make](copy.deepcopy(store))
    for spec in SPECS if isinstance(index, SketchIndex) else SPECS[:2]:
        with crossover.switched(False):
            got, want = (attend(q, i, policy=spec, record=True) for i in (index, fresh))
        assert torch.equal(got.stats.num_keys, want.stats.num_keys)
        error = (got.out.double() - want.out.double()).norm(dim=-1)
        allowed = sum(r.certificate.double() + r.arithmetic_bound.double() for r in (got, want))
        assert (error <= allowed).all(), spec
        assert (got.stats.count("open") >= 0).all()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [make for make in MAKE if make.startswith("balls")])
@pytest.mark.parametrize("refreshed", [False, True])
def test_an_intersection_is_of_the_keys_that_are_there(make, change, refreshed):
    store, index, q = changed(make, change, refreshed)
    keys = store.keys
    subspaces = index.config.subspaces
    for at in (-5.0, -torch.inf):
        tau = torch.full((*q.shape[:2], subspaces), at)
        found = index.search_intersection(q, tau)
        want = MAKE[make](copy.deepcopy(store))
        want.refresh()
        assert torch.equal(found.mask(keys.shape[2]), want.search_intersection(q, tau).mask(keys.shape[2]))
        assert (found.num_scanned <= found.num_keys[:, None]).all()
    assert torch.equal(found.mask(keys.shape[2]), FlatIndex(store).search(q, tau[..., 0]).mask(keys.shape[2]))


@pytest.mark.skipif(not native.available(), reason="the extension was not built")
def test_a_step_that_is_ready_is_not_taken_over_other_tokens():
    """As many tokens and as many blocks as before: nothing but the store's history tells."""
    store = DeviceStore()
    store.append(*tokens(3, 100))
    index = SketchIndex(store, config=CONFIG, backend="cpu")
    q = torch.randn(2, 4, 64, generator=generator(1))
    with crossover.switched(False):
        for _ in range(3):
            attend(q, index, policy="topk:3")
        cut_and_grown_by_others(store)
        got = attend(q, index, policy="topk:3")
        want = attend(q, SketchIndex(copy.deepcopy(store), config=CONFIG, backend="reference"), policy="topk:3")
    torch.testing.assert_close(got.out, want.out, atol=1e-5, rtol=1e-4)


def test_blocks_below_a_cut_are_not_encoded_again():
    store = DeviceStore()
    store.append(*tokens(3, 100))
    index = SketchIndex(store, config=CONFIG, backend="reference")
    index.refresh()
    assert index.sketch is not None
    index.sketch.radius_least[:, :, :2] += 1000  # which marks what was encoded
    cut_and_grown_by_others(store)
    index.refresh()
    assert index.sketch.num_blocks.tolist() == [6, 6]
    assert (index.sketch.radius_least[:, :, :2] >= 1000).all()
    assert (index.sketch.radius_least[:, :, 2:6] < 1000).all()


def test_what_is_saved_describes_no_more_than_the_store_holds():
    store = DeviceStore()
    store.append(*tokens(3, 100))
    index = SketchIndex(store, config=CONFIG)
    index.refresh()
    store.truncate(37)
    assert index.state()["num_blocks"].tolist() == [2, 2]


@pytest.mark.skipif(not native.available(), reason="the extension was not built")
@pytest.mark.parametrize("spec", SPECS)
def test_compiled_kernels_refuse_a_sketch_of_more_than_a_row_holds(spec):
    """Rows made shorter in place: nothing that an index looks at at every step, and nothing that may be read past."""
    case = build_case(3, kv_len=96, config=CONFIG)
    index = case.index("cpu")
    index.store.kv_len.sub_(40)
    with crossover.switched(False), pytest.raises(ValueError, match="more tokens than a row holds"):
        attend(case.q, index, policy=spec)
    with pytest.raises(ValueError, match="more tokens than a row holds"):
        index.search(case.q, torch.zeros(2, 4))


@pytest.mark.skipif(not native.available(), reason="the extension was not built")
def test_compiled_kernels_refuse_to_encode_what_lies_outside_the_keys():
    index = build_case(3, kv_len=96, config=CONFIG).index("cpu")
    index.store.kv_start = torch.tensor([-70, 0])
    with pytest.raises(ValueError, match="lie within the keys"):
        index.refresh()


def test_an_index_that_was_never_refreshed_answers():
    store = DeviceStore()
    for make in MAKE.values():
        index = make(store)
        if store.is_empty:
            store.append(*tokens(3, 100))
        q = torch.randn(2, 4, 64, generator=generator(1))
        found = index.search(q, torch.full((2, 4), 20.0))
        assert torch.equal(found.mask(100), FlatIndex(store).search(q, torch.full((2, 4), 20.0)).mask(100))
        if isinstance(index, BallIndex):
            found = index.search_intersection(q, torch.full((2, 4, index.config.subspaces), -torch.inf))
            assert found.mask(100).all()


@pytest.mark.parametrize("make", [*MAKE, "flat"])
def test_a_row_cut_below_its_padding_has_no_keys(make):
    store = DeviceStore()
    store.append(*tokens(3, 100))
    store.kv_start = torch.tensor([60, 0], dtype=torch.int32)
    index = FlatIndex(store) if make == "flat" else MAKE[make](store)
    index.refresh()
    index.truncate(40) if make != "flat" else store.truncate(40)
    q = torch.randn(2, 4, 64, generator=generator(1))
    found = index.search(q, torch.full((2, 4), -torch.inf))
    assert not found.mask(40)[0].any() and found.mask(40)[1].all()
    assert found.num_keys.tolist() == [0, 40] and found.num_scanned[0].tolist() == [0, 0]
    for spec in ("topk:3", "dense", "exact:0.1" if isinstance(index, SketchIndex) else "mass:0.1"):
        result = attend(q, index, policy=spec, record=True)
        assert (result.out[0] == 0).all() and not result.exact_mask[0].any() and result.exact_mask[1].any()
        assert result.stats.num_keys.tolist() == [[0, 0], [40, 40]]


def test_a_history_never_says_that_more_was_kept_than_was():
    history, seen = History(), []
    cuts = [int(x) for x in torch.randint(100, (300,), generator=generator(2))] + list(range(100, 200))
    for number, kept in enumerate(cuts):
        seen.append(history.count)
        history = history.cut(kept)
        for before in range(0, number + 1, 7):
            since = history.kept_since(seen[before])
            assert since is not None and since <= min(cuts[before : number + 1])
    assert history.kept_since(history.count) is None
    assert history.kept_since(seen[-1]) == cuts[-1]
    assert len(history.cuts) <= 33
