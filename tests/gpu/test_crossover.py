"""The switch of the dispatch to dense on a card: with it a short cache reads everything, without it what the policy asks for."""

import pytest
import torch

from louver import LouverAttention
from louver.kernels import crossover

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("policy", ["exact:0.01", "budget:0.01"])
def test_a_short_cache_is_dense_unless_that_is_switched_off(policy):
    layer = LouverAttention(policy)
    keys, values = torch.randn(2, 1, 2, 3000, 64, device="cuda").half()
    layer.append(keys, values)
    q = torch.randn(1, 6, 64, device="cuda").half()
    layer.observe(q[:, :, None], None, 0.125)
    with crossover.switched(True):
        dense = layer.attend(q, 0.125)
    with crossover.switched(False):
        sparse = layer.attend(q, 0.125)
    assert torch.equal(dense.stats.bytes_read, dense.stats.bytes_dense)
    assert (dense.certificate == 0).all()
    assert (sparse.stats.bytes_read < 0.8 * sparse.stats.bytes_dense).all()
