"""Enclosures hold their members in exact arithmetic; splits add up; groupings cover every point once."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from louver.geometry.ball import Balls, group_means, round_up_float16
from louver.geometry.box import Boxes
from louver.geometry.grouping import group_points
from louver.geometry.subspaces import subspaces


def some_points(seed: int, n: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (6 * torch.rand(n, 1, generator=generator) - 3)
    return torch.randn(3, n, width, generator=generator) * spread


@given(seed=st.integers(0, 999), n=st.integers(1, 40), width=st.sampled_from((1, 4, 16)))
def test_enclosures_hold_their_members(seed, n, width):
    points = some_points(seed, n, width)
    group = torch.randint(5, (3, n), generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(3, n, dtype=torch.bool)
    center = group_means(points, group, 5, keep).half()
    balls, boxes = Balls.fit(points, center, group, keep), Boxes.fit(points, center, group, keep)
    for lead in range(3):
        for i in range(n):
            g = int(group[lead, i])
            exact = [Fraction(x) for x in points[lead, i].tolist()]
            away = [x - Fraction(c) for x, c in zip(exact, balls.center[lead, g].tolist(), strict=True)]
            assert sum(a * a for a in away) <= Fraction(float(balls.radius[lead, g])) ** 2
            for x, c, h in zip(exact, boxes.center[lead, g].tolist(), boxes.half[lead, g].tolist(), strict=True):
                assert abs(x - Fraction(c)) <= Fraction(h)


def test_what_is_not_kept_does_not_widen():
    points = torch.tensor([[[0.0], [1.0], [100.0]]])
    keep = torch.tensor([[True, True, False]])
    group = torch.zeros(1, 3, dtype=torch.int64)
    center = group_means(points, group, 1, keep).half()
    assert center.item() == 0.5
    assert Balls.fit(points, center, group, keep).radius.item() == pytest.approx(0.5, abs=1e-3)
    assert Boxes.fit(points, center, group, keep).half.item() == pytest.approx(0.5, abs=1e-3)


@given(x=st.floats(0, 60000))
def test_float16_rounds_up_and_no_further_than_it_must(x):
    up = round_up_float16(torch.tensor([x], dtype=torch.float64))
    assert Fraction(float(up)) >= Fraction(x)
    below = (up.view(torch.int16) - 1).view(torch.float16)
    assert x == 0 or float(below) < x


@given(
    seed=st.integers(0, 99),
    n=st.sampled_from((0, 1, 3, 4, 7, 255, 256, 700)),
    group_len=st.integers(1, 5),
    grouping=st.sampled_from(("kcenter", "consecutive", "kmeans")),
)
def test_every_point_has_a_group(seed, n, group_len, grouping):
    group, num_groups = group_points(some_points(seed, n, 4), group_len, grouping, cell_len=64)
    assert group.shape == (3, n)
    assert ((group >= 0) & (group < max(1, num_groups))).all()
    if grouping != "kmeans" and n:
        assert group.flatten().bincount().max() <= 3 * group_len
        assert max(row.bincount().max() for row in group) <= group_len
    assert num_groups <= 2 * (n // group_len + 16)


def test_groups_of_neighbours_are_small():
    """k-center beats neighbours in time where time says nothing."""
    points = torch.randn(4, 1024, 4)
    radius = {}
    for grouping in ("kcenter", "consecutive", "kmeans"):
        group, n = group_points(points, 4, grouping)
        keep = torch.ones_like(group, dtype=torch.bool)
        radius[grouping] = (
            Balls.fit(points, group_means(points, group, n, keep).half(), group, keep).radius.float().mean()
        )
    assert radius["kcenter"] < radius["consecutive"] / 3
    assert radius["kmeans"] < radius["consecutive"] / 3


@pytest.mark.parametrize("slicing", ["contiguous", "interleaved", "random", "rotated"])
@pytest.mark.parametrize(("head_dim", "count"), [(64, 16), (64, 1), (33, 4), (80, 7), (5, 5)])
def test_slices_add_up(slicing, head_dim, count):
    split = subspaces(head_dim, count, slicing, seed=3)
    q, k = torch.randn(head_dim), torch.randn(50, head_dim)
    parts = torch.einsum("sw,nsw->ns", split.split(q).double(), split.split(k).double())
    assert parts.shape == (50, count)
    off = (parts.sum(1) - k.double() @ q.double()).abs()
    assert (off <= split.rounding * q.norm() * k.norm(dim=1) + 1e-12).all()
    assert split.rounding == 0 or slicing == "rotated"
    used = split.channels[split.channels < head_dim]
    assert used.sort().values.tolist() == list(range(head_dim))


def test_norms_that_float64_rounds_down_are_inside():
    """sqrt(1 + 2^-60) and 1/2 + 2^-100 are 1 and 1/2 in float64, and so would be a radius and a half-width."""
    group, keep = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.bool)
    point = torch.tensor([[[1.0, 2.0**-30]]])
    ball = Balls.fit(point, torch.zeros(1, 1, 2).half(), group, keep)
    assert Fraction(float(ball.radius)) ** 2 >= 1 + Fraction(1, 2**60)
    points, both = torch.tensor([[[1.0], [-(2.0**-100)]]]), torch.ones(1, 2, dtype=torch.bool)
    box = Boxes.fit(points, torch.zeros(1, 1, 1).half(), torch.zeros(1, 2, dtype=torch.int64), both)
    assert Fraction(float(box.center)) - Fraction(float(box.half)) <= -Fraction(1, 2**100)
