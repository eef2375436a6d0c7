"""Histograms say of the bounds what a policy may rely on, and rules resolve into thresholds that keep their word."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import true_scores
from louver.index import FlatIndex
from louver.kernels import available_backends, get_ops
from louver.protocols import CutRule
from strategies import cases

backends = pytest.mark.parametrize("backend", available_backends())
TAME = ("spread", "offset", "duplicates", "lattice", "zero_query", "flat", "huge")


def found_bounds(case, backend, sinks=0, recent=0):
    index = case.index(backend)
    return index.bounds(case.q, case.softmax_scale, sinks, recent)


def test_the_flat_index_summarises_its_scores():
    keys = torch.arange(6.0).view(1, 1, 6, 1).expand(1, 1, 6, 4)
    summary = FlatIndex.build(keys).summarize(torch.ones(1, 1, 4), 0.5, sinks=1, recent=2)
    assert summary.upper_count.sum() == 3 and summary.lower_count.sum() == 6 and summary.num_keys == 6
    assert summary.best_lower.item() == pytest.approx(20.0, rel=1e-5)
    mass = torch.exp(torch.tensor([0.0, 16.0, 20.0]) * 0.5 - summary.shift[0, 0]).sum()
    torch.testing.assert_close(summary.decided_mass[0, 0], mass, rtol=1e-4, atol=0)


@backends
@given(case=cases(TAME), sinks=st.integers(0, 20), recent=st.integers(0, 20))
def test_histograms_count_what_the_bounds_say(backend, case, sinks, recent):
    bounds = found_bounds(case, backend, sinks, recent)
    summary, undecided = bounds.summary, bounds.undecided.repeat_interleave(case.group_size, 1)
    length = case.kv_len - case.kv_start
    assert (summary.edges.diff(dim=-1) <= 0).all()
    assert torch.isposinf(summary.edges[..., 0]).all() and torch.isneginf(summary.edges[..., -1]).all()
    assert torch.equal(summary.num_keys, length)
    assert torch.equal(summary.upper_count.sum(-1), undecided.sum(-1))
    assert torch.equal(summary.lower_count.sum(-1), length[:, None].expand_as(summary.shift))
    upper = torch.where(undecided, bounds.upper, -torch.inf)
    lower = torch.where(undecided, bounds.lower, -torch.inf)
    upper_count, lower_count = summary.upper_count.cumsum(-1), summary.lower_count.cumsum(-1)
    for i in (1, 300, 768, 900):
        edge = summary.edges[..., i, None]
        assert torch.equal(upper_count[..., i - 1], (undecided & (upper >= edge)).sum(-1))
        assert (lower_count[..., i - 1] >= (undecided & (lower >= edge)).sum(-1)).all()
        # Never more than there really are: a rank must be met by real scores.
        real = (case.valid() & (true_scores(case) >= edge.double())).sum(-1)
        assert (lower_count[..., i - 1] <= real).all()
    position = torch.arange(undecided.shape[-1])
    assert not undecided[..., position < sinks].any()
    assert not (undecided & (position >= (length - recent)[:, None, None])).any()
    real = torch.where(case.valid(), true_scores(case), -torch.inf)
    if real.shape[-1]:
        assert (summary.best_lower.double() <= real.amax(-1)).all()


@backends
@given(case=cases(TAME), share=st.sampled_from((0.0, 0.001, 0.1, 1.0)), count=st.sampled_from((0, 1, 7, 10**6)))
def test_enough_keys_reach_the_cut(backend, case, share, count):
    bounds, ops = found_bounds(case, backend), get_ops(backend)
    undecided = bounds.undecided.repeat_interleave(case.group_size, 1)
    need = torch.tensor([max(1, count, math.ceil(share * n - 1e-9)) for n in (case.kv_len - case.kv_start).tolist()])
    cuts = ops.resolve(CutRule(drop=False, share=share, count=count, unread_mass=0.1), bounds.summary)
    reached = (undecided & ~(bounds.upper < cuts.exact[..., None])).sum(-1)
    assert (reached >= torch.minimum(need[:, None], undecided.sum(-1))).all()
    assert (cuts.unread <= cuts.exact).all() and torch.equal(cuts.fine, cuts.exact) and cuts.rank is None

    cuts = ops.resolve(CutRule(drop=True, share=share, count=count), bounds.summary)
    assert torch.equal(cuts.rank, need[:, None].expand_as(cuts.rank))
    real = torch.where(case.valid(), true_scores(case), -torch.inf)
    for row, rank in enumerate(need.tolist()):
        if rank <= real.shape[-1]:
            assert (cuts.exact[row].double() <= real[row].topk(rank, -1).values[..., -1]).all()
        else:
            assert torch.isneginf(cuts.exact[row]).all()
    assert (cuts.fine >= cuts.exact).all()


@backends
@given(case=cases(("offset", "duplicates", "lattice")), unread_mass=st.sampled_from((0.0, 0.01, 0.5)))
def test_what_goes_unread_has_little_mass(backend, case, unread_mass):
    bounds = found_bounds(case, backend)
    cuts = get_ops(backend).resolve(CutRule(drop=False, unread_mass=unread_mass), bounds.summary)
    undecided = bounds.undecided.repeat_interleave(case.group_size, 1)
    unread = undecided & (bounds.upper < cuts.unread[..., None])
    shift = bounds.summary.shift.double()[..., None]
    weight = torch.exp(bounds.upper.double() * case.softmax_scale - shift)
    floor = torch.exp(bounds.lower.double() * case.softmax_scale - shift)
    low = bounds.summary.decided_mass.double() + torch.where(undecided, floor, 0.0).sum(-1)
    mass = torch.where(unread, weight, 0.0).sum(-1)
    assert (mass <= unread_mass * low * (1 + 1e-3) + 1e-30).all()


@backends
def test_a_fixed_threshold_is_the_cut(backend):
    summary = FlatIndex.build(torch.randn(2, 2, 9, 8)).summarize(torch.randn(2, 4, 8), 1.0)
    cuts = get_ops(backend).resolve(CutRule(drop=True, tau=1.25), summary)
    assert all((cut == 1.25).all() and cut.shape == (2, 4) for cut in (cuts.unread, cuts.fine, cuts.exact))
