"""The query in whole numbers, as the CUDA scan computes it, against exact rational arithmetic."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from louver.geometry.rounded_query import QUANTA, quantized_query_slack
from strategies import generator, seeds

WHOLE = np.float32(12582912.0)  # 1.5 2^23


def quantized(x: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.float32, np.float32]:
    """p, its step, and the largest channel of the scaled query, in the scan's own operations."""
    part = (x * sigma).astype(np.float32)
    size = np.float32(max(np.abs(part).max(), np.float32(1e-30)))
    inverse = np.float32(np.float32(QUANTA) / size) * np.float32(1 - 2.0**-22)  # as far off as a fast division may be
    # One rounding of the exact sum, as a fused multiply-add does it.
    summed = (part.astype(np.longdouble) * np.longdouble(inverse) + np.longdouble(WHOLE + np.float32(128))).astype(
        np.float32
    )
    bits = summed.view(np.int32) & 0xFFFF
    low, high = (bits & 255) ^ 128, bits >> 8
    signed = [np.where(byte > 127, byte - 256, byte) for byte in (low, high)]
    return signed[1] * 256 + signed[0], np.float32(size * np.float32(1 / QUANTA)), size


@given(seed=seeds(), dims=st.sampled_from((64, 128, 256)), power=st.sampled_from((0, 6, -6, -36)))
def test_quantized_query_is_within_its_slack(seed, dims, power):
    random = generator(seed)
    x = (torch.randn(dims, generator=random) * 10.0**power).numpy()
    sigma = (2.0 ** torch.randint(-8, 3, (dims,), generator=random)).float().numpy() * np.float32(1.0905077)
    p, step, size = quantized(x, sigma)
    assert np.abs(p).max() <= QUANTA
    scaled, _, fixed = quantized_query_slack(dims)
    for codes in (np.where(p > 0, 0, 15), torch.randint(0, 16, (dims,), generator=random).numpy()):
        exact = sum(
            (
                Fraction(int(c) - 8) * Fraction(float(a)) * Fraction(float(s))
                for c, a, s in zip(codes, x, sigma, strict=True)
            ),
            Fraction(0),
        )
        computed = Fraction(float(step)) * int(((codes - 8) * p).sum())
        assert abs(computed - exact) <= Fraction(scaled) * Fraction(float(size)) + Fraction(fixed)


def test_every_quantum_is_two_signed_bytes():
    for p in (-QUANTA, -129, -128, -1, 0, 127, 128, QUANTA):
        bits = int((WHOLE + np.float32(128 + p)).view(np.int32)) & 0xFFFF
        low, high = (bits & 255) ^ 128, bits >> 8
        assert p == 256 * (high - 256 * (high > 127)) + (low - 256 * (low > 127))


@pytest.mark.parametrize("dims", [64, 128, 256])
def test_half_width_with_bytes_as_floats_is_never_smaller(dims):
    """Radii are read as 32,768 + code; the sums that take the 32,768 away again may only widen."""
    random = generator(dims)
    slices = {64: 1, 128: 2, 256: 4}[dims]
    for _ in range(200):
        factors = (torch.rand(slices, generator=random) * 50).numpy().astype(np.float32)
        codes = torch.randint(0, 255, (slices,), generator=random).numpy()
        width = np.float32(0.0)
        for f in factors:
            width = np.float32(width - np.float32(np.float32(32768 - 2.0**-6) * f))
        for c, f in zip(codes, factors, strict=True):
            width = np.float32(np.longdouble(32768 + int(c)) * np.longdouble(f) + np.longdouble(width))
        exact = sum(Fraction(int(c)) * Fraction(float(f)) for c, f in zip(codes, factors, strict=True))
        assert Fraction(float(width)) >= exact
