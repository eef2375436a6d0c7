"""The latency experiment times every way over the same tokens, and every way computes the same attention."""

import pytest
import torch

from louver.attention import DenseAttention
from louver.errors import BackendError, InputFileError
from louver.experiments.catalog import experiments
from louver.experiments.latency import Concatenating, Config, DenseKernel, _figures, run
from louver.kernels import available_backends

SMALL = {"kv_lens": (96, 160), "shape": (4, 2, 64), "dtype": "float32", "steps": 6, "policies": ("exact:1.0",)}


def test_rows():
    seen = []
    rows, _ = run(Config(**SMALL, backends=("all",)), lambda *progress: seen.append(progress))
    ways = [(row["policy"], row["backend"]) for row in rows if row["kv_len"] == 96]
    backends = available_backends()
    torchs = [(name, "torch") for name in ("sdpa_in_place", "sdpa", "eager")]
    assert ways == [*(("dense", b) for b in backends), *torchs, *(("exact:1", b) for b in backends)]
    assert len(rows) == 2 * len(ways)
    for row in rows:
        assert 0 < row["latency_us_p20"] <= row["latency_us"] <= row["latency_us_p80"] and row["build_ms"] > 0
        dense = min(r["amortized_us"] for r in rows if r["policy"] == "dense" and r["kv_len"] == row["kv_len"])
        assert row["speedup_vs_dense"] == pytest.approx(dense / row["amortized_us"])
    assert seen[-1][1:] == (6, 6) and "At 160 tokens" in experiments()["latency"].finding(rows)


@pytest.mark.parametrize(
    "way", [Concatenating(eager=False), Concatenating(eager=True), *(DenseKernel(b) for b in available_backends())]
)
def test_every_opponent_is_dense_attention(way):
    dense = DenseAttention()
    for length in (20, 1, 1):
        keys, values = torch.randn(2, 1, 2, length, 16)
        way.append(keys, values)
        dense.append(keys, values)
    q = torch.randn(1, 6, 16)
    torch.testing.assert_close(way.attend(q, 0.3).reshape(1, 6, 16), dense.attend(q, 0.3).out)


def test_amortising_by_hand():
    figures = _figures([9.0, 9.0, 9.0, 1.0, 2.0, 6.0], 5.0, Config(amortized_over=100))
    assert figures["latency_us"] == 2.0 and figures["amortized_us"] == pytest.approx(3.0 + 5000 / 100)


def test_refusals():
    for bad in ({"dtype": "int8"}, {"shape": (3, 2, 64)}, {"steps": 0}):
        with pytest.raises(InputFileError):
            Config(**bad)
    with pytest.raises(BackendError):
        run(Config(**SMALL, backends=("magic",)))
