"""The bench: every way is measured, in turn, and every claim checked."""

import pytest
import torch

from experiments.captures import tiny_capture
from louver.errors import InputFileError
from louver.experiments.bench import Config, interleaved, run
from louver.experiments.bench_charts import charts
from louver.experiments.synthetic import heavy_tailed


def test_every_way_and_policy_has_a_row():
    policies = ("topk:5", "budget:0.05", "exact:0.05")
    config = Config(kv_lens=(300, 600), shape=(6, 2, 64), dtype="float32", policies=policies, repetitions=2)
    rows = list(run(config))
    assert [r["kv_len"] for r in rows] == [300] * 7 + [600] * 7
    assert {r["policy"] for r in rows} == {"sdpa", "eager_grouped", "eager_repeat", "dense", *policies}
    for row in rows:
        assert row["latency_us_p20"] <= row["latency_us"] <= row["latency_us_p80"]
        if row["index"] == "sketch":
            assert row["num_false_negatives"] == 0 and row["num_bound_violations"] == 0
            assert row["bytes_fraction"] > 0


def test_the_layers_of_a_capture_are_copies(tmp_path):
    path = tmp_path / "capture.safetensors"
    capture = tiny_capture()
    capture.save(path)
    rows = list(run(Config(capture=path, dtype="float32", policies=("exact:0.05", "budget:0.1"), repetitions=2)))
    assert {(row["data"], row["kv_len"]) for row in rows} == {(capture.model, capture.kv_len)}
    sketched = [row for row in rows if row["index"] == "sketch"]
    assert len(sketched) == 2 and all(row["num_bound_violations"] == 0 for row in sketched)
    assert set(charts(rows)) == {"selected"}


def test_ways_take_turns_over_the_copies():
    seen = []
    ways = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(2)] for name in "ab"}
    times = interleaved(ways, 2)
    assert seen == [("a", 0), ("b", 1), ("a", 1), ("b", 0), ("a", 0), ("b", 1), ("a", 1), ("b", 0)]
    assert [len(t) for t in times.values()] == [2, 2]


def test_the_generator_repeats_itself():
    one, two = (heavy_tailed(200, num_q_heads=4, num_kv_heads=2, head_dim=32, seed=3) for _ in range(2))
    assert torch.equal(one.keys, two.keys) and torch.equal(one.q, two.q)
    assert not torch.equal(one.keys, heavy_tailed(200, num_q_heads=4, num_kv_heads=2, head_dim=32).keys)


@pytest.mark.parametrize("change", [{"dtype": "int8"}, {"shape": (5, 2, 64)}])
def test_what_cannot_be_measured_is_refused(change):
    with pytest.raises(InputFileError):
        Config(**change)
