"""Bounds of groups in subspaces, gathered for every key: every backend finds what plain loops find."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from louver.kernels import available_backends, get_ops
from strategies import generator, seeds

backends = pytest.mark.parametrize("backend", available_backends())


@backends
@given(
    heads=st.integers(1, 3),
    subspaces=st.integers(1, 17),
    rows=st.integers(1, 9),
    keys=st.sampled_from((0, 1, 7, 64, 1023, 1025, 2100)),
    count=st.sampled_from((1, 40, 3000)),
    wide=st.booleans(),
    seed=seeds(),
)
def test_bounds_reach_as_their_sums_and_parts_do(backend, heads, subspaces, rows, keys, count, wide, seed):
    random = generator(seed)
    dtype = torch.int32 if wide else torch.int16
    group = torch.randint(count, (heads, subspaces, keys), generator=random).to(dtype)
    upper = torch.randn(heads, subspaces, rows, count, generator=random)
    upper[torch.rand(upper.shape, generator=random) < 0.01] = torch.nan  # says nothing: the key stays
    upper[torch.rand(upper.shape, generator=random) < 0.01] = torch.inf
    slack = torch.rand(heads, subspaces, rows, generator=random) * 1e-3
    tau = torch.randn(heads, rows, subspaces, generator=random)
    ops = get_ops(backend)
    found = ops.all_reach(group, upper, slack, tau)
    summed = ops.sum_reaches(group, upper, slack[:, 0], tau.sum(-1))
    assert found.shape == summed.shape == (heads, rows, keys)
    for head in range(heads):
        for row in range(rows):
            each = [upper[head, s, row, group[head, s].long()] for s in range(subspaces)]
            inside = [~(x + slack[head, s, row] < tau[head, row, s]) for s, x in enumerate(each)]
            assert torch.equal(found[head, row], torch.stack(inside).all(0))
            total = each[0]
            for x in each[1:]:
                total = total + x
            assert torch.equal(summed[head, row], ~(total + slack[head, 0, row] < tau[head, row].sum()))
