"""attend_within and attend_mass: what is asked is certified, by every instruction set and any number of threads, for no more bytes than
the loop over ops takes, which is their plain twin."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import absolute_scores, build_case, true_masses, true_scores, within_certificate
from louver import attend
from louver.attention.asked import asked_mass, num_asked_violations
from louver.kernels import get_ops
from louver.kernels.cpu import native
from louver.policies import parse
from louver.protocols import COUNTS
from strategies import cases

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="the extension was not built"),
    pytest.mark.filterwarnings("ignore:error.*asks for less than the arithmetic"),
]
SPECS = ("error:0.3", "error:0.05+sinks:3+recent:9", "mass:0.3+recent:5", "mass:0.01")
SHAPES = [(64, 3, torch.float32), (128, 4, torch.bfloat16), (80, 1, torch.float16), (33, 5, torch.float32)]


def check(case, result, spec):
    """Everything such a step claims, against float64."""
    policy, exact = parse(spec), result.exact_mask
    assert within_certificate(case, result).all(), spec
    assert num_asked_violations(policy, result) == 0, spec
    fuzz = case.q.shape[2] * 2.0**-52 * absolute_scores(case)
    relevant = case.valid() & (true_scores(case) - fuzz >= result.tau.double()[..., None])
    assert not (relevant & ~exact).any() and not (exact & ~case.valid()).any()
    if (asked := asked_mass(policy)) is not None:
        assert (torch.where(exact | ~case.valid(), 0.0, true_masses(case)).sum(-1) <= asked).all()


@pytest.fixture(params=native.load().instruction_sets() if native.available() else [])
def isa(request, monkeypatch):
    monkeypatch.setattr(native, "isa", request.param)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("head_dim, group_size, dtype", SHAPES)
@pytest.mark.parametrize("spec", SPECS)
def test_every_instruction_set_certifies_what_is_asked(spec, head_dim, group_size, dtype):
    case = build_case(3, kv_len=700, head_dim=head_dim, group_size=group_size, dtype=dtype, ragged=True)
    index = case.index("cpu")
    for factor in (0.3, 1.0, 6.0):
        longer = replace(case, q=case.q * factor)
        check(longer, attend(longer.q, index, policy=spec, record=True), spec)


@given(case=cases(), spec=st.sampled_from(SPECS), threads=st.sampled_from((1, 2, 3)))
def test_any_number_of_threads_certifies_what_is_asked(case, spec, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        result = attend(case.q, case.index("cpu"), policy=spec, record=True)
    finally:
        torch.set_num_threads(before)
    policy = parse(spec)
    known = torch.isfinite(result.arithmetic_bound).all() and case.keys.numel()
    if known:
        check(case, result, spec)
    assert within_certificate(case, result).all()
    assert policy.drops or (result.dropped_mass_bound == 0).all()


@pytest.mark.parametrize("spec", ["error:0.3", "error:0.1", "error:0.03", "mass:0.1", "mass:0.01"])
def test_no_more_is_read_than_by_the_loop_over_ops(spec, monkeypatch):
    """The loop looks between passes and never raises a cut again; the kernel tries cuts before it reads for them."""
    read = {True: 0, False: 0}
    for fused in (True, False):
        if not fused:
            for name in ("attend_within", "attend_mass"):
                monkeypatch.delattr(get_ops("cpu"), name)
        for seed in range(4):
            case = build_case(seed, kv_len=3000, batch=1, group_size=3, traits=frozenset({"offset"}))
            result = attend(2 * case.q, case.index("cpu"), policy=spec, record=True)
            read[fused] += int(result.stats.bytes_read.sum())
            assert num_asked_violations(parse(spec), result) == 0
    assert read[True] <= 1.02 * read[False]


def test_a_second_pass_counts_the_codes_that_the_first_had_read():
    again = 0
    for seed in range(30, 42):
        case = build_case(seed, kv_len=900, num_kv_heads=2, group_size=3, batch=1)
        stats = attend(6 * case.q, case.index("cpu"), policy="error:0.2").stats
        most = stats.num_exact * stats.byte_weights[COUNTS.index("coarse")]
        most = most + stats.count("blocks") * stats.byte_weights[COUNTS.index("value_blocks")]
        assert (stats.index_bytes >= 0).all() and (stats.index_bytes <= most).all()
        again += int(stats.index_bytes.sum())
    assert again > 0, "nothing was at stake"
