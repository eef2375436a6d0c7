"""The weighted sum of a step in tiers, with proven bounds on its distance from exact attention (docs/guarantee.md, 7-9)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from louver.geometry.rounding import gamma, logit_slack, norm_above, sum_inflation
from louver.kernels.reference.joint import joint_maximum
from louver.kernels.reference.product import matmul
from louver.sketch.layout import Sketch, frame_centers, frame_scales

TINY = 2.0**-125  # more than underflow can take from a weight
SUM_BLOCK = 128  # terms summed at once, then the partial sums: the error grows with their sum, not their product


class Tiers(NamedTuple):
    """Every key of a step in row coordinates: how it is treated, its (estimated) score and how far that can be off."""

    exact: Bool[Tensor, "batch num_q_heads n"]
    coarse: Bool[Tensor, "batch num_q_heads n"]  # sketched value; neither exact nor coarse: the mean value
    present: Bool[Tensor, "batch num_q_heads n"]
    score: Float[Tensor, "batch num_q_heads n"]
    half_width: Float[Tensor, "batch num_q_heads n"]
    values: Float[Tensor, "batch num_kv_heads n head_dim"]  # what each weight is multiplied with
    sketch: Sketch
    exact_norm: Float[Tensor, "batch num_kv_heads n"]  # |v| or a little more
    softmax_scale: float


def certify(tiers: Tiers, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (float32), lse, certificate and arithmetic bound of one step.

    With a_k the weight used, v'_k the value used, s_k the true logit within d_k nats, and o' = sum a v' / sum a:
    |o - o'| <= (1 / Z_low) sum a_k ((e^{d_k} - 1) |v_k - o'| + |v_k - v'_k|). Sketched keys' terms make the certificate (their
    joint maximum where that is less), exact keys' terms (pure rounding) and the error of the sums themselves the arithmetic bound.
    """
    logits = torch.where(tiers.present, tiers.score * tiers.softmax_scale, -torch.inf)
    peak = logits.amax(-1) if logits.shape[-1] else logits.new_full(logits.shape[:-1], -torch.inf)
    shift = torch.where(torch.isneginf(peak), 0.0, peak)[..., None]
    weight = torch.exp(logits - shift)
    off = tiers.half_width * tiers.softmax_scale
    off = off + logit_slack(torch.where(tiers.present, logits.abs(), 0.0) + off + shift.abs())
    ceiling = torch.where(tiers.present, torch.exp(logits - shift + off) + TINY, 0.0)
    floor = torch.where(tiers.present, (torch.exp(logits - shift - off) - TINY).clamp_min(0), 0.0)
    total = _sum(weight)
    safe_total = torch.where(total > 0, total, 1.0)
    num_kv_heads = tiers.values.shape[1]
    out = _weighted_sum(weight, tiers.values) / safe_total[..., None]
    lse = torch.where(total > 0, shift[..., 0] + safe_total.log(), -torch.inf)

    num_terms = SUM_BLOCK + -(-logits.shape[-1] // SUM_BLOCK) + 8  # 8: what is done to a term before it is added
    inflate = sum_inflation(num_terms)
    floor_total = _sum(floor) / inflate
    floor_total = torch.where(total > 0, floor_total, 1.0)

    spread, error, reach = (_per_query_head(x, tiers) for x in _value_distances(tiers))
    size = _per_query_head(torch.where(_shared(tiers.exact, num_kv_heads), tiers.exact_norm, 0.0), tiers)
    used = torch.where(tiers.exact, size, reach)
    out_norm = norm_above(out)
    accumulation = gamma(num_terms + 4) * (_sum(weight * used) * inflate / safe_total + 2 * out_norm)

    sketched = tiers.present & ~tiers.exact
    mean = tiers.sketch.value_mean[:, :, : out.shape[-1]].repeat_interleave(out.shape[1] // num_kv_heads, 1)
    away = (norm_above(mean - out) + accumulation)[..., None]
    surplus = torch.maximum(ceiling - weight, weight - floor)  # |true weight - weight|, at most
    moved = torch.where(sketched, surplus * (spread + away), 0.0)
    coded = torch.where(sketched, weight * error, 0.0)
    nearby = size + (out_norm + accumulation)[..., None]
    rounding = torch.where(tiers.exact & tiers.present, surplus * nearby, 0.0)
    certificate = _sum(moved + coded) * inflate / floor_total
    distance = torch.where(sketched, spread + away, 0.0)
    joint = joint_maximum(weight, floor, ceiling, distance, _sum(coded) * inflate)
    certificate = torch.where(joint < certificate, joint, certificate)  # NaN says nothing
    arithmetic = _sum(rounding) * inflate / floor_total + accumulation
    arithmetic = arithmetic + norm_above(out.to(out_dtype).float() - out)
    return out, lse, _infinite_if_unknown(certificate), _infinite_if_unknown(arithmetic)


def _infinite_if_unknown(bound: Tensor) -> Tensor:
    """A bound that came out as NaN (inf - inf, 0 / 0) says nothing, and nothing is what infinity says."""
    return torch.where(torch.isnan(bound), torch.inf, bound)


def dropped_mass(
    tiers: Tiers, left_out: Tensor, ceiling: Tensor, out: Tensor, arithmetic: Tensor
) -> tuple[Tensor, Tensor]:
    """Bounds on the share of the mass that was dropped, and on what dropping it moved the output by.

    ceiling [batch, num_q_heads, n] is an upper bound on the score of each key left out; out is within arithmetic of the
    real output over the kept keys. The dropped mass is at most U / (K + U) with U the mass of the ceilings and K that of the
    kept keys' floors, computed as logs to be safe from overflow; the output moves by at most the dropped mass times the largest
    distance from the kept keys' output to a value left out.
    """
    upper = _log_mass(ceiling, left_out, tiers.softmax_scale, 1)
    lower = _log_mass(tiers.score - tiers.half_width, tiers.present, tiers.softmax_scale, -1)
    share = torch.sigmoid(upper - lower).float() * (1 + 1e-5) + TINY
    share = torch.where(torch.isnan(share), 1.0, share.clamp_max(1.0))
    share = torch.where(left_out.any(-1), share, 0.0)
    spread = _per_query_head(_value_distances(tiers)[0], tiers)
    furthest = torch.where(left_out, spread, 0.0)
    furthest = furthest.amax(-1) if furthest.shape[-1] else share
    mean = tiers.sketch.value_mean[:, :, : out.shape[-1]].repeat_interleave(out.shape[1] // tiers.values.shape[1], 1)
    moved = share * (furthest + norm_above(mean - out) + arithmetic) * (1 + 1e-5)
    return share, _infinite_if_unknown(torch.where(share > 0, moved, 0.0))


def _log_mass(score: Tensor, where: Tensor, softmax_scale: float, sign: int) -> Tensor:
    """log of the sum of e^(softmax_scale * score), rounded up (sign 1) or down (-1); float64, which leaves rounding tiny."""
    logit = torch.where(where, score.double() * softmax_scale, -torch.inf)
    if not logit.shape[-1]:
        return logit.new_full(logit.shape[:-1], -torch.inf)
    peak = logit.amax(-1)
    slack = 1e-8 + 2.0**-48 * torch.where(torch.isfinite(peak), peak.abs(), 0.0)
    return torch.logsumexp(logit, -1) + sign * slack


def _value_distances(tiers: Tiers) -> tuple[Tensor, Tensor, Tensor]:
    """Per key and KV head: |v - mean| at most, |v - value used| at most (sketched keys), |value used| at most."""
    sketch, n = tiers.sketch, tiers.values.shape[2]
    num_kv_heads, frame_len = tiers.values.shape[1], sketch.config.frame_len
    num_blocks = int(sketch.num_blocks.max()) if sketch.num_blocks.numel() else 0

    def spread_out(x: Tensor) -> Tensor:
        per_key = x[:, :, :num_blocks].repeat_interleave(frame_len, -1)
        return torch.nn.functional.pad(per_key, (0, n - per_key.shape[-1]), value=torch.inf)

    coarse = _shared(tiers.coarse, num_kv_heads)
    spread = spread_out(sketch.value_spread)
    mean_norm = norm_above(sketch.value_mean)[..., None]
    frames = sketch.value_frames
    if frames is None:
        return spread, spread, mean_norm.expand_as(spread)
    extent = (frame_centers(frames.frame).abs() + 8) * frame_scales(frames.frame, frames.scale)
    reach = spread_out(norm_above(extent))
    error = spread_out(frames.error)
    return spread, torch.where(coarse, error, spread), torch.where(coarse, reach, mean_norm)


def _shared(mask: Tensor, num_kv_heads: int) -> Tensor:
    return mask.unflatten(1, (num_kv_heads, -1)).any(2)


def _per_query_head(x: Tensor, tiers: Tiers) -> Tensor:
    return x.repeat_interleave(tiers.score.shape[1] // x.shape[1], 1)


def _blocks(x: Tensor) -> Tensor:
    """[..., n] as [..., blocks, SUM_BLOCK], zero-padded."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % SUM_BLOCK)).unflatten(-1, (-1, SUM_BLOCK))


def _sum(x: Tensor) -> Tensor:
    return _blocks(x).sum(-1).sum(-1)


def _weighted_sum(weight: Tensor, values: Tensor) -> Tensor:
    """sum_k weight_k values_k per query head, in two levels."""
    num_kv_heads = values.shape[1]
    w = _blocks(weight).unflatten(1, (num_kv_heads, -1)).transpose(2, 3)  # batch kv blocks group SUM_BLOCK
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[2] % SUM_BLOCK)).unflatten(2, (-1, SUM_BLOCK))
    return matmul(w, padded).sum(2).flatten(1, 2)
