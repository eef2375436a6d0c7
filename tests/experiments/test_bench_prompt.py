"""What encoding adds to a prompt: timed within the prefill it is part of, and taken off it."""

import pytest

from louver.experiments import bench_prompt


@pytest.mark.model
@pytest.mark.slow
def test_encoding_is_timed_apart_from_the_rest_of_the_prefill():
    done = []
    (row,) = bench_prompt.run(300, ("budget:0.05",), "auto", lambda now, total: done.append((now, total)))
    assert (row["kv_len"], row["num_layers"], row["policy"]) == (300, 30, "budget:0.05")
    assert 0 < row["encode_ms"] < row["prefill_ms"]
    assert row["encode_share"] == pytest.approx(row["encode_ms"] / row["prefill_ms"])
    assert done[-1] == (300, 300)
