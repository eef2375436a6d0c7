"""The bounds of balls and boxes at their tightest: no radius to hide in, thresholds a float32 below the true score.

Where a group is one key and its center is that key, the bound is the estimate and its rounding slack, nothing else; a slack
that is too small, in one subspace or in their sum, loses about half of the keys here.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import assert_nothing_lost, build_case, some_taus, true_scores
from louver.experiments.pruning_methods import _sound_cuts
from louver.geometry.subspaces import ROTATION_ERROR, subspaces
from louver.index import BallConfig, BallIndex
from louver.kv import DeviceStore
from strategies import cases, seeds

# key dtype, options: every one has radius zero, or (``around``) a radius that the query exhausts
TIGHT = {
    "key as center": (torch.float32, {"center": "key"}),
    "16-bit keys": (torch.float16, {}),
    "boxes": (torch.float16, {"enclosure": "box"}),
    "one subspace": (torch.float32, {"center": "key", "subspaces": 1}),
    "rotated": (torch.float32, {"center": "key", "slicing": "rotated", "subspaces": 8}),
}
every_tight = pytest.mark.parametrize(("dtype", "options"), TIGHT.values(), ids=TIGHT.keys())


def tight_index(dtype, options, seed, kv_len=160):
    """An index over keys that lie on the surface of their enclosure, and one query per head."""
    generator = torch.Generator().manual_seed(seed)
    offset = 30 * torch.randn(1, 2, 1, 64, generator=generator)
    keys = (offset + torch.randn(1, 2, kv_len, 64, generator=generator)).to(dtype)
    q = torch.randn(1, 6, 64, generator=generator)
    return BallIndex.build(keys, group_len=1, grouping="consecutive", buffer_len=8, **options), q


def below(x: torch.Tensor) -> torch.Tensor:
    """The largest float32 not above x (float64)."""
    y = x.float()
    return torch.where(y.double() > x, torch.nextafter(y, torch.full_like(y, -torch.inf)), y)


def slice_scores(index: BallIndex, q: torch.Tensor) -> torch.Tensor:
    """Float64 scores per subspace, [batch, num_q_heads, kv_len, subspaces]; a rotation is applied without rounding."""
    split, keys = index.split, index.store.keys

    def parts(x):
        x = x.double() if split.rotation is None else x.double() @ split.rotation.mT
        return torch.nn.functional.pad(x, (0, 1))[..., split.channels]

    grouped = parts(q).unflatten(1, (keys.shape[1], -1))
    return torch.einsum("bhgsw,bhnsw->bhgns", grouped, parts(keys)).flatten(1, 2)


@every_tight
@given(seed=seeds())
def test_the_sum_covers_its_rounding(dtype, options, seed):
    index, q = tight_index(dtype, options, seed)
    assert index.rows[0].num_folded == 160
    scores = slice_scores(index, q).sum(-1)
    for i in range(0, 160, 23):
        tau = below(scores[..., i])
        for rule in ("sum", "ta"):
            assert index.candidates(q, tau, rule)[..., i].all()
            assert index.search(q, tau, rule).mask(160)[..., i].all()


@pytest.mark.parametrize("subspaces", [1, 16])
@pytest.mark.parametrize(("keys_power", "query_power"), [(-26, 17), (-28, 10), (-30, 0), (2, -24)])
def test_keys_and_queries_whose_squares_underflow_are_covered(keys_power, query_power, subspaces):
    """A norm that comes out as 0 in float32 is no bound: the slack would be nothing and the rounding would not."""
    index, q = tight_index(torch.float32, {"center": "key", "subspaces": subspaces}, 5)
    store = DeviceStore.wrap(index.store.keys * 10.0**keys_power)
    index, q = BallIndex(store, config=index.config), q * 10.0**query_power
    index.refresh()
    scores = slice_scores(index, q).sum(-1)
    estimate, half_width, known = index.bounds(q)
    assert known.all() and ((estimate.double() - scores).abs() <= half_width.double()).all()
    for i in range(0, 160, 23):
        tau = below(scores[..., i])
        assert index.search(q, tau, "sum").mask(160)[..., i].all()


@every_tight
@given(seed=seeds())
def test_every_subspace_covers_its_rounding(dtype, options, seed):
    index, q = tight_index(dtype, options, seed)
    scores = slice_scores(index, q)
    for i in range(0, 160, 23):
        tau = below(scores[..., i, :])
        if index.split.rotation is not None:  # float64 itself rounds the rotation
            tau = torch.nextafter(tau, torch.full_like(tau, -torch.inf))
        assert index.candidates_in_all(q, tau)[..., i].all()
        assert index.search_intersection(q, tau).mask(160)[..., i].all()


@given(seed=seeds(), enclosure=st.sampled_from(("ball", "box")))
def test_a_query_along_the_radius_is_bounded(seed, enclosure):
    """Pairs c + e, c - e about an exact center, far from the origin, and a query parallel to e in every subspace."""
    generator = torch.Generator().manual_seed(seed)
    center = torch.randint(500, 2000, (80, 64), generator=generator).float()
    away = torch.tensor([3.0, 4.0, 0.0, 0.0]).repeat(16) / 64
    keys = torch.stack([center + away, center - away], 1).reshape(1, 1, 160, 64)
    q = (torch.rand(16, generator=generator) + 0.5).repeat_interleave(4) * away
    index = BallIndex.build(keys, group_len=2, grouping="consecutive", buffer_len=8, enclosure=enclosure)
    q = q[None, None]
    scores = slice_scores(index, q)
    for i in range(0, 160, 9):
        assert index.candidates(q, below(scores[..., i, :].sum(-1)), "sum")[..., i].all()
        assert index.candidates_in_all(q, below(scores[..., i, :]))[..., i].all()
    estimate, half_width, _ = index.bounds(q)
    off = (estimate.double() - scores.sum(-1)).abs()
    assert (off <= half_width.double()).all()
    # Half of what the bound allows is used: the radius is there once, not twice.
    assert (off >= 0.5 * half_width.double()).all() or enclosure == "box"


@given(case=cases(("offset", "spread", "duplicates", "zero_query", "lopsided")), seed=seeds())
def test_intersections_lose_nothing(case, seed):
    """Any data, thresholds at a key's own slice scores."""
    if not case.keys.shape[2]:
        return
    pick = int(torch.randint(case.keys.shape[2], (1,), generator=torch.Generator().manual_seed(seed)))
    for options in ({}, {"slicing": "rotated", "subspaces": 8}, {"slicing": "random", "center": "key"}):
        index = BallIndex.build(case.keys, kv_start=case.kv_start, kv_len=case.kv_len, buffer_len=8, **options)
        slices = slice_scores(index, case.q)
        tau = below(slices[:, :, pick])
        found = index.search_intersection(case.q, tau).mask(case.keys.shape[2])
        fuzz = 2.0**-44 * (case.q.double().norm(dim=-1)[..., None] * norms(case)) * (index.split.rotation is not None)
        inside = (slices - fuzz[..., None] >= tau[:, :, None].double()).all(-1) & case.valid()
        assert not (inside & ~found).any()


def norms(case):
    return case.keys.double().norm(dim=-1).repeat_interleave(case.group_size, 1)


@given(case=cases(("offset", "spread", "duplicates"), ragged=False), seed=seeds())
def test_thresholds_from_a_scalar_tau_prune_nothing_that_the_sum_keeps(case, seed):
    """What a sound AND can rule out from tau alone, SUM rules out too (up to the margin of the thresholds)."""
    if case.keys.shape[2] < 8:
        return
    index = BallIndex.build(case.keys[:1], buffer_len=8)
    q = case.q[:1]
    for tau in some_taus(case, seed)[:2]:
        in_all = index.candidates_in_all(q, _sound_cuts(index, q, tau[:1]))
        summed = index.candidates(q, tau[:1], "sum")
        assert not (summed & ~in_all).any()


@given(case=cases(("offset", "spread", "lattice"), ragged=False), seed=seeds())
def test_ta_stops_at_the_first_row_that_is_below(case, seed):
    """Against Fagin's rule spelled out: what it has met before it stops, no less and no more."""
    index = BallIndex.build(case.keys[:1], subspaces=4, buffer_len=8)
    if not index.rows[0].num_folded:
        return
    row, bounds = next(index.row_bounds(case.q[:1]))
    heads, _, group_size, _ = bounds.upper.shape
    for tau in some_taus(case, seed):
        t = tau[0].unflatten(0, (heads, group_size))
        seen = row.seen_by_ta(bounds, t)
        for h in range(heads):
            for g in range(group_size):
                slack = bounds.total_slack[h, g]
                surely, maybe = walk(row.group[h].tolist(), bounds.upper[h, :, g], slack, t[h, g])
                found = seen[h, g].tolist()
                assert all(surely[n] <= found[n] <= maybe[n] for n in range(len(found)))


def walk(group, upper, slack, tau):
    """Fagin's rule, one row of groups at a time: keys that it has met however groups of one bound are ordered, and in some order."""
    lists = [sorted(set(of_keys), key=lambda x: -float(upper[s, x])) for s, of_keys in enumerate(group)]
    depth = 0
    while all(depth < len(one) for one in lists):  # at a list's end every key has been met
        total = upper[0, lists[0][depth]]
        for s in range(1, len(lists)):
            total = total + upper[s, lists[s][depth]]
        if total + slack < tau:
            break
        depth += 1
    surely, maybe = [], []
    for s, one in enumerate(lists):
        bound = upper[s, one]
        surely.append({x for x in one if int((bound >= upper[s, x]).sum()) <= depth})
        maybe.append({x for x in one if int((bound > upper[s, x]).sum()) < depth})
    return [
        [any(of_keys[n] in met[s] for s, of_keys in enumerate(group)) for n in range(len(group[0]))]
        for met in (surely, maybe)
    ]


@pytest.mark.parametrize("options", [{}, {"center": "key"}, {"enclosure": "box"}], ids=str)
@given(first=st.integers(0, 40), then=st.integers(1, 40), seed=seeds())
def test_what_is_folded_in_later_is_bounded_too(options, first, then, seed):
    """Two batches of keys far from each other: every bound is that of the key's own group."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(1, 1, first + then, 64, generator=generator)
    keys[:, :, first:] += 50
    store = DeviceStore()
    index = BallIndex(store, config=BallConfig(buffer_len=4, **options))
    for part in (keys[:, :, :first], keys[:, :, first:]):
        store.append(part, None)
        index.refresh()
    q = torch.randn(1, 2, 64, generator=generator)
    scores = slice_scores(index, q).sum(-1)
    for i in range(first + then):  # folded or waiting, each is found at its own score
        assert index.candidates(q, below(scores[..., i]), "ta")[..., i].all()
    estimate, half_width, known = index.bounds(q)
    n = estimate.shape[2]
    assert known.all() and n > first + then - 8
    assert ((estimate.double() - scores[..., :n]).abs() <= half_width.double()).all()


@given(seed=seeds())
def test_a_rotation_costs_what_it_says(seed):
    """Query and keys that a rotation sends to different slices: all that is left of their scores is the error of rotating.

    No slice's own rounding is large enough to hide it.
    """
    rotation = subspaces(64, 8, "rotated").rotation
    generator = torch.Generator().manual_seed(seed)

    def within(channels, *shape):
        x = torch.zeros(*shape, 64, dtype=torch.float64)
        x[..., channels] = torch.randn(*shape, 8, generator=generator, dtype=torch.float64)
        return (x @ rotation).float()

    q, keys = within(slice(0, 8), 1, 2), within(slice(8, 16), 1, 1, 64)
    index = BallIndex.build(keys, slicing="rotated", subspaces=8, center="key", group_len=1, buffer_len=8)
    scores = q.double() @ keys[0].double().mT
    for i in range(64):
        assert index.candidates(q, below(scores[..., i]), "sum")[..., i].all()
    _, bounds = next(index.row_bounds(q))
    asked = ROTATION_ERROR * q.double().norm(dim=-1) * keys.double().norm(dim=-1).max()
    assert (bounds.total_slack >= asked).all() and (bounds.slack >= asked).all()
    turned = index.split.split(q).flatten(-2).double()
    assert ((turned - q.double() @ rotation.mT).norm(dim=-1) <= ROTATION_ERROR / 4 * q.double().norm(dim=-1)).all()


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_a_query_whose_estimates_overflow_finds_every_key_above(size):
    """Sums that overflow make no bound; the keys behind them are scanned."""
    case = build_case(4, kv_len=64, batch=1)
    q = case.q.sign() * size
    index = BallIndex.build(100 * case.keys, buffer_len=8, subspaces=4)
    scores = slice_scores(index, q).sum(-1)
    for tau in (torch.zeros(1, 4), below(scores.amax(-1).clamp_max(3e38))):
        found = index.search(q, tau).mask(64)
        assert not ((scores >= tau[..., None].double()) & ~found).any()


@given(case=cases(("offset", "spread", "huge")), seed=seeds())
def test_boxes_of_any_data_lose_nothing(case, seed):
    index = BallIndex.build(
        case.keys, kv_start=case.kv_start, kv_len=case.kv_len, enclosure="box", subspaces=4, buffer_len=8
    )
    for tau in some_taus(case, seed):
        assert_nothing_lost(index.search(case.q, tau).mask(case.keys.shape[2]), case, tau)
    assert true_scores(case).shape[2] == case.keys.shape[2]
