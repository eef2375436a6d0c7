"""Policies keep what they say: never fewer exact keys than asked, exactly the top of a ranking, every key above a threshold."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import absolute_scores, build_case, true_scores
from louver import FlatIndex, attend
from louver.errors import LouverWarning, PolicyError
from louver.kernels import available_backends
from louver.kernels.reference.sample import reservoir
from louver.policies import Budget, Dense, ExactFraction, Fixed, Mass, OutputError, Relative, TopK, parse
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
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("spec", ["fixed:1e300", "fixed:-1e300", "fixed:3.5e38", "sample-max|fixed:-1e39"])
def test_a_threshold_beyond_float32_is_an_infinite_one(backend, spec, flat):
    case = build_case(2, kv_len=70)
    index = FlatIndex.build(case.keys, case.values) if flat else case.index(backend)
    result = attend(case.q, index, policy=spec, record=True)
    closed = torch.arange(70) < (70 if flat else 64)  # the open block is always attended
    assert result.exact_mask[..., closed].all() if "-1e" in spec else not result.exact_mask[..., closed].any()


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
        "error:0.05",
        "mass:0.001+recent:2",
        "relative:9.2",
        "sample-max",
        "sample-topk:4+size:64+seed:3+sinks:1",
        "sample-mean-max+seed:1",
        "sample-gap",
        "sample-budget:0.1",
        "topk:20|mass:0.01",
        "exact:0.01/exact:0.05+recent:8",
        "topk:3/budget:0.1",
        "exact:0.01|exact:0.2+unread:0+sinks:4",
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
        st.builds(Mass, dropped_mass=st.floats(1e-9, 0.999), recent=st.integers(0, 99)),
        st.builds(Relative, nats=st.floats(0, 1e6)),
        st.builds(OutputError, error=st.floats(1e-9, 0.999), sinks=st.integers(0, 99)),
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


@backends
@given(case=cases(TAME), nats=st.sampled_from((0.0, 0.7, 5.0, 40.0)), flat=st.booleans())
def test_relative_keeps_all_that_is_close_to_the_best(backend, case, nats, flat):
    index = FlatIndex.build(case.keys, case.values, kv_start=case.kv_start, kv_len=case.kv_len) if flat else None
    result = attend(case.q, index or case.index(backend), policy=Relative(nats=nats), record=True)
    truth, best, slack = rank_in_truth(case, 1)
    fuzz = case.q.shape[2] * 2.0**-52 * absolute_scores(case)
    tau = best - nats / case.softmax_scale
    close = case.valid() & (truth - fuzz >= tau[..., None] + best.abs()[..., None] * 2.0**-20)
    assert not (close & ~result.exact_mask).any(), "a key close to the best was lost"
    if not flat:
        return
    blur = torch.where(case.valid(), slack, 0.0).amax(-1, keepdim=True) if slack.shape[-1] else slack
    far = truth < tau[..., None] - blur - best.abs()[..., None] * 2.0**-20
    assert not (result.exact_mask & far).any(), "a key far from the best was kept"


@backends
@given(
    case=cases(TAME),
    pair=st.sampled_from((("topk:3", "mass:0.3"), ("relative:2", "budget:0.2"), ("fixed:1", "topk:2"))),
)
def test_a_union_keeps_what_each_member_promises(backend, case, pair):
    index = case.index(backend)
    result = attend(case.q, index, policy="|".join(pair), record=True)
    for spec in pair:
        member = attend(case.q, index, policy=spec, record=True)
        if spec.startswith("mass"):
            assert (result.dropped_mass_bound <= 0.3).all()
        else:
            fuzz = case.q.shape[2] * 2.0**-52 * absolute_scores(case)
            promised = case.valid() & (true_scores(case) - fuzz >= member.tau.double()[..., None])
            assert not (promised & ~result.exact_mask).any()


@given(length=st.integers(0, 200), size=st.integers(1, 64), seed=st.integers(0, 9))
def test_a_reservoir_changes_by_one_key_at_most(length, size, seed):
    def drawn(n):
        positions, present = reservoir(torch.tensor([n]), 256, size, seed)
        return set(positions[0][present[0]].tolist())

    before, after = drawn(length), drawn(length + 1)
    assert len(before) == min(size, length) and before <= set(range(length))
    assert len(after - before) <= 1 and len(before - after) <= 1


def test_a_reservoir_is_uniform():
    """Over 2,000 seeds every key of 50 is drawn about as often: chi-squared well inside its range."""
    hits = torch.zeros(50)
    for seed in range(2000):
        positions, _ = reservoir(torch.tensor([50]), 50, 10, seed)
        hits[positions[0]] += 1
    assert hits.sum() == 20_000
    chi_squared = ((hits - 400) ** 2 / (400 * 0.8)).sum()
    assert 20 < chi_squared < 95


def test_estimators_by_hand():
    def tau(spec, scores):
        summary = FlatIndex.build(torch.randn(1, 1, 4, 8)).summarize(torch.randn(1, 1, 8), 1.0)
        return parse(spec).cuts(replace(summary, sample=torch.tensor([[scores]]))).exact.item()

    scores = [1.0, 9.0, 2.0, 4.0, math.nan]
    assert tau("sample-max", scores) == 9 and tau("sample-topk:3", scores) == 2 and tau("sample-topk:200", scores) == 1
    assert tau("sample-mean-max", scores) == (4 + 9) / 2
    assert tau("sample-gap", scores) == 9 and tau("sample-gap", [9.0, 8.0, 2.0, 1.0]) == 8
    assert tau("sample-budget:0.5", scores) == 4 and tau("sample-budget:0.51", scores) == 2
    assert tau("sample-max", [math.nan]) == -math.inf


@backends
def test_a_sample_is_charged(backend):
    case = build_case(4, kv_len=512, batch=1)
    few, many = (attend(case.q, case.index(backend), policy=f"sample-max+size:{n}").stats for n in (8, 200))
    assert (few.num_scanned >= 8).all() and (many.num_scanned >= 200).all()


@backends
def test_asking_for_less_than_arithmetic_is_clamped_with_a_warning(backend):
    case = build_case(5, kv_len=300, dtype=torch.bfloat16)
    with pytest.warns(LouverWarning, match="asks for less than the arithmetic"):
        result = attend(case.q, case.index(backend), policy="error:0.0001", record=True)
    assert (result.certificate == 0).all() and torch.equal(result.exact_mask, case.valid().expand_as(result.exact_mask))


@backends
def test_more_error_reads_less(backend):
    case = build_case(6, kv_len=2000, batch=1)
    read = [attend(3 * case.q, case.index(backend), policy=f"error:{e}").stats.bytes_fraction for e in (0.02, 0.1, 0.5)]
    assert read[0] > read[1] > read[2]


@backends
@pytest.mark.parametrize("pair", [("fixed:2", "fixed:-1"), ("topk:3", "budget:0.2")])
def test_each_kv_head_follows_its_own_policy(backend, pair):
    case = build_case(8, kv_len=200, num_kv_heads=2, group_size=3)
    index = case.index(backend)
    both = attend(case.q, index, policy="/".join(pair), record=True)
    for part, spec in enumerate(pair):
        mine, heads = attend(case.q, index, policy=spec, record=True), slice(3 * part, 3 * part + 3)
        assert torch.equal(both.exact_mask[:, heads], mine.exact_mask[:, heads])
        torch.testing.assert_close(both.out[:, heads], mine.out[:, heads], rtol=1e-3, atol=1e-4)


@backends
def test_exact_shares_per_kv_head(backend):
    case = build_case(8, kv_len=208, num_kv_heads=2, group_size=1, batch=1)
    few, many = exact_count(attend(case.q, case.index(backend), policy="exact:0.05/exact:0.5", record=True))[0].tolist()
    assert 11 <= few < 30 and 104 <= many < 150


def test_policies_per_head_must_divide_the_heads():
    case = build_case(8, kv_len=64, num_kv_heads=2, group_size=2)
    with pytest.raises(PolicyError, match="gives 3 policies to 4 heads"):
        attend(case.q, case.index(), policy="topk:1/topk:2/topk:3")
    with pytest.raises(PolicyError, match="can't be given to single heads"):
        parse("mass:0.1/mass:0.2")
