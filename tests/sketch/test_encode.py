"""What a sketch stores covers what it stands for: radii, value errors and spreads, in more precision than they were made in."""

import numpy as np
import pytest
import torch
from hypothesis import given

from helpers import assert_same_sketch, build_case
from louver.errors import PolicyError
from louver.geometry.bounds import slice_lengths
from louver.geometry.metric import inverse_weight
from louver.index import SketchIndex
from louver.kernels import available_backends
from louver.sketch import SketchConfig
from louver.sketch.layout import LARGEST_FRAMED, NO_BOUND, SCALES, pack_nibbles, unpack_nibbles
from strategies import cases

backends = pytest.mark.parametrize("backend", available_backends())


def wide(x: torch.Tensor) -> np.ndarray:
    """float32 or less as 80-bit floats, where the machine has them."""
    return x.float().numpy().astype(np.longdouble)


def decoded(codes, center, scale) -> np.ndarray:
    """Real decoded values [..., frame_len, dims]."""
    steps = unpack_nibbles(codes).numpy().astype(np.longdouble) - 8
    return wide(center)[..., None, :] + steps * wide(SCALES[scale.long()])[..., None, :]


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
        assert torch.equal((sketch.key_radius[row, :, :count] != NO_BOUND).all(-1), framed)

        codes, center, scale = (x[row, :, :count] for x in (sketch.key_codes, sketch.key_center, sketch.key_scale))
        inverse = inverse_weight(SCALES[scale.long()], sketch.query_weight[row, :, None], config.metric)
        missed = wide(keys) - decoded(codes, center, scale)
        squares = missed**2 / wide(inverse)[..., None, :]
        ends = np.cumsum([0, *slice_lengths(sketch.dims, config.slice_dims)])[:-1]
        norms = np.sqrt(np.add.reduceat(squares, ends, -1))
        radius = wide(sketch.key_radius[row, :, :count]) * wide(sketch.radius_unit[row, :, :count])[..., None, :]
        # Up to float64's rounding of a decoded channel, for which the estimate's slack pays.
        fuzz = 2.0**-52 * np.abs(decoded(codes, center, scale)).max(-1, initial=0, keepdims=True)
        fuzz = fuzz * (sketch.dims / wide(inverse).min(initial=1)) ** 0.5
        assert ((norms <= radius + fuzz) | ~framed.numpy()[..., None]).all()


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
        assert (sketch.key_radius[0, 0, 0, 3] == NO_BOUND).all()
        others = torch.arange(16) != 3
        assert (sketch.key_radius[0, 0, 0, others] != NO_BOUND).all()
        assert (sketch.radius_unit[0, 0, 0] <= clean.radius_unit[0, 0, 0] * 1.2).all()


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
            x.fill_(255 if x.dtype == torch.uint8 else torch.nan)
    poisoned.refresh()
    assert_same_sketch(index.sketch, poisoned.sketch)
    tau = torch.zeros(case.q.shape[:2])
    kv_len = case.keys.shape[2]
    assert torch.equal(poisoned.search(case.q, tau).mask(kv_len), index.search(case.q, tau).mask(kv_len))


def test_nibbles_survive_packing():
    codes = torch.randint(16, (3, 5, 34), dtype=torch.uint8)
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    assert pack_nibbles(codes)[0, 0, 0] == codes[0, 0, 0] + 16 * codes[0, 0, 17]


def test_memory_is_what_the_layout_says():
    """28% of a 16-bit cache with values, 16% without, at head_dim 128 and blocks of 128."""
    case = build_case(0, kv_len=1024, head_dim=128, batch=1, config=SketchConfig())
    cache = 2 * 2 * case.keys.numel()
    assert case.index().memory_bytes() / cache == pytest.approx(0.27, abs=0.02)
    assert case.index(values=None).memory_bytes() / cache == pytest.approx(0.14, abs=0.02)


def test_clipping_lowers_the_error():
    case = build_case(0, kv_len=256, head_dim=64, batch=1)
    clipped, whole = (
        case.index(config=SketchConfig(frame_len=128, clip=clip, metric="identity")).sketch for clip in (True, False)
    )
    radii = [s.key_radius.float().mul(s.radius_unit[:, :, :, None]).square().mean() for s in (clipped, whole)]
    assert radii[0] < radii[1]


@pytest.mark.parametrize("fields", [{"frame_len": 0}, {"frame_len": 1025}, {"slice_dims": 0}])
def test_a_config_that_makes_no_sense_is_refused(fields):
    with pytest.raises(PolicyError, match=next(iter(fields))):
        SketchConfig(**fields)
