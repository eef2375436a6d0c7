"""Ball and slice bounds contain every score, and the ball's is attained."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from louver.geometry.bounds import slice_lengths, sliced_norms
from louver.geometry.metric import inverse_weight, query_weight
from louver.geometry.rounding import radius_inflation
from strategies import generator, seeds


@given(head_dim=st.integers(1, 300), slice_dims=st.integers(1, 300))
def test_slices_cover_every_channel_once(head_dim, slice_dims):
    lengths = slice_lengths(head_dim, slice_dims)
    assert sum(lengths) == head_dim
    assert max(lengths) <= slice_dims and max(lengths) - min(lengths) <= 1


@given(
    seed=seeds(),
    dims=st.integers(1, 300),
    spread=st.sampled_from((0, 1, 8, 18)),
    slice_dims=st.sampled_from((1, 7, 64)),
)
def test_inflated_norms_times_radii_bound_every_slice_sum(seed, dims, spread, slice_dims):
    """|sum over slices of q_s . e_s| <= inflation * sum of norm_s(q) radius_s, for the e that attains it in each slice."""
    random = generator(seed)
    q = (torch.randn(dims, generator=random) * 10.0 ** (spread * (torch.rand(dims, generator=random) - 0.5))).float()
    weight = 10.0 ** (4 * torch.rand(dims, generator=random) - 2)
    lengths = slice_lengths(dims, slice_dims)
    norms = sliced_norms(q, weight, slice_dims)
    radius = torch.rand(len(lengths), generator=random)
    x, w = q.double(), weight.double()
    true = [(p.square() * v).sum().sqrt() for p, v in zip(x.split(lengths), w.split(lengths), strict=True)]
    attained = (torch.stack(true) * radius.double()).sum()
    assert (norms @ radius) * radius_inflation(dims) >= attained
    assert (norms @ radius).double() <= attained * (1 + 1e-4)


def test_a_slice_that_is_tiny_beside_another_keeps_its_norm():
    q = torch.tensor([1e25, 1e25, 1.0, 1.0])
    torch.testing.assert_close(sliced_norms(q, torch.ones(4), 2)[1], torch.tensor(2.0).sqrt())
    assert torch.isfinite(sliced_norms(torch.full((4,), 1e30), torch.ones(4), 4)).all()
    assert (sliced_norms(torch.zeros(4), torch.ones(4), 2) == 0).all()


@given(seed=seeds(), dims=st.integers(1, 64))
def test_any_metric_keeps_cauchy_schwarz(seed, dims):
    random = generator(seed)
    q, e = (torch.randn(dims, generator=random).double() for _ in range(2))
    u = 10 ** (4 * torch.rand(dims, generator=random).double() - 2)
    assert (q @ e).abs() <= (q.square() * u).sum().sqrt() * (e.square() / u).sum().sqrt() * (1 + 1e-12)
    along = (q * u).square() / u
    torch.testing.assert_close(q @ (q * u), (q.square() * u).sum().sqrt() * along.sum().sqrt())


@given(seed=seeds(), scale=st.sampled_from((0.0, 1e-30, 1.0, 1e30)), bad=st.booleans())
def test_query_weights_are_positive_and_finite(seed, scale, bad):
    queries = scale * torch.randn(2, 6, 5, 32, generator=generator(seed))
    queries[..., 3] = 0
    if bad:
        queries[0, 0, 0, 0], queries[1, 2, 1, 4] = torch.nan, torch.inf
    weight = query_weight(queries, 3)
    assert weight.shape == (2, 3, 32) and torch.isfinite(weight).all() and (weight > 0).all()


def test_padding_has_no_say_in_the_metric():
    queries = torch.randn(2, 4, 6, 8)
    valid = torch.arange(6) >= torch.tensor([[2], [0]])
    noisy = torch.where(valid[:, None, :, None], queries, 1e6)
    torch.testing.assert_close(query_weight(noisy, 2, valid), query_weight(queries * valid[:, None, :, None], 2))


def test_inverse_weight_by_metric():
    scale, weight = torch.rand(3, 5, 8) + 0.1, torch.rand(3, 1, 8) + 0.1
    assert torch.equal(inverse_weight(scale, weight, "frame"), scale * weight)
    assert torch.equal(inverse_weight(scale, weight, "diagonal"), weight.expand(3, 5, 8))
    assert torch.equal(inverse_weight(scale, weight, "identity"), torch.ones(3, 5, 8))
