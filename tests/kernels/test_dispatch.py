"""Which caches the GPU backend attends densely."""

import importlib

import pytest

pytest.importorskip("triton")
is_short = importlib.import_module("louver.kernels.triton.step").is_short


@pytest.mark.parametrize(
    "tokens, kv_heads, head_dim, group, short",
    [
        (8192, 8, 128, 4, True),
        (40000, 8, 128, 4, False),
        (40000, 8, 128, 7, False),
        (131072, 8, 64, 4, False),
        (131072, 4, 64, 7, True),
        (262144, 4, 64, 7, False),
        (8192, 32 * 8, 128, 4, True),
    ],
)
@pytest.mark.parametrize("drop", [True, False])
def test_dense_is_taken_where_it_was_measured_to_be_faster(tokens, kv_heads, head_dim, group, short, drop):
    assert is_short(tokens, kv_heads * head_dim, group, drop) == short
