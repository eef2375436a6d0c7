"""What a sketch stores covers what it stands for: radii, value errors and spreads, in more precision than they were made in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import assert_same_sketch, build_case
from louver.errors import PolicyError
from louver.geometry.bounds import slice_lengths
from louver.geometry.metric import inverse_weight
from louver.index import SketchIndex
from louver.kernels import available_backends
from louver.sketch import SketchConfig
from louver.sketch.layout import (
    CENTERS,
    FALLS,
    LARGEST_FRAMED,
    NO_BOUND,
    SCALES,
    frame_centers,
    frame_scales,
    pack_frame,
    pack_nibbles,
    pack_radii,
    unpack_nibbles,
    unpack_radii,
)
from strategies import cases

backends = pytest.mark.parametrize("backend", available_backends())


def wide(x: torch.Tensor) -> np.ndarray:
    """float32 or less as 80-bit floats, where the machine has them."""
    return x.float().numpy().astype(np.longdouble)


def decoded(codes, frame, scale) -> np.ndarray:
    """Real decoded values [..., frame_len, dims]."""
    word = frame.numpy().astype(np.int64)
    center, fall = word // 64, word % 64
    halves = 2 * unpack_nibbles(codes).numpy().astype(np.longdouble) - 16 + center[..., None, :]
    return halves * wide(SCALES[scale.long()[..., None] - torch.from_numpy(fall)])[..., None, :] / 2


def radii_of(sketch, row: int, count: int) -> tuple[torch.Tensor, np.ndarray]:
    """Codes and real radii [heads, count, frame_len, slices]."""
    codes = unpack_radii(sketch.key_radius[row, :, :count], sketch.config.frame_len)
    least, unit = (wide(x[row, :, :count])[..., None, :] for x in (sketch.radius_least, sketch.radius_unit))
    return codes, least + wide(codes) * unit


def blocks_of(x: torch.Tensor, row: int, case, index: SketchIndex) -> torch.Tensor:
    """Closed blocks of one row, [heads, blocks, frame_len, dims], padded to the sketch's channels."""
    frame_len, start = index.config.frame_len, int(case.kv_start[row])
    count = int(index.sketch.num_blocks[row])
    part = x[row, :, start : start + count * frame_len].float()
    padded = torch.nn.functional.pad(part, (0, index.sketch.dims - x.shape[-1]))
    return padded.unflatten(1, (count, frame_len))


@backends
@given(case=cases())
def test_radii_cover_what_the_codes_miss(backend, case):
    index = case.index(backend)
    sketch, config = index.sketch, index.config
    assert torch.equal(sketch.num_blocks, (case.kv_len - case.kv_start) // config.frame_len)
    for row, count in enumerate(sketch.num_blocks.tolist()):
        keys, values = (blocks_of(x, row, case, index) for x in (case.keys, case.values))
        framed = ((keys.abs() <= LARGEST_FRAMED) & (values.abs() <= LARGEST_FRAMED)).all(-1)
        radius_codes, radius = radii_of(sketch, row, count)
        assert torch.equal((radius_codes != NO_BOUND).all(-1), framed)

        codes, frame, scale = (x[row, :, :count] for x in (sketch.key_codes, sketch.key_frame, sketch.key_scale))
        inverse = inverse_weight(frame_scales(frame, scale), sketch.query_weight[row, :, None], config.metric)
        missed = wide(keys) - decoded(codes, frame, scale)
        squares = missed**2 / wide(inverse)[..., None, :]
        ends = np.cumsum([0, *slice_lengths(sketch.dims, config.slice_dims)])[:-1]
        norms = np.sqrt(np.add.reduceat(squares, ends, -1))
        assert ((norms <= radius) | ~framed.numpy()[..., None]).all()


@backends
@given(case=cases())
def test_value_errors_and_spreads_cover_the_values(backend, case):
    index = case.index(backend)
    sketch, frames = index.sketch, index.sketch.value_frames
    for row, count in enumerate(sketch.num_blocks.tolist()):
        keys, values = (blocks_of(x, row, case, index) for x in (case.keys, case.values))
        framed = ((keys.abs() <= LARGEST_FRAMED) & (values.abs() <= LARGEST_FRAMED)).all(-1).numpy()
        missed = wide(values) - decoded(*(x[row, :, :count] for x in frames[:3]))
        error = np.sqrt((missed**2).sum(-1))
        away = np.sqrt(((wide(values) - wide(sketch.value_mean[row])[:, None, None]) ** 2).sum(-1))
        bound = wide(frames.error[row, :, :count])[..., None] * (1 + 1e-12)
        assert ((error <= bound + 1e-12) | ~framed).all()
        assert ((away <= wide(sketch.value_spread[row, :, :count])[..., None] * (1 + 1e-12)) | ~framed).all()


@backends
def test_one_bad_key_costs_its_neighbours_nothing(backend):
    case = build_case(0, kv_len=32, batch=1)
    clean = case.index(backend).sketch
    for bad in (torch.inf, torch.nan, 1e20):
        case.keys[0, 0, 3, 5] = bad
        sketch = case.index(backend).sketch
        codes, radii = radii_of(sketch, 0, 1)
        assert (codes[0, 0, 3] == NO_BOUND).all()
        others = torch.arange(16) != 3
        assert (codes[0, 0, others] != NO_BOUND).all()
        assert radii[0, 0, others].max() <= 1.2 * radii_of(clean, 0, 1)[1][0, 0].max()


@backends
@given(case=cases(max_blocks=2))
def test_a_sketch_does_not_depend_on_what_its_room_held(backend, case):
    """Buffers poisoned before encoding and beyond the last block change nothing."""
    index = case.index(backend)
    poisoned = SketchIndex(index.store, config=case.config, backend=backend)
    sketch = poisoned._ready_sketch(case.keys, case.values)
    sketch.reserve(int(index.sketch.num_blocks.max()) + 2)
    for name, x in sketch.tensors():
        if name not in ("num_blocks", "query_weight", "value_mean"):
            x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)
    poisoned.refresh()
    assert_same_sketch(index.sketch, poisoned.sketch)
    tau = torch.zeros(case.q.shape[:2])
    kv_len = case.keys.shape[2]
    assert torch.equal(poisoned.search(case.q, tau).mask(kv_len), index.search(case.q, tau).mask(kv_len))


def test_nibbles_survive_packing():
    codes = torch.randint(16, (3, 5, 34), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    assert pack_nibbles(codes)[0, 0, 0] == codes[0, 0, 0] + 16 * codes[0, 0, 17]


@given(frame_len=st.integers(1, 40), dims=st.integers(1, 6))
def test_radii_and_frames_survive_packing(frame_len, dims):
    codes = torch.randint(16, (2, frame_len, dims), dtype=torch.uint8)
    packed = pack_radii(codes)
    assert packed.shape == (2, (frame_len + 1) // 2, dims)
    assert torch.equal(unpack_radii(packed, frame_len), codes)
    assert packed[0, 0, 0] == codes[0, 0, 0] + (16 * codes[0, (frame_len + 1) // 2, 0] if frame_len > 1 else 0)
    center = torch.randint(-CENTERS, CENTERS, (3, dims)) / 2
    fall, widest = torch.randint(FALLS, (3, dims)), torch.randint(FALLS, 256, (3,), dtype=torch.uint8)
    frame = pack_frame(center, fall)
    assert torch.equal(frame_centers(frame), center)
    assert torch.equal(frame_scales(frame, widest), SCALES[widest.long()[:, None] - fall])


@backends
@pytest.mark.parametrize("offset", [300.0, 59000.0])
def test_a_channel_far_from_zero_has_a_scale_its_center_can_be_counted_in(backend, offset):
    """A narrow channel on a large offset keeps its neighbours' scales, and errs by half of what its center's steps allow."""
    case = build_case(0, kv_len=256, head_dim=64, batch=1)
    plain = case.index(backend, config=SketchConfig(frame_len=128)).sketch
    case.keys[..., 7] += offset
    sketch = case.index(backend, config=SketchConfig(frame_len=128)).sketch
    missed = wide(case.keys.unflatten(2, (-1, 128))) - decoded(
        sketch.key_codes[0], sketch.key_frame[0], sketch.key_scale[0]
    )
    assert np.abs(missed[..., 7]).max() <= max(1.0, 0.55 * offset / (CENTERS / 2 - 2))
    widest = torch.maximum(plain.key_scale.int(), torch.tensor(8 * (np.log2(offset / 254) + 18)).ceil().int())
    assert (sketch.key_scale.int() <= widest + 2).all()


def test_memory_is_what_the_layout_says():
    """26% of a 16-bit cache with values, 13% without, at head_dim 128 and blocks of 128."""
    case = build_case(0, kv_len=1024, head_dim=128, batch=1, config=SketchConfig())
    cache = 2 * 2 * case.keys.numel()
    assert case.index().memory_bytes() / cache == pytest.approx(0.262, abs=0.01)
    assert case.index(values=None).memory_bytes() / cache == pytest.approx(0.133, abs=0.01)


def test_clipping_lowers_the_error():
    case = build_case(0, kv_len=256, head_dim=64, batch=1)
    clipped, whole = (
        case.index(config=SketchConfig(frame_len=128, clip=clip, metric="identity")).sketch for clip in (True, False)
    )
    radii = [(radii_of(s, 0, 2)[1] ** 2).mean() for s in (clipped, whole)]
    assert radii[0] < radii[1]


@pytest.mark.parametrize("fields", [{"frame_len": 0}, {"frame_len": 1025}, {"slice_dims": 0}])
def test_a_config_that_makes_no_sense_is_refused(fields):
    with pytest.raises(PolicyError, match=next(iter(fields))):
        SketchConfig(**fields)
