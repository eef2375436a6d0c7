"""A head reads less than dense attention, or it is dense: then it reads that and the sketch, and nothing of it is approximate."""

import pytest
import torch
from hypothesis import example, given, settings

from helpers import build_case
from louver import attend
from louver.kernels import available_backends
from louver.protocols import COUNTS
from louver.sketch import SketchConfig
from strategies import cases

pytestmark = pytest.mark.filterwarnings("ignore:error.*asks for less than the arithmetic")
backends = pytest.mark.parametrize("backend", available_backends())
TAME = ("spread", "offset", "duplicates", "lattice", "zero_query", "flat")
SPECS = ("error:0.1", "mass:0.01", "topk:3|mass:0.2")
# Under mass:0.01 one head of a group is attended exactly, which reads everything for its neighbour.
ONE_HEAD_FAILS = build_case(
    256,
    kv_len=261,
    head_dim=80,
    group_size=2,
    num_kv_heads=2,
    batch=1,
    dtype=torch.float32,
    traits=frozenset({"spread", "lattice"}),
    ragged=False,
    config=SketchConfig(frame_len=128, slice_dims=7, metric="identity"),
)


def sketch_bytes(stats):
    return stats.count("blocks") * stats.byte_weights[COUNTS.index("blocks")]


@backends
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=10)
@given(case=cases(TAME))
@example(case=ONE_HEAD_FAILS)
def test_no_head_reads_more_than_dense_and_the_sketch(backend, spec, case):
    index = case.index(backend)
    result = attend(case.q, index, policy=spec, record=True)
    stats = result.stats
    again = 0 if stats.index_bytes is None else stats.index_bytes
    below = (stats.bytes_read - again < stats.bytes_dense) | (stats.num_keys == 0)
    everything = (stats.num_exact == stats.num_keys) & (
        stats.bytes_read - again == stats.bytes_dense + sketch_bytes(stats)
    )
    assert (below | everything).all()
    assert (torch.as_tensor(again) >= 0).all()
    dense = (~below).repeat_interleave(case.group_size, 1)
    assert (result.certificate[dense] == 0).all() and (result.dropped_mass_bound[dense] == 0).all()
    every = result.exact_mask | ~case.valid()
    assert every[dense].all(), "a dense head left a key out"


@backends
@pytest.mark.parametrize("spec", ["error:0.02", "mass:0.001"])
def test_a_head_that_needs_nearly_all_keys_goes_dense_and_its_neighbour_does_not(backend, spec):
    case = build_case(8, kv_len=512, num_kv_heads=2, group_size=1, batch=1, head_dim=64)
    case.q[:, 0] *= 0.01  # every key weighs the same
    case.q[:, 1] = 30 * case.keys[:, 1, 7]  # one key has all the mass
    result = attend(case.q, case.index(backend), policy=spec, record=True)
    dense, sharp = result.stats.bytes_read[0] / result.stats.bytes_dense[0]
    assert dense > 1 and result.exact_mask[0, 0].all() and not result.exact_mask[0, 1].all()
    assert sharp < 0.9


@backends
def test_codes_that_an_earlier_pass_read_are_counted(backend):
    """error: attends more than once; what became exact after its value code was read was read twice."""
    case = build_case(9, kv_len=640, num_kv_heads=1, group_size=2, batch=1, head_dim=64)
    loose, tight = (attend(case.q, case.index(backend), policy=f"error:{e}").stats for e in (0.9, 0.05))
    assert loose.index_bytes is not None and tight.index_bytes is not None
    assert int(tight.index_bytes.sum()) > 0 or backend == "cpu", (
        "its kernel reads no codes before it knows what is exact"
    )
    assert int(tight.index_bytes.sum()) <= int(tight.num_keys.sum()) * 32 + int(tight.count("blocks").sum()) * 200
