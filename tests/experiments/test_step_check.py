"""A step beside float64: what the check counts, and that it sees a key that is lost and a certificate that is too low."""

from dataclasses import replace

import pytest
import torch

from louver.attention.fused import fused_step
from louver.experiments.step_check import check
from louver.experiments.synthetic import heavy_tailed
from louver.index.sketch import SketchIndex
from louver.kernels import get_ops
from louver.policies.spec import parse

SCALE = 0.125


@pytest.fixture(scope="module")
def data():
    return heavy_tailed(700, num_q_heads=6, num_kv_heads=2, head_dim=64, batch=2, seed=3)


def step(data, spec):
    index = SketchIndex.build(data.keys, data.values, data.metric_queries, backend="reference")
    place = (index.store.kv_start, index.store.kv_len, SCALE)
    done = fused_step(
        parse(spec),
        get_ops("reference"),
        data.q,
        data.keys,
        data.values,
        index.sketch,
        place,
        keep_best=True,
        record=True,
    )
    assert done is not None
    return done[0]


@pytest.mark.parametrize("spec", ["topk:20", "exact:0.05", "dense"])
def test_figures_are_those_of_float64_attention(data, spec):
    if spec == "dense":
        spec, result = "topk:20", replace(step(data, "topk:20"), tau=torch.full((2, 6), -torch.inf))
    else:
        result = step(data, spec)
    found = check(data.q, data.keys, data.values, result, result, SCALE, spec)
    assert found["recall"] == 1.0 and found["num_false_negatives"] == found["num_bound_violations"] == 0
    keys, values = (x.double().repeat_interleave(3, 1) for x in (data.keys, data.values))
    weights = torch.softmax(torch.einsum("bhd,bhnd->bhn", data.q.double(), keys) * SCALE, -1)
    want = torch.einsum("bhn,bhnd->bhd", weights, values)
    errors = (result.out.double() - want).norm(dim=-1) / want.norm(dim=-1)
    assert found["output_error"] == pytest.approx(float(errors.mean()))
    exact = result.exact_mask | (result.tau == -torch.inf)[..., None]
    assert found["selected_fraction"] == pytest.approx(float(exact.double().mean()))
    if spec == "topk:20":
        assert found["dropped_mass"] == pytest.approx(float((weights * ~exact).sum(-1).mean()), abs=1e-12)


def test_a_lost_key_and_a_low_certificate_are_seen(data):
    result = step(data, "topk:20")
    best = torch.einsum("bhd,bhnd->bhn", data.q, data.keys.repeat_interleave(3, 1)).argmax(-1, keepdim=True)
    broken = replace(result, exact_mask=result.exact_mask.scatter(-1, best, False))
    found = check(data.q, data.keys, data.values, result, broken, SCALE, "topk:20")
    assert found["recall"] < 1 and found["num_false_negatives"] == 2 * 12  # of those at tau, and of the twenty best
    nothing = torch.zeros_like(result.certificate)
    low = replace(result, certificate=nothing, arithmetic_bound=nothing)
    assert check(data.q, data.keys, data.values, low, result, SCALE, "topk:20")["num_bound_violations"] == 12
