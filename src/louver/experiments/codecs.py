"""Ways to code a key in a few bits, each with bounds on its score: what the sketch's layout was chosen from.

All arithmetic is float64, so the bounds are those of real arithmetic to 2^-40 and a codec's guarantee is "exact". Every key is
decoded value + what the codes missed, and a radius per slice of channels bounds the norm of the latter in a metric.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from louver.geometry.bounds import slice_lengths
from louver.geometry.metric import inverse_weight, query_weight

CodecMetric = Literal["frame", "diagonal", "identity", "full"]
ROUNDING = 2.0**-40  # relative to the largest terms; float64 leaves 2^-53 times a few hundred operations
CLIP_STEPS = (1, 0, -1, -2, -3, -4, -5)  # eighths of an octave around the scale that spans the range


@dataclass(frozen=True, kw_only=True)
class Plane:
    """Keys as far as the planes read so far know them, float64; inverse is u of geometry/metric.py, per block or key."""

    decoded: Float[Tensor, "heads n dims"]
    radius: Float[Tensor, "heads n slices"]
    inverse: Float[Tensor, "heads #blocks dims"]
    slice_dims: int
    block_len: int  # keys that share one row of inverse
    bytes_per_key: float

    def upper(self, q: Float[Tensor, "heads rows dims"]) -> Float[Tensor, "heads rows n"]:
        """No score exceeds this."""
        parts = slice_lengths(q.shape[2], self.slice_dims)
        norms = (q[:, :, None].square() * self.inverse[:, None]).split(parts, -1)
        norm = torch.stack([x.sum(-1) for x in norms], -1).sqrt()  # heads rows blocks slices
        n, blocks = self.radius.shape[1], norm.shape[2]
        padded = torch.nn.functional.pad(self.radius, (0, 0, 0, blocks * self.block_len - n))
        reach = torch.einsum("hrbs,hbns->hrbn", norm, padded.unflatten(1, (blocks, self.block_len)))
        estimate = q @ self.decoded.mT
        largest = q.norm(dim=-1)[..., None] * self.decoded.norm(dim=-1)[:, None]
        return estimate + reach.flatten(2)[..., :n] * (1 + ROUNDING) + ROUNDING * largest


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The sketch's frames per block and channel, with every choice open. A second plane codes more bits in each cell."""

    bits: int = 4
    more_bits: int = 4
    frame_len: int = 128
    slice_dims: int = 64
    radius_bits: int = 4
    center_steps: int | None = 2  # a center is a whole number of a scale's 1/center_steps; None: a float16 number
    power: int = 4  # of the errors whose sum the choice of a scale minimises
    clip: bool = True
    metric: CodecMetric = "frame"

    def encode(self, keys: Float[Tensor, "heads n dims"], queries: Float[Tensor, "q_heads m dims"]) -> list[Plane]:
        """The first plane, and both together. queries fit the metric."""
        heads, n, dims = keys.shape
        short = -n % self.frame_len
        padded = torch.cat([keys, keys[:, -1:].expand(-1, short, -1)], 1).double()
        x = padded.unflatten(1, (-1, self.frame_len))
        levels = 2**self.bits
        center, scale = self._fit(x, levels)
        first = _code(x - center, scale, levels) + center
        fine = scale / 2**self.more_bits
        middle = first + fine / 2  # codes reach a step further down than up
        second = middle + _code(x - middle, fine, 2**self.more_bits)
        weight = query_weight(queries[None], heads)[0, :, None].double()
        inverse = inverse_weight(scale[:, :, 0], weight, _frame_metric(self.metric))
        slices = len(slice_lengths(dims, self.slice_dims))
        radius_bytes = slices * self.radius_bits / 8
        frame = 3 * dims if self.center_steps is None else 2 * dims + 1
        overhead = (frame + 8 * slices) / self.frame_len
        planes = []
        for decoded, bytes_per_key in (
            (first, dims * self.bits / 8 + radius_bytes + overhead),
            (second, dims * self.more_bits / 8 + radius_bytes + 8 * slices / self.frame_len),
        ):
            radius = _radii(x - decoded, inverse[:, :, None], self.slice_dims, self.radius_bits)
            planes.append(
                Plane(
                    decoded=decoded.flatten(1, 2)[:, :n],
                    radius=radius.flatten(1, 2)[:, :n],
                    inverse=inverse,
                    slice_dims=self.slice_dims,
                    block_len=self.frame_len,
                    bytes_per_key=bytes_per_key,
                )
            )
        return planes

    def _fit(self, x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """Center and scale (eighths of an octave) per block and channel, as sketch/encode.py chooses them."""
        low, high = x.amin(-2, keepdim=True), x.amax(-2, keepdim=True)
        full = (8 * torch.log2(((high - low) / levels).clamp_min(2.0**-30))).ceil()
        best = None
        for step in CLIP_STEPS if self.clip else CLIP_STEPS[:1]:
            scale = torch.exp2((full + step) / 8)
            center = (low + high + scale) / 2
            if self.center_steps is None:
                center = center.half().double()
            else:
                center = (center / scale * self.center_steps).round() * scale / self.center_steps
            error = (x - center - _code(x - center, scale, levels)).abs().pow(self.power).sum(-2, keepdim=True)
            found = (error, center, scale)
            best = (
                found
                if best is None
                else tuple(torch.where(error < best[0], *pair) for pair in zip(found, best, strict=True))
            )
        assert best is not None
        return best[1], best[2]


@dataclass(frozen=True, kw_only=True)
class PerKey:
    """A scale per key and ``scale_dims`` channels, after a change of basis by the metric and without the mean."""

    bits: int = 4
    scale_dims: int = 32
    slice_dims: int = 16
    radius_bits: int = 8
    metric: CodecMetric = "identity"
    power: float = 1 / 8  # of the queries' second moments, in the metrics diagonal and full

    def encode(self, keys: Float[Tensor, "heads n dims"], queries: Float[Tensor, "q_heads m dims"]) -> list[Plane]:
        """The first plane, and both together. queries fit the metric."""
        heads, n, dims = keys.shape
        basis, back = self._basis(queries, heads)
        mean = keys.double().mean(1, keepdim=True)
        y = (keys.double() - mean) @ basis.mT  # scores are q . mean + (q back) . y
        parts = y.split(slice_lengths(dims, self.scale_dims), -1)
        levels = 2**self.bits
        first, second = [], []
        for part in parts:
            low, high = part.amin(-1, keepdim=True), part.amax(-1, keepdim=True)
            center, scale = ((low + high) / 2).half().double(), _step_up((high - low) / levels)
            center = center + scale / 2
            first.append(_code(part - center, scale, levels) + center)
            second.append(first[-1] + _code(part - first[-1], scale / 16, 16))
        slices = len(slice_lengths(dims, self.slice_dims))
        radius_bytes = slices * self.radius_bits / 8
        one = torch.ones(heads, 1, dims, dtype=torch.float64)
        planes = []
        for decoded, bytes_per_key in (
            (torch.cat(first, -1), dims * self.bits / 8 + radius_bytes + 3 * len(parts)),
            (torch.cat(second, -1), dims / 2 + radius_bytes),
        ):
            radius = _radii((y - decoded)[:, :, None], one[:, None], self.slice_dims, self.radius_bits)[:, :, 0]
            planes.append(
                _Based(
                    decoded=decoded,
                    radius=radius,
                    inverse=one,
                    slice_dims=self.slice_dims,
                    block_len=n,
                    bytes_per_key=bytes_per_key,
                    back=back,
                    mean=mean,
                )
            )
        return planes

    def _basis(self, queries: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """A and its inverse, so that q . k = (q A^-1) . (A k): A = E[q q^T]^power.

        A fourth root balances |q A^-1| against residuals that A leaves alone. A scale per key follows the key's largest
        channel, which A stretches where queries are long, and keys are long there too: the eighth root balances those.
        """
        q = queries.double().unflatten(0, (heads, -1)).flatten(1, 2)
        dims = q.shape[2]
        if self.metric == "identity":
            eye = torch.eye(dims, dtype=torch.float64).expand(heads, -1, -1)
            return eye, eye
        cov = q.mT @ q / q.shape[1]
        if self.metric == "diagonal":
            cov = torch.diag_embed(cov.diagonal(dim1=-2, dim2=-1))
        floor = 1e-3 * cov.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        values, vectors = torch.linalg.eigh(cov + floor * torch.eye(dims, dtype=torch.float64))
        return tuple((vectors * values[:, None] ** p) @ vectors.mT for p in (self.power, -self.power))


@dataclass(frozen=True, kw_only=True)
class _Based(Plane):
    back: Tensor
    mean: Tensor

    def upper(self, q: Float[Tensor, "heads rows dims"]) -> Float[Tensor, "heads rows n"]:
        turned = q @ self.back
        return super().upper(turned) + q @ self.mean.mT + 1e-9 * (q.norm(dim=-1) * self.mean.norm(dim=-1))[..., None]


CODECS = {
    "frames": Frames(),
    "frames-64": Frames(frame_len=64),
    "frames-unclipped": Frames(clip=False),
    "frames-radius-32": Frames(slice_dims=32),
    "frames-radius-16": Frames(slice_dims=16),
    "frames-radius-8bit": Frames(radius_bits=8),
    "frames-radius-16bit": Frames(radius_bits=16),
    "frames-center-float16": Frames(center_steps=None),
    "frames-center-whole": Frames(center_steps=1),
    "frames-squares": Frames(power=2),
    "frames-3bit": Frames(bits=3),
    "frames-2+2": Frames(
        bits=2, more_bits=2
    ),  # the four bits of "frames", the lower two read for survivors of the upper two
    "frames-3+1": Frames(bits=3, more_bits=1),
    "key4": PerKey(),
    "key4-radius-32": PerKey(slice_dims=32),
    "key4-fourth-root": PerKey(power=1 / 4),
    "key8": PerKey(bits=8),
}
METRICS: dict[type, tuple[CodecMetric, ...]] = {
    Frames: ("frame", "diagonal", "identity"),
    PerKey: ("identity", "diagonal", "full"),
}


def _code(x: Tensor, scale: Tensor, levels: int) -> Tensor:
    """x as its nearest code in -levels/2 .. levels/2 - 1, decoded."""
    return (x / scale).round().clamp(-levels // 2, levels // 2 - 1) * scale


def _step_up(x: Tensor) -> Tensor:
    return torch.exp2((8 * torch.log2(x.clamp_min(2.0**-30))).ceil() / 8)


def _radii(missed: Tensor, inverse: Tensor, slice_dims: int, bits: int) -> Tensor:
    """Norms of what was missed per slice, rounded up to one of 2^bits - 1 steps from the block's least to its largest."""
    parts = (missed.square() / inverse).split(slice_lengths(missed.shape[-1], slice_dims), -1)
    norms = torch.stack([p.sum(-1) for p in parts], -1).sqrt() * (1 + ROUNDING)
    least = norms.amin(-2, keepdim=True)
    unit = (norms - least).amax(-2, keepdim=True).clamp_min(2.0**-100) / (2**bits - 2)
    return (least + ((norms - least) / unit).ceil() * unit) * (1 + ROUNDING)


def _frame_metric(metric: CodecMetric) -> Literal["frame", "diagonal", "identity"]:
    if metric == "full":
        raise ValueError("frames have no full-matrix metric")
    return metric
