"""Fitting a frame to a block and bounding what it misses: the specification every backend's encoder must satisfy.

An encoder is free to choose frames and codes (they set the speed); it is bound by one promise: the radius, decoded, is at least
the real norm of what the codes miss. Here that norm is taken in float64 and rounded up.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from louver.geometry.bounds import slice_lengths
from louver.geometry.rounding import round_down_float32, round_up_float32
from louver.sketch.layout import (
    CENTERS,
    CODE_ZERO,
    FALLS,
    LARGEST_FRAMED,
    NO_BOUND,
    SCALES,
    frame_centers,
    frame_scales,
    pack_frame,
)

LEVELS = 16
CLIP_STEPS = (1, 0, -1, -2, -3, -4, -5)  # eighths of an octave around the scale that spans the range


class Frames(NamedTuple):
    """Codes and frames of n blocks; ``residual`` is x minus its decoded value, float64, zero where x is not representable."""

    codes: UInt8[Tensor, "*lead n frame_len dims"]
    frame: Int[Tensor, "*lead n dims"]  # int16
    scale: UInt8[Tensor, "*lead n"]
    residual: Float[Tensor, "*lead n frame_len dims"]


def representable(x: Float[Tensor, "*lead n frame_len dims"]) -> Bool[Tensor, "*lead n frame_len"]:
    """True for tokens a frame can hold: finite, and no larger than LARGEST_FRAMED in any channel."""
    return (x.abs() <= LARGEST_FRAMED).all(-1)


def fit_frames(
    x: Float[Tensor, "*lead n frame_len dims"], valid: Bool[Tensor, "*lead n frame_len"], clip: bool
) -> Frames:
    """Choose a frame per block and channel for the valid tokens and code them; other tokens get the center.

    x is float32. With clip, the scale is the one with the least sum of errors' fourth powers among CLIP_STEPS: what a query looks
    for stands out, so large errors cost more than their squares. No channel's scale is finer than its center can be counted in,
    nor than the block's widest allows.
    """
    scales = SCALES.to(x.device)
    keep = valid[..., None]
    low = torch.where(keep, x, torch.inf).amin(-2)
    high = torch.where(keep, x, -torch.inf).amax(-2)
    empty = low > high
    low, high = torch.where(empty, 0.0, low), torch.where(empty, 0.0, high)
    x = torch.where(keep, x, ((low + high) / 2)[..., None, :])

    middle = (low + high) / 2
    full = _scale_code((high - low) / LEVELS)
    finest = _scale_code(middle.abs() / (CENTERS / 2 - 2))
    widest = (torch.maximum(full, finest) + CLIP_STEPS[0]).clamp(0, 255).amax(-1, keepdim=True)
    finest = torch.maximum(finest, widest - (FALLS - 1)).clamp(0, 255)

    def code_at(step: int) -> Tensor:
        return torch.minimum(torch.maximum(full + step, finest), widest).to(torch.int64)

    best_code = code_at(CLIP_STEPS[0])
    best_error = torch.full_like(middle, torch.inf)
    for step in CLIP_STEPS if clip else ():
        code = code_at(step)
        scale = scales[code]
        center = _center(middle, scale)
        error = (_decode(_codes(x, center, scale), center, scale) - x).square().square().sum(-2)
        better = error < best_error
        best_error, best_code = torch.where(better, error, best_error), torch.where(better, code, best_code)
    scale = scales[best_code]
    center = _center(middle, scale)
    codes = _codes(x, center, scale)
    residual = x.double() - _decode(codes.double(), center.double(), scale.double())
    frame = pack_frame(center, widest.long() - best_code)
    return Frames(codes.to(torch.uint8), frame, widest[..., 0].to(torch.uint8), residual * keep)


def _scale_code(reach: Tensor) -> Tensor:
    """The finest scale, as a whole number of eighths of an octave, that is at least reach; not yet within 0..255."""
    return (8 * (torch.log2(reach.clamp_min(2.0**-30)) + 18)).ceil()


def _center(middle: Tensor, scale: Tensor) -> Tensor:
    """The center, in whole halves of the scale; codes reach a step further down than up."""
    return (2 * (middle / scale) + 1).round().clamp_(-CENTERS, CENTERS - 1) / 2


def _codes(x: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    return (x / scale[..., None, :] - center[..., None, :]).round().add_(CODE_ZERO).clamp_(0, LEVELS - 1)


def _decode(codes: Tensor, center: Tensor, scale: Tensor) -> Tensor:
    return (codes - CODE_ZERO + center[..., None, :]) * scale[..., None, :]


class Radii(NamedTuple):
    """Radii of n blocks: least + code * unit."""

    codes: UInt8[Tensor, "*lead n frame_len slices"]
    least: Float[Tensor, "*lead n slices"]  # float32
    unit: Float[Tensor, "*lead n slices"]  # float32


def encode_radii(
    residual: Float[Tensor, "*lead n frame_len dims"],
    valid: Bool[Tensor, "*lead n frame_len"],
    inverse_weight: Float[Tensor, "*lead n dims"],
    slice_dims: int,
) -> Radii:
    """Radii that, in real arithmetic, are at least the residual's norm in every slice."""
    squares = residual.square() / inverse_weight.double()[..., None, :]
    parts = squares.split(slice_lengths(residual.shape[-1], slice_dims), -1)
    norms = torch.stack([p.sum(-1) for p in parts], -1).sqrt() * (1 + 2.0**-40)  # float64 rounding of the norm itself
    known = valid[..., None]
    least = round_down_float32(torch.where(known, norms, torch.inf).amin(-2))
    least = torch.where(torch.isfinite(least) & (least >= 2.0**-100), least, 0.0)
    above = torch.where(known, norms - least.double()[..., None, :], 0.0)
    unit = round_up_float32(above.amax(-2) * (1 + 2.0**-20) / (NO_BOUND - 1)).clamp_min(2.0**-100)
    codes = (above / unit.double()[..., None, :]).ceil() + 0.0
    codes = codes + (codes * unit.double()[..., None, :] < above)
    assert (codes < NO_BOUND).all(), "a radius outgrew its unit"
    return Radii(torch.where(known, codes, float(NO_BOUND)).to(torch.uint8), least, unit)


def decode_frames(
    codes: UInt8[Tensor, "*lead frame_len dims"],
    frame: Int[Tensor, "*lead dims"],
    scale: UInt8[Tensor, "*lead"],
) -> Float[Tensor, "*lead frame_len dims"]:
    """Sketched keys or values in float32, one rounding per element."""
    return _decode(codes.float(), frame_centers(frame), frame_scales(frame, scale))
