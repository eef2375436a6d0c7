"""Policies keep what they say: never fewer exact keys than asked, exactly the top of a ranking, every key above a threshold."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import absolute_scores, build_case, true_scores
from louver import FlatIndex, attend
from louver.kernels import available_backends
from louver.policies import Budget, Dense, ExactFraction, Fixed, TopK, parse
from strategies import cases

backends = pytest.mark.parametrize("backend", available_backends())
TAME = ("spread", "offset", "duplicates", "lattice", "zero_query", "flat")


def exact_count(result):
    return result.exact_mask.sum(-1)


@backends
@given(case=cases(), fraction=st.sampled_from((1e-6, 0.01, 0.07, 0.29, 1 / 3, 0.5, 1.0)))
def test_never_fewer_than_the_share_is_exact(backend, case, fraction):
    result = attend(case.q, case.index(backend), policy=ExactFraction(fraction=fraction), record=True)
    length = case.kv_len - case.kv_start
    closed = length // case.config.frame_len * case.config.frame_len
    need = torch.tensor([max(1, math.ceil(fraction * n - 1e-9)) for n in length.tolist()])
    wanted = torch.minimum(need, closed) + length - closed  # the open block comes on top
    assert (exact_count(result) >= wanted[:, None]).all()
    grouped = result.exact_mask.unflatten(1, (-1, case.group_size))
    assert (grouped == grouped[:, :, :1]).all(), "what one head of a group reads serves all of it"
    if fraction == 1:
        assert torch.equal(result.exact_mask, case.valid().expand_as(result.exact_mask))


def rank_in_truth(case, k):
    """The k-th largest true score, -inf where there are fewer keys, and the most rounding may blur a comparison by."""
    truth = torch.where(case.valid(), true_scores(case), -torch.inf)
    slack = 4.2 * (case.q.shape[2] + 1) * 2.0**-24 * absolute_scores(case) + 2.0**-94
    if k > truth.shape[-1]:
        return truth, truth.new_full(truth.shape[:-1], -torch.inf), slack
    return truth, truth.topk(k, -1).values[..., -1], slack


@backends
@given(case=cases(TAME), k=st.sampled_from((1, 2, 5, 17, 1000)), flat=st.booleans())
def test_topk_returns_the_top_k_and_its_ties(backend, case, k, flat):
    index = FlatIndex.build(case.keys, case.values, kv_start=case.kv_start, kv_len=case.kv_len) if flat else None
    result = attend(case.q, index or case.index(backend), policy=TopK(k=k), record=True)
    truth, kth, slack = rank_in_truth(case, k)
    exact, fuzz = result.exact_mask, case.q.shape[2] * 2.0**-52 * absolute_scores(case)
    top = case.valid() & (truth - fuzz >= kth[..., None])
    assert not (top & ~exact).any(), "a member of the true top was lost"
    assert (exact_count(result) >= torch.minimum(torch.tensor(k), (case.kv_len - case.kv_start)[:, None])).all()
    blur = torch.where(case.valid(), slack, 0.0).amax(-1, keepdim=True) if slack.shape[-1] else slack
    extra = exact & (truth < kth[..., None] - blur)
    if not flat:  # the open block is always attended
        frames = (case.kv_len - case.kv_start) // case.config.frame_len * case.config.frame_len
        extra &= torch.arange(truth.shape[-1]) < (case.kv_start + frames)[:, None, None]
    assert not extra.any(), "a key far below the k-th was kept"


@backends
@given(case=cases(TAME), fraction=st.sampled_from((0.001, 0.1, 0.5, 1.0)))
def test_budget_is_topk_of_a_share(backend, case, fraction):
    index = case.index(backend)
    result = attend(case.q, index, policy=Budget(fraction=fraction), record=True)
    for row, length in enumerate((case.kv_len - case.kv_start).tolist()):
        k = max(1, math.ceil(fraction * length - 1e-9))
        top = attend(case.q, index, policy=TopK(k=k), record=True)
        assert torch.equal(result.exact_mask[row], top.exact_mask[row])


@backends
@given(case=cases(), tau=st.sampled_from((-math.inf, -3.5, 0.0, 2.0, math.inf)))
def test_fixed_keeps_every_key_that_reaches_it(backend, case, tau):
    result = attend(case.q, case.index(backend), policy=Fixed(tau=tau), record=True)
    fuzz = case.q.shape[2] * 2.0**-52 * absolute_scores(case)
    reaching = case.valid() & (true_scores(case) - fuzz >= tau)
    assert not (reaching & ~result.exact_mask).any()
    assert (result.tau == tau).all()


@backends
@given(case=cases(TAME), sinks=st.integers(0, 40), recent=st.integers(0, 40))
@pytest.mark.parametrize("flat", [False, True])
def test_sinks_and_recent_tokens_are_exact(backend, flat, case, sinks, recent):
    index = FlatIndex.build(case.keys, case.values, kv_start=case.kv_start, kv_len=case.kv_len) if flat else None
    policy = parse(f"topk:1+sinks:{sinks}+recent:{recent}")
    result = attend(case.q, index or case.index(backend), policy=policy, record=True)
    position = torch.arange(case.keys.shape[2])
    first = position < case.kv_start[:, None] + sinks
    last = position >= case.kv_len[:, None] - recent
    forced = ((first | last)[:, None] & case.valid()).expand_as(result.exact_mask)
    assert not (forced & ~result.exact_mask).any()


@backends
@given(case=cases(TAME))
@pytest.mark.parametrize("flat", [False, True])
def test_keep_best_keeps_the_best_key(backend, flat, case):
    index = FlatIndex.build(case.keys, case.values, kv_start=case.kv_start, kv_len=case.kv_len) if flat else None
    result = attend(case.q, index or case.index(backend), policy="fixed:1e30", keep_best=True, record=True)
    for row, length in enumerate((case.kv_len - case.kv_start).tolist()):
        if length:
            best = torch.where(case.valid(), true_scores(case), -torch.inf)[row].argmax(-1)
            assert result.exact_mask[row].gather(-1, best[:, None]).all()


def test_selecting_nothing_gives_zero_and_minus_infinity():
    case = build_case(0, kv_len=32)
    result = attend(case.q, case.index(), policy="fixed:1e30", record=True)
    assert (result.out == 0).all() and torch.isneginf(result.lse).all() and not result.exact_mask.any()
    assert (result.dropped_mass_bound == 1).all()


@pytest.mark.parametrize(
    "spec",
    [
        "exact:0.01",
        "exact:1",
        "dense",
        "topk:64",
        "budget:0.05",
        "fixed:-3.5",
        "dense+sinks:4",
        "topk:8+sinks:4+recent:64",
    ],
)
def test_a_canonical_spec_reads_back(spec):
    assert parse(spec).spec == str(parse(spec)) == spec


@given(
    policy=st.one_of(
        st.builds(ExactFraction, fraction=st.floats(1e-9, 1), unread_mass=st.floats(0, 0.99), sinks=st.integers(0, 99)),
        st.builds(Budget, fraction=st.floats(1e-9, 1), recent=st.integers(0, 99)),
        st.builds(TopK, k=st.integers(1, 10**9), sinks=st.integers(0, 99), recent=st.integers(0, 99)),
        st.builds(Fixed, tau=st.floats(allow_nan=False), sinks=st.integers(0, 99)),
        st.builds(Dense, sinks=st.integers(0, 99)),
    )
)
def test_every_policy_survives_its_own_spec(policy):
    assert parse(policy.spec) == policy
    assert parse(policy) is policy


def test_other_spellings_mean_the_same():
    assert parse("exact:1.0") == parse("exact:1") == ExactFraction(fraction=1.0)
    assert parse(" topk:5+recent:2+sinks:1 ") == TopK(k=5, sinks=1, recent=2)
    assert parse("fixed:1e+5+sinks:2") == Fixed(tau=1e5, sinks=2)
    assert parse("fixed:2.e+1") == Fixed(tau=20.0)
    assert parse("exact:0.01+unread:0.02") == ExactFraction(fraction=0.01, unread_mass=0.02)
