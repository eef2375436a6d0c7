"""Steps whose threshold comes out of looks, on a real card: against float64, in a graph, and without waits for the device."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from louver.attention.fused import fused_step
from louver.kernels import get_ops
from louver.policies.spec import parse
from louver.protocols import COUNTS

sys.path.insert(0, str(Path(__file__).parent))
checks = importlib.import_module("checks")
looks_checks = importlib.import_module("looks_checks")
launch = importlib.import_module("louver.kernels.triton.launch")
Case = checks.Case

pytestmark = pytest.mark.gpu

CASES = [
    *looks_checks.LOOKS,
    *(
        Case(policy=policy, head_dim=head_dim, group=group, kv_len=5003, frame_len=128, dtype=dtype)
        for policy, head_dim, group, dtype in [
            ("mass:0.1", 128, 4, torch.float16),
            ("mass:0.01", 128, 4, torch.bfloat16),
            ("mass:0.3", 64, 7, torch.bfloat16),
            ("mass:0.2", 256, 8, torch.float16),
            ("mass:0.2", 96, 16, torch.float16),
            ("mass:0.2", 128, 4, torch.float32),
            ("relative:3", 128, 4, torch.float16),
            ("relative:5", 256, 2, torch.bfloat16),
            ("relative:0", 64, 1, torch.float16),
            ("budget:0.02|mass:0.4", 128, 4, torch.float16),
            ("topk:20|relative:2|fixed:60", 128, 8, torch.float16),
            ("sample-topk:3", 128, 4, torch.float16),
            ("sample-mean-max|mass:0.5", 64, 3, torch.bfloat16),
        ]
    ),
    Case(policy="mass:0.2+sinks:4+recent:300", head_dim=128, group=4, kv_len=9001, frame_len=128, pad=300, batch=3),
    Case(policy="mass:0.2", head_dim=128, group=4, kv_len=9001, frame_len=128, spread=3.0),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.policy}-{c.head_dim}x{c.group}-{c.kv_len}-{str(c.dtype)[6:]}"
)
def test_what_is_asked_for_is_kept(case):
    print(looks_checks.check_looks(case, "cuda"))


def test_a_tiny_share_is_kept_beside_one_heavy_key():
    looks_checks.check_tiny_mass("cuda")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("policy", ["mass:0.1", "relative:4", "topk:20|mass:0.3", "sample-topk:3", "error:0.2"])
def test_it_is_captured_in_a_graph(policy, monkeypatch):
    """A replay sees new queries and a longer row; nothing in the step waits for the host."""
    monkeypatch.setattr("louver.kernels.crossover.enabled", False)
    case = Case(policy=policy, head_dim=128, group=4, kv_len=4100, frame_len=128, batch=1)
    q, keys, values, start, stop, index = checks.build(case, "cuda")
    ops = get_ops("triton")

    def run():
        done = fused_step(parse(policy), ops, q, keys, values, index.sketch, (start, stop, 128**-0.5), keep_best=True)
        assert done is not None
        return done[0]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    q.copy_(q.flip(1))
    stop.copy_(stop + 1)
    graph.replay()
    fresh = run()
    torch.testing.assert_close(captured.out, fresh.out, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(captured.tau, fresh.tau, atol=5e-2, rtol=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("group", [4, 7, 8, 16])
@pytest.mark.parametrize("policy", ["budget:0.4", "fixed:60"])
def test_many_heads_of_a_kv_head_list_no_more_than_they_need(policy, group):
    """Half of the keys lie above a gap: the bins must reach that far, whatever the number of heads."""
    case = Case(policy=policy, head_dim=128, group=group, kv_len=8197, frame_len=128, pushed=0.5)
    q, keys, values, start, stop, index = checks.build(case, "cuda")
    q = q.unflatten(1, (case.num_kv_heads, -1))[:, :, :1].expand(-1, -1, group, -1).flatten(1, 2).contiguous()
    listed = {}
    for heads in (1, group):
        few = q.unflatten(1, (case.num_kv_heads, -1))[:, :, :heads].flatten(1, 2).contiguous()
        step = get_ops("triton").step
        result = step(few, keys, values, index.sketch, parse(policy).rule(), start, stop, 128**-0.5, 0, 0, True, True)
        listed[heads] = result.counts[..., COUNTS.index("scanned")].double()
    assert (listed[group] <= 1.02 * listed[1] + 64).all()
    assert (listed[1] < 0.6 * 8192).all()


def test_buffers_of_earlier_steps_are_given_back(monkeypatch):
    monkeypatch.setattr(launch, "_held", launch.OrderedDict())
    monkeypatch.setattr(launch, "MOST_BYTES", 1 << 20)
    assert_given_back(torch.device("cuda"))


def assert_given_back(device):
    def ask(name, size):
        return launch.buffers(launch.workspace, device, name, (size,), torch.float32)

    kept = [ask(str(i), 1 << 16) for i in range(20)]  # a quarter of a megabyte each
    assert len(launch._held) == 5 and ask("19", 1 << 16) is kept[19]
    assert ask("0", 1 << 16) is not kept[0]
    big = ask("big", 1 << 20)
    assert len(launch._held) == 5 and ask("big", 1 << 20) is big
