"""The sketch of one layer's cache, in the one canonical layout every backend and every file uses.

A block is ``frame_len`` consecutive tokens of one KV head, counted from the row's first valid token. Per block and channel a
frame (a scale, and a center that is a whole number of half scales) spans the range; a key is one 4-bit code per channel,

    k_d  ~  (center_d / 2 + code_d - 8) scale_d,    code in 0..15,  center in -512..511,
    scale_d = SCALES[block scale - fall_d],         fall in 0..63,  SCALES[i] = 2^(i / 8 - 18),

16 bits a channel, ``center * 64 + fall``, beside 8 bits a block for its widest channel's scale. Per key and slice of the head
dimension a radius bounds what the codes missed, in the metric of geometry/metric.py:

    |(k - k_sketched)_slice|_w  <=  radius_least + radius_code * radius_unit,   radius_code 15 = no bound (always exact).

Values have frames too (identity metric); what their codes missed is bounded per block (``value_error``), as is their distance
from the head's mean value (``value_spread``). Nibbles: of codes low = channels 0 .. D/2-1, high = the rest; of radii low = tokens
0 .. ceil(frame_len/2)-1 of the block, high = the rest. Cost per key and channel: half a byte, plus 2 bytes / frame_len, plus half a
byte per slice.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from louver.errors import PolicyError
from louver.geometry.bounds import slice_lengths
from louver.geometry.metric import Metric
from louver.memory import empty

SCALES = torch.exp2(torch.arange(256, dtype=torch.float64) / 8 - 18).float()  # float32 values are the definition
CODE_ZERO = 8  # the code that decodes to the frame's center
FALLS = 64  # scales a channel may have: its block's widest, and eighths of an octave below it
CENTERS = 512  # a center is a whole number of its channel's half scales, from -CENTERS to CENTERS - 1
NO_BOUND = 15  # radius code of a key that must always be exact
MOST_TOKENS = 1024  # of a block: sums over one are proven up to here (docs/guarantee.md, 13)
HANDLE = "_native_view"  # under which the backend of compiled kernels keeps its own view of a sketch
LARGEST_FRAMED = 60000.0  # a key or value with a larger magnitude than this in any channel is always exact


@dataclass(frozen=True, kw_only=True)
class SketchConfig:
    """How a cache is sketched. Every field changes speed and bytes; none changes which keys are found."""

    frame_len: int = 128  # tokens per block, at most 1,024: longer is faster on a GPU and costs 1-3% more bytes
    slice_dims: int = 64  # channels one radius stands for: fewer bound tighter and cost more bytes
    metric: Metric = "frame"  # the space radii are taken in
    clip: bool = True  # let a frame clip outliers where that lowers the squared error
    values: bool = True  # code the values too (policies that drop nothing need it)

    def __post_init__(self) -> None:
        if self.frame_len < 1 or self.slice_dims < 1:
            raise PolicyError(f"frame_len={self.frame_len} and slice_dims={self.slice_dims} must be at least 1")
        if self.frame_len > MOST_TOKENS:
            raise PolicyError(f"frame_len={self.frame_len} is too long a block; wanted at most {MOST_TOKENS} tokens")
        if self.metric not in ("frame", "diagonal", "identity"):
            raise PolicyError(f"metric={self.metric!r} is unknown; wanted 'frame', 'diagonal' or 'identity'")


class ValueFrames(NamedTuple):
    """The values' part of a sketch."""

    codes: UInt8[Tensor, "owners heads blocks frame_len half"]
    frame: Int[Tensor, "owners heads blocks dims"]
    scale: UInt8[Tensor, "owners heads blocks"]
    error: Float[Tensor, "owners heads blocks"]


@dataclass(kw_only=True)
class Sketch:
    """The sketch's tensors. Blocks past ``num_blocks[row]`` are room to grow, their content undefined."""

    config: SketchConfig
    head_dim: int  # of the cache; codes are padded to an even number of channels
    num_blocks: Int[Tensor, " batch"]  # int32, closed blocks per row
    query_weight: Float[Tensor, "batch heads dims"]  # float32
    key_codes: UInt8[Tensor, "owners heads blocks frame_len half"]
    key_frame: Int[Tensor, "owners heads blocks dims"]  # int16, center * 64 + fall
    key_scale: UInt8[Tensor, "owners heads blocks"]
    key_radius: UInt8[Tensor, "owners heads blocks half_len slices"]
    radius_least: Float[Tensor, "owners heads blocks slices"]  # float32
    radius_unit: Float[Tensor, "owners heads blocks slices"]  # float32
    value_mean: Float[Tensor, "batch heads dims"]  # float32, fixed when the first block closes
    value_spread: Float[Tensor, "owners heads blocks"]  # float32, max |v - value_mean|; +inf where values are unknown
    value_codes: UInt8[Tensor, "owners heads blocks frame_len half"] | None = None
    value_frame: Int[Tensor, "owners heads blocks dims"] | None = None
    value_scale: UInt8[Tensor, "owners heads blocks"] | None = None
    value_error: Float[Tensor, "owners heads blocks"] | None = None  # float32, max |v - v_sketched|
    # Who owns blocks: a row, or, where ``pages`` is given (int32), a page that rows may share. Block b of row i is then block
    # b % capacity of page pages[i, b // capacity].
    pages: Int[Tensor, "batch table_width"] | None = None

    def __setattr__(self, name: str, value: object) -> None:
        """Set a field; what a backend keeps of the sketch's memory ends with it."""
        object.__setattr__(self, name, value)
        held = self.__dict__
        held.pop(HANDLE, None)
        held["version"] = self.version + 1

    version = 0  # of the fields: another whenever one was set

    @property
    def dims(self) -> int:
        """Channels the codes hold: head_dim, padded to an even number."""
        return self.query_weight.shape[-1]

    @property
    def value_frames(self) -> ValueFrames | None:
        """The sketched values, views of this sketch; None where it knows keys only."""
        codes, frame, scale, error = self.value_codes, self.value_frame, self.value_scale, self.value_error
        if codes is None or frame is None or scale is None or error is None:
            return None
        return ValueFrames(codes, frame, scale, error)

    @property
    def num_slices(self) -> int:
        """Radii per key."""
        return self.radius_unit.shape[-1]

    @property
    def capacity(self) -> int:
        """Blocks there is room for, in a row or in a page."""
        return self.key_codes.shape[2]

    def __getstate__(self) -> dict[str, object]:
        """The fields alone: a handle that a backend keeps on a sketch points at this sketch's memory, not at its copy's."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def memory_bytes(self) -> int:
        """Bytes of every tensor held, room to grow included."""
        return sum(t.numel() * t.element_size() for _, t in self.tensors())

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of every tensor that is present."""
        return [(f.name, x) for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)]

    def trimmed(self) -> dict[str, Tensor]:
        """Every tensor that is present, by name, without the room to grow."""
        held = int(self.num_blocks.max()) if self.num_blocks.numel() else 0
        return {name: x[:, :, :held] if name in PER_BLOCK else x for name, x in self.tensors()}

    def capacity_for(self, num_blocks: int) -> int:
        """Blocks there will be room for once ``reserve`` was asked for num_blocks."""
        return self.capacity if num_blocks <= self.capacity else max(num_blocks, self.capacity + self.capacity // 4 + 1)

    def reserve(self, num_blocks: int) -> None:
        """Make room for num_blocks blocks, growing by at least a quarter so that appending stays cheap."""
        assert self.pages is None, "pages do not grow"
        target = self.capacity_for(num_blocks)
        if target == self.capacity:
            return
        for name, x in self.tensors():
            if name in PER_BLOCK:
                grown = empty((*x.shape[:2], target, *x.shape[3:]), x.dtype, x.device)
                grown[:, :, : x.shape[2]] = x
                setattr(self, name, grown)

    def select_batch(self, ids: Int[Tensor, " new_batch"]) -> "Sketch":
        """A sketch whose row i is a copy of row ids[i]; shared pages stay shared."""
        kept = PER_BLOCK if self.pages is not None else frozenset[str]()
        moved = {name: x.index_select(0, ids.to(x.device)) for name, x in self.tensors() if name not in kept}
        return replace(self, **moved)

    def by_row(self) -> "Sketch":
        """The sketch with every row holding its own blocks: itself, or copies of what its rows find in their pages."""
        if self.pages is None:
            return self
        table = self.pages.long().clamp_min(0)
        rows = {
            name: x[table].transpose(1, 2).flatten(2, 3)  # batch table_width heads capacity ... before
            for name, x in self.tensors()
            if name in PER_BLOCK
        }
        return replace(self, pages=None, **rows)


PER_BLOCK = frozenset(
    [
        "key_codes",
        "key_frame",
        "key_scale",
        "key_radius",
        "radius_least",
        "radius_unit",
        "value_codes",
        "value_frame",
        "value_scale",
        "value_error",
        "value_spread",
    ]
)


def empty_sketch(
    config: SketchConfig, batch: int, num_kv_heads: int, head_dim: int, device: torch.device, num_blocks: int = 0
) -> Sketch:
    """A sketch of nothing, with room for num_blocks blocks, the identity as query weight and zero as mean value."""
    dims = head_dim + head_dim % 2
    slices = len(slice_lengths(dims, config.slice_dims))
    lead = (batch, num_kv_heads, num_blocks)

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    keys = {
        "key_codes": new(*lead, config.frame_len, dims // 2, dtype=torch.uint8),
        "key_frame": new(*lead, dims, dtype=torch.int16),
        "key_scale": new(*lead, dtype=torch.uint8),
        "key_radius": new(*lead, half_len(config.frame_len), slices, dtype=torch.uint8),
        "radius_least": new(*lead, slices, dtype=torch.float32),
        "radius_unit": new(*lead, slices, dtype=torch.float32),
        "value_mean": torch.zeros(batch, num_kv_heads, dims, dtype=torch.float32, device=device),
        "value_spread": new(*lead, dtype=torch.float32),
    }
    values = {
        "value_codes": new(*lead, config.frame_len, dims // 2, dtype=torch.uint8),
        "value_frame": new(*lead, dims, dtype=torch.int16),
        "value_scale": new(*lead, dtype=torch.uint8),
        "value_error": new(*lead, dtype=torch.float32),
    }
    return Sketch(
        config=config,
        head_dim=head_dim,
        num_blocks=torch.zeros(batch, dtype=torch.int32, device=device),
        query_weight=torch.ones(batch, num_kv_heads, dims, dtype=torch.float32, device=device),
        **keys,
        **(values if config.values else {}),
    )


def pack_nibbles(codes: UInt8[Tensor, "*shape dims"]) -> UInt8[Tensor, "*shape half"]:
    """Two 4-bit codes per byte: channels of the first half low, of the second half high."""
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def unpack_nibbles(packed: UInt8[Tensor, "*shape half"]) -> UInt8[Tensor, "*shape dims"]:
    """Inverse of pack_nibbles."""
    return torch.cat([packed & 15, packed >> 4], -1)


def half_len(frame_len: int) -> int:
    """Bytes of a block's radii in one slice: two tokens share one."""
    return (frame_len + 1) // 2


def pack_radii(codes: UInt8[Tensor, "*shape frame_len slices"]) -> UInt8[Tensor, "*shape half_len slices"]:
    """Two radius codes per byte: tokens of the block's first half low, of its second half high (0 past an odd end)."""
    half = half_len(codes.shape[-2])
    low, high = codes[..., :half, :], codes[..., half:, :]
    return low | torch.nn.functional.pad(high, (0, 0, 0, half - high.shape[-2])) << 4


def unpack_radii(
    packed: UInt8[Tensor, "*shape half_len slices"], frame_len: int
) -> UInt8[Tensor, "*shape frame_len slices"]:
    """Inverse of pack_radii."""
    return torch.cat([packed & 15, packed >> 4], -2)[..., :frame_len, :]


def pack_frame(center: Float[Tensor, "*shape dims"], fall: Int[Tensor, "*shape dims"]) -> Int[Tensor, "*shape dims"]:
    """A frame's channels in 16 bits each; centers in scales."""
    return ((2 * center).long() * FALLS + fall).to(torch.int16)


def frame_centers(frame: Int[Tensor, "*shape dims"]) -> Float[Tensor, "*shape dims"]:
    """Centers in the channels' own scales, float32, exact."""
    return (frame.long() >> 6).float() / 2


def frame_scales(frame: Int[Tensor, "*shape dims"], scale: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape dims"]:
    """Scales of a frame's channels, float32."""
    code = scale.long()[..., None] - (frame.long() & (FALLS - 1))
    return SCALES.to(frame.device)[code.clamp_min(0)]  # negative only in room to grow, whose content is undefined
