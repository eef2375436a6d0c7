"""The truth lies within certificate + arithmetic bound, and nothing that reaches the reported tau is inexact."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    TRAITS,
    absolute_scores,
    build_case,
    policies_to_try,
    true_attention,
    true_masses,
    true_scores,
    within_certificate,
)
from louver import BallIndex, FlatIndex, SketchIndex, attend
from louver.attention.asked import asked_mass
from louver.kernels import available_backends
from louver.kv import DeviceStore
from louver.policies import OutputError, parse
from louver.shapes import DTYPES
from strategies import cases

pytestmark = pytest.mark.filterwarnings("ignore:error.*asks for less than the arithmetic")
backends = pytest.mark.parametrize("backend", available_backends())


def check_step(case, result, policy):
    """Everything a result claims, against float64."""
    exact, truth = result.exact_mask, true_scores(case)
    assert result.out.shape == case.q.shape and result.out.dtype == case.q.dtype
    assert not (exact & ~case.valid()).any(), "a padding token is exact"
    assert not torch.isnan(result.certificate + result.arithmetic_bound + result.dropped_mass_bound).any()
    assert within_certificate(case, result).all(), f"the certificate of {policy.spec} was violated"
    fuzz = case.q.shape[2] * 2.0**-52 * absolute_scores(case)
    relevant = case.valid() & (truth - fuzz >= result.tau.double()[..., None])
    assert not (relevant & ~exact).any(), f"{policy.spec} treats a key above its tau inexactly"
    dropped = torch.where(exact | ~case.valid(), 0.0, true_masses(case)).sum(-1)
    if policy.drops:
        assert (dropped <= result.dropped_mass_bound.double() * (1 + 1e-9) + 1e-15).all()
    else:
        assert (result.dropped_mass_bound == 0).all()
    assert num_asked_violations(case, result, policy) == 0, f"{policy.spec} did not deliver what was asked"


def num_asked_violations(case, result, policy):
    """Query heads whose certificate exceeds what the policy asked for; where arithmetic alone does, nothing may be left to it."""
    asked = asked_mass(policy)
    violations = 0 if asked is None else int((~(result.dropped_mass_bound <= asked)).sum())
    if isinstance(policy, OutputError):
        known = torch.isfinite(true_attention(case)).all(-1) & torch.isfinite(result.arithmetic_bound)
        total = result.certificate + result.arithmetic_bound
        met = (result.certificate == 0) | (total <= policy.error * result.out.float().norm(dim=-1))
        violations += int((known & ~met).sum())
    return violations


@backends
@given(case=cases(), part=st.integers(0, 2))
def test_every_policy_keeps_its_certificate(backend, case, part):
    index = case.index(backend)
    for policy in policies_to_try(case.keys.shape[2], case.q.shape[1])[part::3]:
        check_step(case, attend(case.q, index, policy=policy, record=True), policy)


@given(case=cases())
def test_a_flat_index_keeps_its_certificate(case):
    index = FlatIndex.build(case.keys, case.values, kv_start=case.kv_start, kv_len=case.kv_len)
    for policy in policies_to_try(case.keys.shape[2], case.q.shape[1]):
        if policy.drops or policy.name == "dense":
            check_step(case, attend(case.q, index, policy=policy, record=True), policy)


@backends
@given(case=cases(("offset", "spread", "duplicates", "flat"), max_blocks=3))
def test_certificates_hold_for_any_scale(backend, case):
    index = case.index(backend)
    for scale in (1e-3, 1.0, 30.0):
        scaled = true_scores(case) * scale
        logits = torch.where(case.valid(), scaled, -torch.inf)
        weights = torch.nan_to_num(logits.softmax(-1), nan=0.0) if logits.shape[-1] else logits
        truth = (weights.unflatten(1, (case.keys.shape[1], -1)) @ case.values.double()).flatten(1, 2)
        for spec in ("exact:0.05", "topk:3"):
            result = attend(case.q, index, policy=spec, softmax_scale=scale)
            error = (truth - result.out.double()).norm(dim=-1)
            assert (error <= (result.certificate.double() + result.arithmetic_bound) * (1 + 1e-9) + 1e-12).all()


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_exact_everywhere_is_dense_attention_within_arithmetic(backend, dtype):
    case = build_case(5, kv_len=300, head_dim=128, group_size=4, dtype=dtype)
    result = attend(case.q, case.index(backend), policy="exact:1.0", record=True)
    assert (result.certificate == 0).all()
    assert torch.equal(result.exact_mask, case.valid().expand_as(result.exact_mask))
    error = (true_attention(case) - result.out.double()).norm(dim=-1)
    assert (error <= result.arithmetic_bound).all()
    assert (result.arithmetic_bound <= 0.02 * true_attention(case).norm(dim=-1)).all(), "the bound says nothing"


@backends
def test_certificates_are_tight_enough_to_inform(backend):
    """Keys that gather around a few directions: a certificate below the trivial one, and an error far below that."""
    case = build_case(5, kv_len=512, head_dim=64, batch=1)
    result = attend(case.q * 0.5, case.index(backend), policy="exact:0.2+unread:0.01")
    trivial = case.values.float().norm(dim=-1).amax()
    assert (result.certificate < trivial).all()


@backends
@pytest.mark.parametrize("seed", range(5))
def test_values_near_their_mean_count_by_their_distance_from_the_output(backend, seed):
    """Sketched keys share one value, an open key pulls the output away from it: what their weights miss moves the output far."""
    case = build_case(seed, kv_len=65, batch=1)
    case.values[:, :, :64] = 1.0
    store = DeviceStore()
    store.append(case.keys[:, :, :64], case.values[:, :, :64])
    index = SketchIndex(store, config=case.config, backend=backend)
    index.refresh()  # the mean is that of the 64
    case.values[:, :, 64] = 1000.0
    case.keys[:, :, 64] = case.q[:, :: case.group_size] * 0.4
    store.append(case.keys[:, :, 64:], case.values[:, :, 64:])
    result = attend(case.q, index, policy="exact:0.01", record=True)
    check_step(case, result, parse("exact:0.01"))
    assert ((true_attention(case) - result.out).norm(dim=-1) > 10 * result.arithmetic_bound).any(), (
        "nothing was at stake"
    )


@backends
@pytest.mark.parametrize("trait", TRAITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_hardship_on_its_own(backend, trait, dtype):
    case = build_case(11, kv_len=70, dtype=dtype, traits=frozenset({trait}), ragged=True)
    index, part = case.index(backend), DTYPES.index(dtype)  # a third of the policies each: every trait meets all
    for policy in policies_to_try(70, case.q.shape[1])[part::3]:
        check_step(case, attend(case.q, index, policy=policy, record=True), policy)


@backends
@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("spec", ["exact:0.1", "exact:1.0", "topk:4", "fixed:0"])
def test_what_is_not_finite_behaves_as_in_dense_attention(backend, bad, where, spec):
    """Where dense attention is finite so is Louver, and the bounds hold or say that they know nothing."""
    case = build_case(3, kv_len=40, batch=1, config=None)
    getattr(case, where)[0, 0, 5, 7] = bad
    result = attend(case.q, case.index(backend), policy=spec, record=True)
    dense = attend(case.q, case.index(backend), policy="dense")
    if where == "keys" or spec.startswith("exact"):
        assert torch.equal(torch.isfinite(result.out).all(-1), torch.isfinite(dense.out).all(-1))
    assert result.exact_mask[0, : case.group_size, 5].all()
    fine = torch.isfinite(true_attention(case)).all(-1)
    error = (true_attention(case) - result.out.double()).norm(dim=-1)
    assert (error <= result.certificate + result.arithmetic_bound)[fine].all()
    assert torch.isfinite(result.out[0, case.group_size :]).all(), "another KV head was harmed"


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("make", [FlatIndex.build, BallIndex.build, SketchIndex.build])
def test_bounds_are_infinite_where_dense_attention_is_not_finite(make, where, bad):
    """Whatever the index: a finite bound, or NaN, would claim something of an output that nothing is true of."""
    case = build_case(3, kv_len=40, batch=1)
    getattr(case, where)[0, 0, 5, 7] = bad
    index = make(case.keys, case.values)
    unknown = ~torch.isfinite(true_attention(case)).all(-1)
    assert unknown.any()
    for spec in ("topk:4", "fixed:0", "mass:0.1", "relative:3", "dense"):
        result = attend(case.q, index, policy=spec)
        bound = result.certificate + result.arithmetic_bound
        assert torch.isinf(bound[unknown]).all(), spec
        assert not torch.isnan(bound).any(), spec


@pytest.mark.parametrize("make", [FlatIndex.build, BallIndex.build, SketchIndex.build])
@pytest.mark.parametrize("spec", ["topk:40", "budget:1", "dense", "mass:0.1"])
def test_an_output_that_overflows_its_dtype_has_an_infinite_bound(make, spec):
    """Values of another dtype than the query: 1e20 in bfloat16 is far beyond what float16 holds."""
    case = build_case(3, kv_len=40, batch=1)
    values = (case.values * 1e20).bfloat16()
    result = attend(case.q.half(), make(case.keys.half(), values), policy=spec)
    assert torch.isinf(result.out).any() and torch.isinf(result.certificate + result.arithmetic_bound).all()


@pytest.mark.parametrize("spec", ["dense", "topk:9", "exact:0.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certificates_hold_under_autocast(spec, dtype):
    case = build_case(6, kv_len=120, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        results = [attend(case.q, case.index(), policy=spec, record=True)]
        if spec != "exact:0.1":
            results.append(attend(case.q, FlatIndex.build(case.keys, case.values), policy=spec, record=True))
    for result in results:
        check_step(case, result, parse(spec))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dense_arithmetic_counts_the_rounding_of_16_bit_weights(dtype):
    """Equal values, and weights just above a half that all round the same way: more than the output's own rounding."""
    keys, q = torch.zeros(1, 1, 512, 64), torch.zeros(1, 1, 64)
    q[..., 0] = 8
    for weight in torch.linspace(0.5, 0.51, 20).tolist():
        keys[0, 0, 1:, 0] = math.log(weight)
        for value in (1.0, 1.25):
            values = torch.full_like(keys, value).to(dtype)
            result = attend(q.to(dtype), FlatIndex.build(keys.to(dtype), values), policy="dense")
            error = (result.out.double() - values[0, 0, 0].double()).norm(dim=-1)
            assert (error <= result.arithmetic_bound).all()


def test_values_from_elsewhere_have_no_certificate_but_the_right_answer():
    case = build_case(2, kv_len=90)
    other = torch.randn_like(case.values)
    result = attend(case.q, case.index(), other, policy="topk:5", record=True)
    kept = torch.where(case.valid() & result.exact_mask, true_scores(case) * case.softmax_scale, -torch.inf).softmax(-1)
    truth = (kept.unflatten(1, (2, -1)) @ other.double()).flatten(1, 2)
    torch.testing.assert_close(result.out.double(), truth, atol=1e-5, rtol=1e-4)
    assert torch.isinf(result.certificate).all()


@backends
def test_what_is_kept_keeps_its_weight_beside_a_key_that_is_not(backend):
    """fixed:X: one head's open block lies 88 nats below a key that only the other head keeps."""
    keys, values, q = torch.zeros(1, 1, 228, 64), torch.zeros(1, 1, 228, 64), torch.zeros(1, 2, 64)
    q[0, 0, 0] = q[0, 1, 1] = 1
    keys[0, 0, :128, :2] = -300
    keys[0, 0, 0, :2] = torch.tensor([50.0, 200.0])
    keys[0, 0, 128:, 0] = -38
    values[0, 0, 128:, 0] = 1
    result = attend(
        q, SketchIndex.build(keys, values, backend=backend), policy="fixed:100", softmax_scale=1.0, record=True
    )
    assert result.exact_mask.sum(-1).tolist() == [[100, 101]]
    assert result.out[0, 0, 0] == 1 and torch.isfinite(result.lse).all()


@backends
@pytest.mark.parametrize("spec", ["exact:1.0", "error:0.05"])
def test_where_every_key_is_exact_no_size_of_values_makes_a_certificate(backend, spec):
    keys, values, q = torch.randn(1, 1, 300, 64), torch.randn(1, 1, 300, 64) * 1e20, torch.randn(1, 2, 64)
    result = attend(q, SketchIndex.build(keys, values, backend=backend), policy=spec, record=True)
    assert result.exact_mask.all() and torch.isfinite(result.out).all()
    assert (result.certificate == 0).all()


@backends
def test_a_dropped_share_that_underflows_is_not_nothing(backend):
    """Every weight dropped is e^-130 or less of what is kept: more than float32 can hold, and more than nothing."""
    keys, values, q = torch.zeros(1, 1, 257, 64), torch.randn(1, 1, 257, 64), torch.zeros(1, 1, 64)
    q[0, 0, 0], keys[0, 0, :256, 0], keys[0, 0, 256, 0] = 1, -120, 10
    result = attend(
        q, SketchIndex.build(keys, values, backend=backend), policy="fixed:5", softmax_scale=1.0, record=True
    )
    assert not result.exact_mask[..., :256].any()
    assert (result.dropped_mass_bound > 0).all() and (result.certificate > 0).all()


@backends
@pytest.mark.parametrize("logit", [-6e3, -700.0, 0.0, 700.0, 5e3, 6e3])
def test_dropped_mass_is_bounded_wherever_on_the_axis_the_scores_lie(backend, logit):
    """A channel that all keys share moves every logit; what is dropped keeps its share."""
    generator = torch.Generator().manual_seed(5)
    keys, values, q = (torch.randn(1, 1, n, 64, generator=generator) for n in (1000, 1000, 1))
    q, keys[..., 0] = q[:, :, 0], logit
    q[..., 0] = 1
    result = attend(
        q,
        SketchIndex.build(keys, values, backend=backend),
        policy="budget:0.01",
        softmax_scale=1.0,
        record=True,
    )
    shares = (q.double()[:, :, None] @ keys.double().mT)[:, :, 0].softmax(-1)
    dropped = torch.where(result.exact_mask, 0.0, shares).sum(-1)
    assert not result.exact_mask.all() and (dropped <= result.dropped_mass_bound.double()).all()
    assert (result.dropped_mass_bound < dropped + 0.5).all()
