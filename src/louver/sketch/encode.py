"""Fitting a frame to a block and bounding what it misses: the specification every backend's encoder must satisfy.

An encoder is free to choose frames and codes (they set the speed); it is bound by one promise: the radius, decoded, is at least
the real norm of what the codes miss. Here that norm is taken in float64 and rounded up.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from louver.geometry.bounds import slice_lengths
from louver.geometry.rounding import round_up_float32
from louver.sketch.layout import CODE_ZERO, LARGEST_FRAMED, NO_BOUND, SCALES

LEVELS = 16
CLIP_STEPS = (1, 0, -1, -2, -3, -4, -5)  # eighths of an octave around the scale that spans the range


class Frames(NamedTuple):
    """Codes and frames of n blocks; ``residual`` is x minus its decoded value, float64, zero where x is not representable."""

    codes: UInt8[Tensor, "*lead n frame_len dims"]
    center: Float[Tensor, "*lead n dims"]  # float16
    scale: UInt8[Tensor, "*lead n dims"]
    residual: Float[Tensor, "*lead n frame_len dims"]


def representable(x: Float[Tensor, "*lead n frame_len dims"]) -> Bool[Tensor, "*lead n frame_len"]:
    """True for tokens a frame can hold: finite, and within the range of a float16 center in every channel."""
    return (x.abs() <= LARGEST_FRAMED).all(-1)


def fit_frames(
    x: Float[Tensor, "*lead n frame_len dims"], valid: Bool[Tensor, "*lead n frame_len"], clip: bool
) -> Frames:
    """Choose a frame per block and channel for the valid tokens and code them; other tokens get the center.

    x is float32. With clip, the scale is the one with the least squared error among CLIP_STEPS.
    """
    scales = SCALES.to(x.device)
    keep = valid[..., None]
    low = torch.where(keep, x, torch.inf).amin(-2)
    high = torch.where(keep, x, -torch.inf).amax(-2)
    empty = low > high
    low, high = torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)
    x = torch.where(keep, x, ((low + high) / 2)[..., None, :])

    middle = (low + high) / 2
    reach = (high - low) / LEVELS
    full = (8 * (torch.log2(reach.clamp_min(2.0**-30)) + 18)).ceil()
    best_code = (full + CLIP_STEPS[0]).clamp(0, 255).to(torch.int64)
    best_error = torch.full_like(middle, torch.inf)
    for step in CLIP_STEPS if clip else ():
        code = (full + step).clamp(0, 255).to(torch.int64)
        scale = scales[code]
        center = (middle + scale / 2).half().float()
        error = (_decode(_codes(x, center, scale), center, scale) - x).square().sum(-2)
        better = error < best_error
        best_error, best_code = torch.where(better, error, best_error), torch.where(better, code, best_code)
    scale = scales[best_code]
    center = (middle + scale / 2).half()
    codes = _codes(x, center.float(), scale)
    residual = x.double() - _decode(codes.double(), center.double(), scale.double())
    return Frames(codes.to(torch.uint8), center, best_code.to(torch.uint8), residual * keep)


def _codes(x: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    return ((x - center[..., None, :]) / scale[..., None, :]).round().add_(CODE_ZERO).clamp_(0, LEVELS - 1)


def _decode(codes: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    return (codes - CODE_ZERO) * scale[..., None, :] + center[..., None, :]


def encode_radii(
    residual: Float[Tensor, "*lead n frame_len dims"],
    valid: Bool[Tensor, "*lead n frame_len"],
    inverse_weight: Float[Tensor, "*lead n dims"],
    slice_dims: int,
) -> tuple[UInt8[Tensor, "*lead n frame_len slices"], Float[Tensor, "*lead n slices"]]:
    """Radius codes and units: code * unit, in real arithmetic, is at least the residual's norm in every slice."""
    squares = residual.square() / inverse_weight.double()[..., None, :]
    parts = squares.split(slice_lengths(residual.shape[-1], slice_dims), -1)
    norms = torch.stack([p.sum(-1) for p in parts], -1).sqrt() * (1 + 2.0**-40)  # float64 rounding of the norm itself
    unit = round_up_float32(norms.amax(-2) / (NO_BOUND - 2)).clamp_min(2.0**-100)
    codes = (norms / unit.double()[..., None, :]).ceil() + 0.0
    codes = codes + (codes * unit.double()[..., None, :] < norms)
    assert (codes < NO_BOUND).all(), "a radius outgrew its unit"
    codes = torch.where(valid[..., None], codes, float(NO_BOUND))
    return codes.to(torch.uint8), unit


def decode_frames(
    codes: UInt8[Tensor, "*lead frame_len dims"],
    center: Float[Tensor, "*lead dims"],
    scale: UInt8[Tensor, "*lead dims"],
) -> Float[Tensor, "*lead frame_len dims"]:
    """Sketched keys or values in float32, two roundings per element."""
    return _decode(codes.float(), center.float(), SCALES.to(codes.device)[scale.long()])
