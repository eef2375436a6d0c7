"""Balls and boxes lose no key above a threshold, whatever the grouping, and however the index came to be."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import (
    assert_extras_within_slack,
    assert_nothing_lost,
    build_case,
    some_taus,
    true_attention,
    true_scores,
    within_certificate,
)
from louver import BallIndex, FlatIndex, attend
from louver.attention import LouverAttention
from louver.errors import NonFiniteError, PolicyError, ShapeError
from louver.index import BallConfig
from louver.kv import DeviceStore
from louver.protocols import KeyIndex
from strategies import cases, seeds

few = settings(max_examples=8)
OPTIONS = {
    "paper": {},
    "key": {"center": "key"},
    "boxes": {"enclosure": "box", "grouping": "consecutive", "group_len": 16, "subspaces": 1},
    "kmeans": {"grouping": "kmeans", "slicing": "random", "subspaces": 8},
    "rotated": {"slicing": "rotated", "subspaces": 8},
    "rotated key": {"slicing": "rotated", "center": "key", "group_len": 3},
    "uneven": {"subspaces": 7, "slicing": "interleaved", "group_len": 1},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def build(case, **options) -> BallIndex:
    options = {"buffer_len": 8} | options
    return BallIndex.build(case.keys, case.values, kv_start=case.kv_start, kv_len=case.kv_len, **options)


def just_below_scores(q, keys):
    """Thresholds a little below the best, the fourth best and the sixteenth best score: most groups can be skipped, few may be."""
    per_head = keys.double().repeat_interleave(q.shape[1] // keys.shape[1], 1)
    scores = (per_head @ q.double()[..., None])[..., 0].sort(-1, descending=True).values
    return [(scores[..., rank] - 1e-3).float() for rank in (0, 3, 15)]


def clustered(*shape: int, seed: int = 0) -> torch.Tensor:
    """Keys that lie close in threes, so that bounds are tight and a wrong one is soon too low."""
    generator = torch.Generator().manual_seed(seed)
    *rest, kv_len, head_dim = shape
    spots = torch.randn(*rest, -(-kv_len // 3), head_dim, generator=generator).repeat_interleave(3, -2)[..., :kv_len, :]
    return spots + 0.01 * torch.randn(shape, generator=generator)


@every_option
@given(case=cases(), seed=seeds())
def test_sum_and_ta_lose_nothing_and_agree(options, case, seed):
    index = build(case, **options)
    for tau in some_taus(case, seed):
        found = index.search(case.q, tau, rule="sum")
        selected = found.mask(case.keys.shape[2])
        assert_nothing_lost(selected, case, tau)
        assert_extras_within_slack(selected, case, tau)
        other = index.search(case.q, tau, rule="ta")
        assert torch.equal(found.indices, other.indices) and torch.equal(found.indptr, other.indptr)
        assert torch.equal(found.num_scanned, other.num_scanned)


@every_option
@given(case=cases(("offset", "spread", "duplicates", "zero_query", "flat")))
def test_bounds_hold_against_float64(options, case):
    index = build(case, **options)
    estimate, half_width, known = index.bounds(case.q)
    scores = true_scores(case)
    for i, row in enumerate(index.rows):
        start = int(case.kv_start[i])
        truth = scores[i, :, start : start + row.num_folded]
        n = row.num_folded
        off = (truth - estimate[i, :, :n].double()).abs()
        assert (off <= half_width[i, :, :n].double() * (1 + 1e-12))[known[i, :, :n]].all()


@every_option
@given(case=cases(("lattice", "duplicates", "zero_query")), seed=seeds())
def test_intersections_are_exact(options, case, seed):
    """Thresholds that are some key's own slice scores: on whole numbers the answer is exact, after a rotation a superset."""
    index = build(case, **options)
    if not case.keys.shape[2]:
        return
    split = index.split
    q, keys = (split.split(x) for x in (case.q, case.keys))
    slices = torch.einsum("bhgsw,bhnsw->bhgns", q.unflatten(1, (keys.shape[1], -1)).double(), keys.double()).flatten(
        1, 2
    )
    pick = torch.randint(case.keys.shape[2], (1,), generator=torch.Generator().manual_seed(seed))
    tau = slices[:, :, int(pick)].float() - 1.0
    found = index.search_intersection(case.q, tau).mask(case.keys.shape[2])
    inside = (slices >= tau[:, :, None].double()).all(-1) & case.valid()
    assert not (inside & ~found).any()
    if split.rotation is None:
        assert torch.equal(found, inside)


@every_option
@few
@given(case=cases(("offset", "spread"), ragged=False), step=st.sampled_from((1, 3, 50)), seed=seeds())
def test_growing_loses_nothing(options, case, step, seed):
    store = DeviceStore()
    index = BallIndex(store, config=BallConfig(**{"buffer_len": 8} | options))
    for at in range(0, case.keys.shape[2], step):
        store.append(case.keys[:, :, at : at + step], None)
        index.refresh()
        assert all(len(store) - row.num_folded < 8 + 16 for row in index.rows)
    if case.keys.shape[2]:
        for tau in some_taus(case, seed):
            assert_nothing_lost(index.search(case.q, tau).mask(case.keys.shape[2]), case, tau)


@every_option
def test_what_comes_after_a_cut_is_found(options):
    """New tokens take the places of old ones, inside groups that still exist."""
    case, new = build_case(3, kv_len=100), clustered(2, 2, 63, 64, seed=2)
    store = DeviceStore()
    index = BallIndex(store, config=BallConfig(**{"buffer_len": 8} | options))
    store.append(clustered(2, 2, 90, 64, seed=1), None)
    index.refresh()
    index.truncate(37)
    store.append(new, None)
    index.refresh()
    kept = torch.cat([store.keys[:, :, :37], new], 2)
    flat = FlatIndex.build(kept)
    for tau in (torch.full((2, 4), 0.0), *just_below_scores(case.q, kept)):
        assert torch.equal(index.search(case.q, tau).mask(100), flat.search(case.q, tau).mask(100))


def test_rows_can_be_rearranged_and_copied():
    case = build_case(1, kv_len=64, batch=3, ragged=True)
    keys = clustered(3, 2, 64, 64)
    store = DeviceStore.wrap(keys.clone(), None, case.kv_start, case.kv_len)
    index = BallIndex(store, config=BallConfig(buffer_len=8, group_len=3))
    index.refresh()
    ids = torch.tensor([2, 0, 0])
    twin = copy.deepcopy(index)
    index.select_batch(ids)
    for tau in (torch.zeros(3, 4), *just_below_scores(case.q, keys)):
        assert torch.equal(index.search(case.q[ids], tau[ids]).mask(64), twin.search(case.q, tau).mask(64)[ids])


def test_a_changed_padding_starts_anew():
    case, keys = build_case(1, kv_len=64), clustered(2, 2, 64, 64)
    index = BallIndex.build(keys, buffer_len=8)
    index.store.kv_start = torch.tensor([5, 0], dtype=torch.int32)
    index.refresh()
    flat = FlatIndex.build(keys, kv_start=index.store.kv_start)
    for tau in (torch.zeros(2, 4), *just_below_scores(case.q, keys)):
        assert torch.equal(index.search(case.q, tau).mask(64), flat.search(case.q, tau).mask(64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_keys_beyond_bounds_are_scanned_and_spare_their_neighbours(bad):
    case = build_case(0, kv_len=64)
    case.keys[0, 0, 5, 2] = bad
    index = build(case)
    found = index.search(case.q, torch.full((2, 4), 1e3))
    assert int(found.num_scanned[0, 0]) == 1 and int(found.num_scanned[1].sum()) == 0
    if bad != bad:
        assert found.mask(64)[0, :2, 5].all()


@every_option
def test_retrieval_through_attention(options):
    case = build_case(5, kv_len=300)
    index = build(case, **options)
    for policy in ("topk:20", "budget:0.05", "fixed:4"):
        result = attend(case.q, index, policy=policy, record=True)
        flat = attend(case.q, FlatIndex.build(case.keys, case.values), policy=policy, record=True)
        assert torch.equal(result.exact_mask, flat.exact_mask)
        assert within_certificate(case, result).all()
        assert (true_attention(case, result.exact_mask) - result.out).abs().max() < 1e-5
        assert (result.stats.bytes_read - flat.stats.bytes_read >= 0).all() or options.get("enclosure") == "box"
        assert (result.stats.index_bytes == index.bytes_per_search).all()


def test_a_layer_can_be_served():
    case = build_case(5, kv_len=300)
    layers = [LouverAttention("topk:20", index=name) for name in ("ball", "flat")]
    outs = []
    for layer in layers:
        layer.append(case.keys, case.values)
        layer.observe(torch.randn(2, 4, 300, 64), None, 0.125)
        outs.append(layer.attend(case.q, 0.125).out)
    assert torch.equal(*outs)
    assert layers[0].memory_bytes()["index"] > 0


@pytest.mark.parametrize("center", ["mean", "key"])
def test_more_groups_than_16_bits_can_number(center):
    """Folded in three times: below 2^15 groups, across it, and above; then cut back and grown once more."""
    keys = clustered(1, 2, 33100, 6, seed=3)
    q = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(4))
    config = BallConfig(subspaces=2, group_len=1, grouping="consecutive", buffer_len=50, center=center)
    index, held = BallIndex(DeviceStore(), config=config), 0

    def search_at(length):
        for tau in just_below_scores(q, keys[:, :, :length]):
            found = [index.search(q, tau, rule).mask(length) for rule in ("sum", "ta")]
            assert torch.equal(*found)
            assert torch.equal(found[0], FlatIndex.build(keys[:, :, :length]).search(q, tau).mask(length))

    for length in (32700, 32900, 33000, 32760, 33100):
        if length < held:
            index.truncate(length)
        else:
            index.store.append(keys[:, :, held:length], None)
        held = length
        index.refresh()
        search_at(length)
        wide = index.rows[0].num_groups >= 2**15
        assert index.rows[0].group.dtype == (torch.int32 if wide else torch.int16)
    assert wide and int(index.rows[0].group.max()) == index.rows[0].num_groups - 1


def test_memory_is_what_the_paper_states():
    """28% of the cache with 16 subspaces and groups of 4; a key as center costs less."""
    keys = torch.randn(1, 2, 2048, 64).half()
    cache = 2 * keys.numel() * 2
    sizes = {c: BallIndex.build(keys, center=c).memory_bytes() / cache for c in ("mean", "key")}
    assert sizes["mean"] == pytest.approx(0.285, abs=0.005) and sizes["key"] < sizes["mean"]


def test_it_meets_the_protocol_and_says_what_is_wrong():
    case = build_case(0, kv_len=64)
    index = build(case)
    assert isinstance(index, KeyIndex) and index.guarantee == "exact"
    with pytest.raises(PolicyError, match="drops nothing"):
        attend(case.q, index, policy="exact:0.01")
    with pytest.raises(PolicyError, match="rule='and'"):
        index.search(case.q, torch.zeros(2, 4), rule="and")
    with pytest.raises(ShapeError, match="tau_per_subspace"):
        index.search_intersection(case.q, torch.zeros(2, 4))
    with pytest.raises(NonFiniteError, match="tau_per_subspace"):
        index.search_intersection(case.q, torch.full((2, 4, 16), torch.nan))
    for options in ({"subspaces": 65}, {"group_len": 0}, {"buffer_len": 0}):
        with pytest.raises(PolicyError):
            build(case, **options)
    with pytest.raises(PolicyError, match="no meaning for boxes"):
        build(case, enclosure="box", center="key")
