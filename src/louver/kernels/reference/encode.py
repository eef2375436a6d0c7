"""encode_block: sketch every block that is full and not yet sketched."""

import torch
from jaxtyping import Int
from torch import Tensor

from louver.geometry.metric import inverse_weight
from louver.geometry.rounding import round_up_float32
from louver.kernels.reference.paging import contiguous
from louver.shapes import Cache, PerRow
from louver.sketch.encode import encode_radii, fit_frames, representable
from louver.sketch.layout import Sketch, frame_scales, pack_nibbles, pack_radii


def encode_block(
    keys: Cache,
    values: Cache | None,
    sketch: Sketch,
    kv_start: PerRow,
    kv_len: PerRow,
    block_table: Int[Tensor, "batch pages"] | None = None,
) -> None:
    """Close the blocks that are full: write them into sketch and advance sketch.num_blocks, in place.

    Block b of a row holds its tokens kv_start + b * frame_len onwards. The sketch must have room (Sketch.reserve).
    keys and values may be pages [pages, heads, page_len, head_dim] reached through block_table; the sketch's rows have their own
    blocks.
    """
    assert sketch.pages is None, "blocks are encoded into a sketch whose rows have their own"
    keys, values = contiguous(keys, block_table), contiguous(values, block_table)
    frame_len = sketch.config.frame_len
    full = (kv_len - kv_start) // frame_len
    for row, (begin, end, start) in enumerate(
        zip(sketch.num_blocks.tolist(), full.tolist(), kv_start.tolist(), strict=True)
    ):
        if end <= begin:
            continue
        tokens = slice(start + begin * frame_len, start + end * frame_len)
        _encode_row(keys[row, :, tokens], None if values is None else values[row, :, tokens], sketch, row, begin, end)
    sketch.num_blocks.copy_(torch.maximum(sketch.num_blocks, full.to(torch.int32)))


def _encode_row(keys: Tensor, values: Tensor | None, sketch: Sketch, row: int, begin: int, end: int) -> None:
    config = sketch.config
    blocks = slice(begin, end)

    def split(x: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(x.float(), (0, sketch.dims - x.shape[-1]))
        return padded.unflatten(1, (end - begin, config.frame_len))

    k = split(keys)
    valid = representable(k)
    sketch.value_spread[row, :, blocks] = torch.inf
    if values is not None:
        v = split(values)
        valid = valid & representable(v)
        away = (v.double() - sketch.value_mean[row, :, None, None].double()) * valid[..., None]
        sketch.value_spread[row, :, blocks] = _largest_norm(torch.nan_to_num(away))
        if (held := sketch.value_frames) is not None:
            frames = fit_frames(v, valid, config.clip)
            held.codes[row, :, blocks] = pack_nibbles(frames.codes)
            held.frame[row, :, blocks] = frames.frame
            held.scale[row, :, blocks] = frames.scale
            held.error[row, :, blocks] = _largest_norm(frames.residual)

    frames = fit_frames(k, valid, config.clip)
    weight = sketch.query_weight[row, :, None]
    inverse = inverse_weight(frame_scales(frames.frame, frames.scale), weight, config.metric)
    radii = encode_radii(frames.residual, valid, inverse, config.slice_dims)
    sketch.key_codes[row, :, blocks] = pack_nibbles(frames.codes)
    sketch.key_frame[row, :, blocks] = frames.frame
    sketch.key_scale[row, :, blocks] = frames.scale
    sketch.key_radius[row, :, blocks] = pack_radii(radii.codes)
    sketch.radius_least[row, :, blocks] = radii.least
    sketch.radius_unit[row, :, blocks] = radii.unit


def _largest_norm(x: Tensor) -> Tensor:
    return round_up_float32(x.square().sum(-1).sqrt().amax(-1) * (1 + 2.0**-40))
