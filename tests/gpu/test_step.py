"""The Triton and CUDA kernels on a real card, against float64."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from louver.kernels import crossover
from louver.policies.spec import parse
from louver.protocols import COUNTS

sys.path.insert(0, str(Path(__file__).parent))
checks = importlib.import_module("checks")
launch, native, plan, step = (
    importlib.import_module(f"louver.kernels.triton.{name}") for name in ("launch", "native", "plan", "step")
)
Case = checks.Case

pytestmark = pytest.mark.gpu

CASES = [
    *checks.SMALL,
    *(
        Case(policy=policy, head_dim=head_dim, group=group, kv_len=5003, frame_len=128, dtype=dtype)
        for policy, head_dim, group, dtype in [
            ("exact:0.01", 128, 4, torch.float16),
            ("exact:0.01", 128, 4, torch.bfloat16),
            ("exact:0.01", 64, 7, torch.bfloat16),
            ("exact:0.01", 256, 4, torch.float16),
            ("exact:0.01", 96, 16, torch.float16),
            ("exact:0.01", 80, 1, torch.float16),
            ("budget:0.01", 128, 4, torch.float16),
            ("budget:0.02", 128, 8, torch.bfloat16),
            ("topk:20", 64, 1, torch.float16),
            ("topk:20", 256, 8, torch.float16),
            ("topk:20", 128, 4, torch.float32),
            ("fixed:30", 128, 4, torch.float16),
            ("budget:0.5", 128, 4, torch.float16),
            ("exact:1", 128, 4, torch.float16),
        ]
    ),
    Case(policy="exact:0.01", head_dim=128, group=4, kv_len=9001, frame_len=128, page_len=256, pad=300, batch=3),
    Case(
        policy="budget:0.01+sinks:4+recent:64", head_dim=128, group=4, kv_len=9001, frame_len=128, page_len=256, pad=300
    ),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.policy}-{c.head_dim}x{c.group}-{c.kv_len}-{str(c.dtype)[6:]}"
)
def test_step_keeps_its_promises(case):
    print(checks.check(case, "cuda"))


WITHIN = [
    *checks.ERRORS,
    Case(policy="error:0.1", head_dim=128, group=4, kv_len=5003, frame_len=128),
    Case(
        policy="error:0.02", head_dim=128, group=4, kv_len=9001, frame_len=128, pad=300, batch=3, dtype=torch.bfloat16
    ),
    Case(policy="error:0.5", head_dim=64, group=7, kv_len=9001, frame_len=128),
    Case(policy="error:0.2", head_dim=256, group=4, kv_len=5003, frame_len=128),
]


@pytest.mark.parametrize(
    "case", WITHIN, ids=lambda c: f"{c.policy}-{c.head_dim}x{c.group}-{c.kv_len}-{str(c.dtype)[6:]}"
)
def test_an_error_that_was_asked_for_is_certified(case):
    print(checks.check_within(case, "cuda"))


LONG = [
    Case(policy=policy, head_dim=head_dim, group=group, frame_len=frame_len, dtype=dtype, **{"kv_len": 9001, **more})
    for policy, head_dim, group, frame_len, dtype, more in [
        ("budget:0.01", 128, 4, 128, torch.float16, {}),
        ("topk:20", 128, 3, 128, torch.bfloat16, {"page_len": 256, "pad": 300}),
        ("topk:7", 64, 7, 64, torch.float16, {"huge": True}),
        ("budget:0.05+sinks:3+recent:300", 256, 8, 128, torch.float16, {}),
        ("budget:0.01", 64, 1, 64, torch.bfloat16, {"pad": 7}),
        ("fixed:30", 128, 4, 128, torch.float16, {}),
        ("exact:0.01", 128, 4, 128, torch.float16, {"pad": 7}),
        ("exact:0.05", 64, 3, 128, torch.float16, {"kv_len": 1203}),  # ten warps a CTA of tiers.cu
    ]
]


@pytest.mark.parametrize("case", LONG, ids=lambda c: f"{c.policy}-{c.head_dim}x{c.group}")
def test_a_program_takes_many_blocks_and_keys_of_a_long_cache(case, monkeypatch):
    """With a single multiprocessor to fill, 9,001 keys make as many turns of every loop as a million do of a card's."""
    monkeypatch.setattr(native, "NUM_MULTIPROCESSORS", 1)
    checks.check(case, "cuda")


@pytest.mark.parametrize("policy, where, bad", checks.UNKNOWN)
def test_bounds_are_infinite_where_dense_attention_is_not_finite(policy, where, bad):
    checks.check_unknown(policy, where, bad, "cuda")


@pytest.mark.parametrize("policy", ["exact:0.01", "budget:0.01", "fixed:30"])
def test_triton_scan_keeps_them_too(policy, monkeypatch):
    monkeypatch.setattr("louver.kernels.triton.native.serves_scan", lambda *_: False)
    checks.check(Case(policy=policy, head_dim=128, group=4, kv_len=5003, frame_len=128), "cuda")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("policy", ["exact:0.01", "topk:20"])
def test_step_is_captured_in_a_graph(policy, monkeypatch):
    """A replay sees new queries and a longer row; nothing in the step waits for the host."""
    monkeypatch.setattr("louver.kernels.crossover.enabled", False)
    case = Case(policy=policy, head_dim=128, group=4, kv_len=4100, frame_len=128, batch=1)
    q, keys, values, start, stop, index = checks.build(case, "cuda")
    rule = parse(policy).rule()
    arguments = (keys, values, index.sketch, rule, start, stop, 128**-0.5, 0, 0, True)
    step.step(q, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.step(q, *arguments)
    q.copy_(q.flip(1))
    stop.copy_(stop + 1)
    graph.replay()
    fresh = step.step(q, *arguments)
    torch.testing.assert_close(captured.out, fresh.out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(captured.tau, fresh.tau)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.step(q, *arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("policy", ["exact:0.9", "budget:0.9"])
def test_overflowing_list_goes_dense(policy, small_lists):
    """Asking for most keys overflows a short list; the head must fall back to dense on the device, not lose keys."""
    case = Case(policy=policy, head_dim=128, group=4, kv_len=8197, frame_len=128)
    checks.check(case, "cuda")
    assert (num_exact(case) == 64 * 128).all()


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.3])
def test_a_large_budget_of_a_small_cache_is_met_without_going_dense(share):
    case = Case(policy=f"budget:{share}", head_dim=64, group=3, kv_len=8197, frame_len=128)
    checks.check(case, "cuda")
    assert (num_exact(case) < 8000).all()


def num_exact(case):
    """Closed keys that a step attends exactly, per KV head."""
    q, keys, values, start, stop, index = checks.build(case, "cuda")
    with crossover.switched(False):
        result = step.step(q, keys, values, index.sketch, parse(case.policy).rule(), start, stop, case.head_dim**-0.5)
    return result.counts[..., COUNTS.index("exact")]


@pytest.fixture
def small_lists(monkeypatch):
    """Lists of 1024 keys, as a cache of millions would have too few."""
    monkeypatch.setattr(launch, "_held", launch.OrderedDict())
    monkeypatch.setattr(plan, "room_for", lambda tokens: 1024)


def test_tensor_core_accumulation_is_as_assumed():
    """Sums of products that cancel: the error stays under gamma(k + 2, TENSOR_UNIT) of the absolute sum."""
    import triton
    import triton.language as tl

    from louver.geometry.rounded_query import TENSOR_UNIT

    @triton.jit
    def product(a, b, c, K: tl.constexpr):
        i, j, k = tl.arange(0, 64), tl.arange(0, 16), tl.arange(0, K)
        x, y = tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * 16 + j[None, :])
        tl.store(c + i[:, None] * 16 + j[None, :], tl.dot(x, y))

    for seed in range(50):
        g = torch.Generator("cuda").manual_seed(seed)
        spread = torch.randn(64, 256, device="cuda", generator=g).exp2() ** 3
        a = (torch.randn(64, 256, device="cuda", generator=g) * spread).half()
        b = torch.randn(256, 16, device="cuda", generator=g).half()
        c = torch.empty(64, 16, device="cuda")
        product[(1,)](a, b, c, 256)
        exact = a.double() @ b.double()
        allowed = (256 + 2) * TENSOR_UNIT * (a.double().abs() @ b.double().abs())
        assert ((c.double() - exact).abs() <= allowed * 0.25).all()


@pytest.mark.parametrize("tau", [40.0, 49.0, 60.0])
def test_bounds_beyond_the_grid_are_listed_whatever_the_threshold(tau):
    """A tenth of the blocks lie 50 nats above the others, and the grid ends 44 nats above the mean."""
    assert checks.lost_beyond_the_grid("cuda", tau) == 0


@pytest.mark.parametrize("head_dim, frame_len", [(64, 64), (128, 128), (80, 33)])
@pytest.mark.parametrize("policy", ["exact:0.01", "error:0.1", "topk:3", "fixed:5", "mass:0.1"])
def test_a_grid_far_above_every_key_costs_time_and_no_output(policy, head_dim, frame_len):
    checks.check_centers_above_every_key(policy, "cuda", head_dim, frame_len)
