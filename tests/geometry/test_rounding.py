"""Every slack against exact rational arithmetic."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from louver.geometry.rounding import (
    LARGEST_SUM,
    gamma,
    logit_slack,
    norm_above,
    round_up_float32,
    score_slack,
    sum_inflation,
)
from louver.kernels.reference.product import matmul
from strategies import generator, seeds


def exact_dot(x: torch.Tensor, y: torch.Tensor) -> Fraction:
    return sum((Fraction(a) * Fraction(b) for a, b in zip(x.tolist(), y.tolist(), strict=True)), Fraction(0))


def sequential_dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The least accurate order: one running sum."""
    total = torch.zeros(())
    for term in x * y:
        total = total + term
    return total


@given(seed=seeds(), dims=st.sampled_from((1, 2, 33, 256)), power=st.sampled_from((0, 6, 30, -38, -44)))
def test_score_slack_covers_any_order_of_summation(seed, dims, power):
    random = generator(seed)
    x, y = (torch.randn(dims, generator=random) for _ in range(2))
    x = x * 10.0 ** (power / 2) * 10 ** (3 * torch.rand(dims, generator=random))
    y = y * 10.0 ** (power / 2)
    y[dims // 2 :] = torch.flip(y[: dims - dims // 2], (0,))  # near-cancellation
    real = exact_dot(x, y)
    for computed, absolute in ((sequential_dot(x, y), sequential_dot(x.abs(), y.abs())), (x @ y, x.abs() @ y.abs())):
        slack = score_slack(absolute, dims)
        # The slack has room for the rounding of these two sums as well.
        assert Fraction((computed - slack).item()) <= real <= Fraction((computed + slack).item())


def test_score_slack_covers_products_that_underflow():
    """Every product and every absolute product comes out as 0, and the sum is not 0."""
    x, y = torch.full((256,), 2.0**-75), torch.full((256,), 1.5 * 2.0**-76)
    assert x @ y == 0 and exact_dot(x, y) > 0
    slack = score_slack(x.abs() @ y.abs(), 256)
    assert Fraction((x @ y + slack).item()) >= exact_dot(x, y)


def test_score_slack_is_infinite_where_the_sum_may_have_overflowed():
    assert torch.isinf(score_slack(torch.tensor([LARGEST_SUM, 3e38, torch.inf, torch.nan]), 64)).all()
    assert torch.isfinite(score_slack(torch.tensor([0.0, LARGEST_SUM / 2]), 64)).all()


@given(seed=seeds(), scale=st.sampled_from((1e-3, 1.0, 30.0)))
def test_logit_slack_covers_the_computed_weight(seed, scale):
    score = torch.randn(200, generator=generator(seed)) * 40 / scale
    softmax_scale = 0.08838834764831845 * scale  # not a float32 number
    shift = (score * softmax_scale).max()
    weight = torch.exp(score * softmax_scale - shift)
    real = torch.exp(score.double() * softmax_scale - shift.double())
    slack = logit_slack((score * softmax_scale).abs() + shift.abs()).double()
    seen = weight > 1e-37
    assert ((weight.double() / real).log().abs() <= slack)[seen].all()


def test_logit_slack_covers_the_exponential_itself():
    """Logits near the peak, whose own rounding is next to nothing: what is left is the exponential's."""
    logit = -torch.linspace(1e-5, 0.05, 5000)
    off = (torch.exp(logit).double().log() - logit.double()).abs()
    assert off.max() > 0.3 * 2.0**-24, "nothing was at stake"
    assert (off <= logit_slack(logit.abs()).double()).all()


@given(seed=seeds(), terms=st.integers(1, 3000))
def test_sum_inflation_covers_the_real_sum(seed, terms):
    x = torch.rand(terms, generator=generator(seed)) ** 8
    running = torch.cumsum(x, 0)[-1]
    for computed in (running, x.sum()):
        assert computed * sum_inflation(terms) >= x.double().sum()


@given(seed=seeds(), dims=st.sampled_from((1, 64, 256, 4096)), power=st.sampled_from((-44, -30, -20, 0, 18, 30)))
def test_norm_above_is_above(seed, dims, power):
    x = (torch.randn(dims, generator=generator(seed)).double() * 10.0**power).float()
    norm = x.double().norm()
    assert norm_above(x) >= norm
    assert torch.isinf(norm_above(x)) or norm_above(x) <= norm * (1 + 1e-3) + dims**0.5 * 1e-18


@given(x=st.floats(0, 1e38, allow_subnormal=True))
def test_round_up_float32_is_the_next_float32(x):
    exact = torch.tensor([x], dtype=torch.float64)
    up = round_up_float32(exact)
    assert up.double() >= exact
    below = torch.nextafter(up, torch.tensor([-torch.inf]))
    assert below.double() < exact or x == 0


def test_round_up_float32_rounds_up_what_lies_just_above_a_float32():
    above = torch.tensor([1 + 2.0**-30, 1 + 2.0**-24, 3e38 * (1 + 2.0**-50), 2.0**-140 * 1.1], dtype=torch.float64)
    assert (round_up_float32(above).double() >= above).all()


def test_gamma_is_highams():
    assert gamma(10) == pytest.approx(10 * 2.0**-24 / (1 - 10 * 2.0**-24), rel=1e-15)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_stay_float32_under_any_setting(precision):
    x, y = torch.randn(64, 512), torch.randn(512, 256)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            product = matmul(x, y)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert product.dtype == torch.float32
    error = (product.double() - x.double() @ y.double()).abs()
    assert (error <= score_slack(x.abs() @ y.abs(), 512)).all()
