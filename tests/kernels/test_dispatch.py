"""Which caches the GPU backend attends densely."""

import importlib

import pytest

pytest.importorskip("triton")
is_short = importlib.import_module("louver.kernels.triton.step").is_short


@pytest.mark.parametrize(
    "tokens, kv_heads, head_dim, group, short",
    [
        (8192, 8, 128, 4, {"drop": True, "keep": True}),
        (40000, 8, 128, 4, {"drop": False, "keep": False}),
        (40000, 8, 128, 7, {"drop": False, "keep": False}),
        (131072, 8, 64, 4, {"drop": False, "keep": False}),
        (131072, 4, 64, 7, {"drop": False, "keep": True}),
        (262144, 4, 64, 7, {"drop": False, "keep": False}),
        (8192, 32 * 8, 128, 4, {"drop": True, "keep": True}),
    ],
)
def test_dense_is_taken_where_it_was_measured_to_be_faster(tokens, kv_heads, head_dim, group, short):
    found = {name: is_short(tokens, kv_heads * head_dim, group, name == "drop") for name in ("drop", "keep")}
    assert found == short
