"""The switch of the dispatch to dense on a card: with it a short cache reads everything, without it what the policy asks for."""

import pytest
import torch

from louver import LouverAttention
from louver.experiments.synthetic import heavy_tailed
from louver.kernels import crossover

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("policy", ["exact:0.01", "budget:0.01"])
def test_a_short_cache_is_dense_unless_that_is_switched_off(policy):
    layer = LouverAttention(policy)
    data = heavy_tailed(3000, num_q_heads=6, num_kv_heads=2, head_dim=64, dtype=torch.float16, device="cuda")
    layer.append(data.keys, data.values)
    q = data.q
    layer.observe(data.metric_queries, None, 0.125)
    with crossover.switched(True):
        dense = layer.attend(q, 0.125)
    with crossover.switched(False):
        sparse = layer.attend(q, 0.125)
    assert torch.equal(dense.stats.bytes_read, dense.stats.bytes_dense)
    assert (dense.certificate == 0).all()
    assert (sparse.stats.bytes_read < 0.8 * sparse.stats.bytes_dense).all()
