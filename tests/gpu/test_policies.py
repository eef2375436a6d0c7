"""Every policy on a real card: its certificates hold in float64, and say what was asked for."""

import pytest
import torch

from louver import LouverAttention
from louver.attention.asked import num_asked_violations
from louver.experiments.synthetic import heavy_tailed
from louver.kernels import crossover
from louver.policies import DEFAULT_POLICY, parse

pytestmark = pytest.mark.gpu

POLICIES = [
    DEFAULT_POLICY,
    "exact:0.01",
    "exact:0.002+sinks:4+recent:64",
    "budget:0.05",
    "topk:20",
    "fixed:30",
    "mass:0.01",
    "mass:0.2",
    "error:0.1",
    "error:0.5+sinks:4",
    "relative:6",
    "topk:20|mass:0.1",
    "sample-topk:3",
    "sample-gap",
]


@pytest.mark.parametrize("spec", POLICIES)
@pytest.mark.parametrize(("head_dim", "heads", "dtype"), [(128, (8, 2), torch.float16), (64, (9, 3), torch.bfloat16)])
def test_what_is_certified_holds(spec, head_dim, heads, dtype):
    scale, shape = head_dim**-0.5, {"num_q_heads": heads[0], "num_kv_heads": heads[1], "head_dim": head_dim}
    data = heavy_tailed(6003, **shape, dtype=dtype, device="cuda")
    layer = LouverAttention(spec)
    layer.record = True
    layer.append(data.keys, data.values)
    layer.observe(data.metric_queries, None, scale)
    with crossover.switched(False):
        result = layer.attend(data.q, scale)
    scores = data.q.double().unflatten(1, (heads[1], -1)) @ data.keys.double().mT
    weights = (scores * scale).softmax(-1)
    want, scores, weights = (
        (weights @ data.values.double()).flatten(1, 2),
        scores.flatten(1, 2),
        weights.flatten(1, 2),
    )
    bound = (result.certificate + result.arithmetic_bound).double()
    assert ((result.out.double() - want).norm(dim=-1) <= bound).all()
    assert result.exact_mask is not None
    assert not ((scores >= result.tau.double()[..., None]) & ~result.exact_mask).any()
    if layer.policy.drops:
        dropped = torch.where(result.exact_mask, 0.0, weights).sum(-1)
        assert (dropped <= result.dropped_mass_bound.double() + 1e-6).all()
    assert num_asked_violations(parse(spec), result) == 0
