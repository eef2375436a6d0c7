"""Steps that take looks (a share of the mass, a distance from the best, unions, estimates) against float64 and the reference's bytes."""

import torch
from checks import Case, build, pages, truth

LOOKS = [
    Case(policy="mass:0.1"),
    Case(policy="relative:3+sinks:3+recent:9", head_dim=128, group=1, pad=7),
    Case(policy="mass:0.3", head_dim=80, dtype=torch.float32, pad=5, frame_len=128, kv_len=700),
    Case(policy="relative:4", group=4, huge=True),
    Case(policy="mass:0.3+sinks:3+recent:70", spread=40.0),
    Case(policy="topk:7|mass:0.4", group=7, kv_len=1100),
    Case(policy="relative:2|fixed:30", kv_len=40),
    Case(policy="mass:0.5", group=4, huge=True, kv_len=1100),
    Case(policy="mass:0.001", pad=7),  # needs all keys: dense
    Case(policy="topk:7|mass:0.3", page_len=48, pad=7),
    Case(policy="sample-topk:3+size:40", group=2, pad=7),
    Case(policy="sample-gap+seed:3+recent:5", kv_len=130),
]


def check_looks(case: Case, device: str) -> dict[str, float]:
    """A step whose threshold comes out of looks keeps what it certifies and what was asked, in float64; returns what was measured."""
    from louver import attend
    from louver.attention.asked import num_asked_violations
    from louver.attention.fused import wanted_by
    from louver.kernels import crossover
    from louver.kernels.reference.sample import sample_scores as reference_scores
    from louver.kernels.triton import attend_in_looks, sample_scores
    from louver.policies.relative import Relative
    from louver.policies.spec import parse
    from louver.protocols import COUNTS, Sample

    q, keys, values, start, stop, index = build(case, device)
    policy, scale = parse(case.policy), q.shape[2] ** -0.5
    with crossover.switched(False):
        slow = attend(q, index, policy=policy, record=True)
        index.backend = "triton"
        result = attend(q, index, policy=policy, record=True)
    scores, valid, want, weights = truth(q, keys, values, start, stop)
    exact, out = result.exact_mask, result.out.double()
    assert exact is not None and slow.exact_mask is not None and torch.isfinite(out).all()
    assert not (exact & ~valid).any()
    lost = int((valid & (scores >= result.tau.double()[..., None]) & ~exact).sum())
    assert lost == 0, f"{lost} keys reach tau and are not exact"
    kept = torch.where(exact, weights, 0.0)
    dropped = (1 - kept.sum(-1)).clamp_min(0)
    assert (dropped <= result.dropped_mass_bound.double() + 1e-6).all(), "more mass was dropped than certified"
    assert num_asked_violations(policy, result) == 0, f"{result.dropped_mass_bound.max()} may be dropped"
    error, bound = (out - want).norm(dim=-1), (result.certificate + result.arithmetic_bound).double()
    assert (error <= bound).all(), f"error {error.max():.3g} exceeds its certificate {bound.min():.3g}"
    only = kept / kept.sum(-1, keepdim=True).clamp_min(1e-300)
    kept_out = (only.unflatten(1, (case.num_kv_heads, -1)) @ values.double()).flatten(1, 2)
    assert ((out - kept_out).norm(dim=-1) <= result.arithmetic_bound.double()).all(), "arithmetic exceeds its bound"
    if case.page_len:
        table, paged_keys, paged_values = pages(keys, values, case.page_len)
        place, ends = (start, stop, scale), (policy.sinks, policy.recent)
        with crossover.switched(False):
            again = attend_in_looks(
                q, paged_keys, paged_values, index.sketch, wanted_by(policy), *place, *ends, block_table=table
            )
        assert again is not None
        torch.testing.assert_close(again.tau * scale, result.tau * scale, atol=2e-3, rtol=1e-5)
        torch.testing.assert_close(again.out, result.out, atol=5e-2, rtol=2e-3)
        sample = Sample(40, 1)
        one = sample_scores(q, paged_keys, start, stop, sample, table).sort(-1).values
        torch.testing.assert_close(
            one, reference_scores(q, keys, start, stop, sample).sort(-1).values, atol=1e-2, rtol=1e-3
        )
    if isinstance(policy, Relative):
        best = torch.where(valid, scores, -torch.inf).amax(-1, keepdim=True)
        near = valid & ((best - scores) * scale < policy.nats - 1e-3)
        assert not (near & ~exact).any(), "a key within reach of the best was lost"
    if policy.sample is not None:  # the estimate is the reference's, up to the rounding of scores
        torch.testing.assert_close(result.tau, slow.tau, rtol=1e-3, atol=1e-2)
    table = dict(zip(COUNTS, result.stats.table.unbind(-1), strict=True))
    assert (table["exact"] <= table["scanned"]).all() and (table["scanned"] <= table["keys"] + 256).all()
    return {
        "bytes": result.stats.bytes_fraction,
        "reference": slow.stats.bytes_fraction,
        "exact": result.stats.fraction("exact"),
        "dropped": float(dropped.max()),
        "bound": float(result.dropped_mass_bound.max()),
    }


def check_tiny_mass(device: str) -> None:
    """A share of 1e-9, where one key weighs more than all others by more than float32 can tell apart."""
    from louver.index.sketch import SketchIndex
    from louver.kernels import crossover
    from louver.kernels.triton import attend_in_looks
    from louver.sketch.layout import SketchConfig

    g = torch.Generator().manual_seed(0)
    n, asked = 384, 1e-9
    keys = torch.zeros(1, 1, n, 64)
    keys[..., :2] = 0.02 * torch.randn(n, 2, generator=g)
    keys[0, 0, : n // 2, 1] += 40.0  # listed for the second head
    keys[0, 0, n // 2 :, 0] -= 25.0
    keys[0, 0, 70, 0], keys[0, 0, 1, 1] = 24.0, 1.0
    values = torch.randn(1, 1, n, 64, generator=g)
    q = torch.zeros(1, 2, 64)
    q[0, 0, 0] = q[0, 1, 1] = 1.0
    keys, values, q = (x.to(device) for x in (keys, values, q))
    start, stop = (torch.full((1,), x, dtype=torch.int32, device=device) for x in (0, n))
    config = SketchConfig(frame_len=64)
    index = SketchIndex.build(keys, values, kv_start=start, kv_len=stop, config=config, backend="reference")
    with crossover.switched(False):
        step = attend_in_looks(q, keys, values, index.sketch, {"dropped_mass": asked}, start, stop, 1.0, 0, 0, True)
    assert step is not None and (step.dropped_mass_bound <= asked).all()
    weights = (q.double() @ keys[0].double().mT)[0].softmax(-1)
    assert (torch.where(step.exact_mask[0], 0.0, weights).sum(-1) <= step.dropped_mass_bound[0].double()).all()
