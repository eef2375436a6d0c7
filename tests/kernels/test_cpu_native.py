"""What only the compiled backend has: instruction sets, threads, strides, and doing without a compiler."""

import pytest
import torch

from helpers import build_case, true_attention, true_scores, within_certificate
from louver import attend
from louver.errors import BackendError
from louver.index import SketchIndex
from louver.kernels import available_backends, get_ops, resolve_backend
from louver.kernels.cpu import native
from louver.protocols import CutRule, Cuts
from louver.sketch import SketchConfig

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension was not built")

RULES = [
    CutRule(drop=True, share=0.05),
    CutRule(drop=True, count=3),
    CutRule(drop=True, tau=0.5),
    CutRule(drop=False, share=0.02, unread_mass=0.1),
]
SHAPES = [(64, 3, torch.float32), (128, 4, torch.bfloat16), (80, 1, torch.float16), (33, 5, torch.float32)]


@pytest.fixture(params=native.load().instruction_sets() if native.available() else [])
def isa(request, monkeypatch):
    """Every instruction set this machine can run, one after another."""
    monkeypatch.setattr(native, "isa", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 7, 64, 577])
def test_one_element_that_is_not_finite_is_found_wherever_it_is(dtype, size):
    info = torch.finfo(dtype)
    for value in (0.0, info.max, info.min, info.smallest_normal / 2, torch.inf, -torch.inf, torch.nan):
        for at in (0, size // 2, size - 1):
            x = torch.randn(1, 1, size).to(dtype)
            x[..., at] = value
            assert native.is_finite(x) == bool(torch.isfinite(x).all())
    assert native.is_finite(torch.ones(1, 9, size, dtype=dtype).transpose(1, 2))


@pytest.mark.parametrize("head_dim, group_size, dtype", SHAPES)
def test_every_instruction_set_bounds_and_attends(isa, head_dim, group_size, dtype):
    case = build_case(3, kv_len=700, head_dim=head_dim, group_size=group_size, dtype=dtype, ragged=True)
    index = case.index("cpu")
    bounds = index.bounds(case.q, case.softmax_scale)
    truth = true_scores(case)
    for row, start in enumerate(case.kv_start.tolist()):
        width = min(bounds.estimate.shape[2], case.keys.shape[2] - start)
        real = truth[row, :, start : start + width]
        undecided = bounds.undecided[row].repeat_interleave(group_size, 0)[:, :width]
        assert ((real <= bounds.upper[row, :, :width].double()) | ~undecided).all()
        assert ((real >= bounds.lower[row, :, :width].double()) | ~undecided).all()
    for policy in ("budget:0.05", "topk:3", "exact:0.02", "exact:1.0"):
        result = attend(case.q, index, policy=policy, record=True)
        assert within_certificate(case, result).all(), policy


@pytest.mark.parametrize("seed", [0, 3])
def test_an_estimate_far_above_every_score_takes_no_weight_away(isa, seed):
    generator = torch.Generator().manual_seed(seed)
    keys = 400 * torch.randn(1, 1, 512, 64, generator=generator)
    values, q = torch.randn(1, 1, 512, 64, generator=generator), 4 * torch.randn(1, 3, 64, generator=generator)
    q[0, 1] *= 0.001
    keys[0, 0, ::128] *= 8  # frames so wide that codes say little
    index = SketchIndex.build(keys, values, backend="cpu")
    result = attend(q, index, policy="exact:0.01+unread:0.1", keep_best=True, record=True)
    store, scores = index.store, q.double() @ keys[0].double().mT
    bounds = get_ops("cpu").bounds(q, keys, index.sketch, store.kv_start, store.kv_len, 0.125)
    best = scores.masked_fill(~result.exact_mask, -torch.inf).amax(-1)
    assert (0.125 * (bounds.estimate.amax(-1) - best)).max() > 50
    truth = torch.softmax(scores / 8, -1) @ values[0].double()
    error = (truth - result.out.double()).norm(dim=-1)
    assert (error <= result.certificate.double() + result.arithmetic_bound).all()
    torch.testing.assert_close(result.lse.double(), (scores / 8).logsumexp(-1), rtol=1e-5, atol=0)


def test_half_precision_subnormals_are_read_where_float32_ones_are_flushed(isa):
    """torch.set_flush_denormal(True) makes the thread read float32 subnormals as zero; a subnormal float16 number is none."""
    case = build_case(1, kv_len=40, batch=1, dtype=torch.float16)
    random = torch.Generator().manual_seed(2)
    bits = torch.randint(100, 1000, case.keys.shape, generator=random, dtype=torch.int16)
    case.keys.copy_(bits.view(torch.float16))
    case.q.copy_(1e4 * torch.rand(case.q.shape, generator=random))
    truth = true_scores(case)
    if not torch.set_flush_denormal(True):
        pytest.skip("this machine cannot flush")
    try:
        index = case.index("cpu")
        bounds = index.bounds(case.q, case.softmax_scale)
        place = (case.kv_start, case.kv_len, case.softmax_scale)
        results = [get_ops("cpu").step(case.q, case.keys, case.values, index.sketch, rule, *place) for rule in RULES]
    finally:
        torch.set_flush_denormal(False)
    assert bounds.undecided.all()
    real = truth[..., :32]
    assert ((bounds.lower.double() <= real) & (real <= bounds.upper.double())).all()
    for result in results:
        assert within_certificate(case, result).all()


def test_a_certificate_is_no_smaller_than_the_sum_it_stands_for(isa, monkeypatch):
    """The reference's bound by separate maxima over the same tiers: a native floor or ceiling that lies makes it less."""
    nothing = torch.tensor(torch.nan)
    monkeypatch.setattr("louver.kernels.reference.certificate.joint_maximum", lambda *_: nothing)
    for seed in range(3):
        case = build_case(seed, kv_len=400, batch=1)
        index, place = case.index("cpu"), (case.kv_start, case.kv_len, case.softmax_scale)
        step = get_ops("cpu").step(
            case.q, case.keys, case.values, index.sketch, CutRule(drop=False, share=0.02), *place
        )
        cuts = Cuts(unread=torch.full_like(step.tau, -torch.inf), fine=step.tau, exact=step.tau)
        bounds = get_ops("reference").bounds(case.q, case.keys, index.sketch, *place)
        same = (case.q, case.keys, case.values, index.sketch, bounds, cuts, *place, False)
        assert (step.certificate >= 0.99 * get_ops("reference").attend_tiers(*same).certificate).all()


def test_scores_whose_partial_sums_overflow_decide_nothing(isa):
    """float32 may make them +inf or -inf whatever they are: such a key is found, and raises no threshold for the others."""
    random = torch.Generator().manual_seed(0)
    q, keys = torch.full((1, 1, 64), 1e34), 1e-3 * torch.randn(300, 1, 32, 64, generator=random)
    for row in range(300):
        place = torch.randperm(64, generator=random)
        keys[row, 0, 20, place[:2]], keys[row, 0, 20, place[2:5]] = 3e4, -2.8e4
    keys[150:, :, 20] *= -1  # a low score first, then a high one
    q, values = q.expand(300, -1, -1).contiguous(), torch.ones_like(keys)
    index = SketchIndex.build(keys, values, config=SketchConfig(frame_len=16), backend="cpu")
    place = (index.store.kv_start, index.store.kv_len, 1e-34)
    truth = (q.double() @ keys[:, 0].double().mT)[:, 0]
    best = torch.nn.functional.one_hot(truth.argmax(-1), 32).bool()
    step = get_ops("cpu").step(q, keys, values, index.sketch, CutRule(drop=True, count=1), *place, record=True)
    assert (step.exact_mask[:, 0] | ~best).all(), "the largest score was lost"
    tau = truth.amax(-1, keepdim=True).mul(0.9).float()
    assert (index.search(q, tau).mask(32)[:, 0] | ~best).all(), "a key above tau was lost"
    assert index.search(q, torch.full_like(tau, 1e37)).mask(32)[:, 0, 20].all()


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_threads_change_nothing_that_matters(rule):
    case = build_case(1, kv_len=1500, head_dim=64, group_size=3, num_kv_heads=3, batch=1)
    index, outs = case.index("cpu"), []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            place = (case.kv_start, case.kv_len, case.softmax_scale)
            outs.append(get_ops("cpu").step(case.q, case.keys, case.values, index.sketch, rule, *place, record=True))
    finally:
        torch.set_num_threads(threads)
    for other in outs[1:]:
        torch.testing.assert_close(other.out, outs[0].out, rtol=1e-4, atol=1e-4)
        if rule.drop:
            assert torch.equal(other.exact_mask, outs[0].exact_mask)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_strides_are_read_and_not_copied(rule):
    """A cache that is a view of another layout, as [batch, len, heads, dim] or dim-major keys are."""
    case = build_case(2, kv_len=300, head_dim=64, group_size=2)
    index = case.index("cpu")
    place = (case.kv_start, case.kv_len, case.softmax_scale)
    plain = get_ops("cpu").step(case.q, case.keys, case.values, index.sketch, rule, *place)
    token_major = case.values.transpose(1, 2).contiguous().transpose(1, 2)
    dim_major = case.keys.transpose(2, 3).contiguous().transpose(2, 3)
    strided = get_ops("cpu").step(case.q, dim_major, token_major, index.sketch, rule, *place)
    torch.testing.assert_close(strided.out, plain.out, rtol=1e-5, atol=1e-5)
    dense, _ = get_ops("cpu").attend_dense(case.q, dim_major, token_major, *place)
    torch.testing.assert_close(dense.double(), true_attention(case), rtol=1e-4, atol=1e-4)


def test_a_backend_that_was_not_compiled_is_an_error_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "reason", "no module")
    assert available_backends() == ["reference"]
    assert resolve_backend("auto") == "reference"
    with pytest.raises(BackendError, match="not compiled here"):
        resolve_backend("cpu")
