"""The experiments offload and disk say what they measured."""

import pytest
import torch

from louver.errors import InputFileError, PolicyError
from louver.experiments import disk, offload
from louver.experiments.catalog import experiments
from louver.experiments.offload_rows import evidence, moved_bytes
from louver.experiments.synthetic import heavy_tailed


@pytest.fixture(scope="module")
def rows():
    pytest.importorskip("faiss")
    config = offload.Config(
        kv_lens=(2000,),
        ann_kv_lens=(2000,),
        shape=(4, 2, 64),
        device="cpu",
        repetitions=2,
        ann=("ivf", "lsh"),
        ann_heads=1,
    )
    return offload.run(config)[0]


def test_rows_of_the_cpu(rows):
    by = {(row["index"], row["policy"], row["store"]): row for row in rows}
    whole = 2 * 2 * 2000 * 64 * 4
    streamed = by["none", "dense", "streamed"]
    assert streamed["moved_bytes"] == whole and streamed["speedup_vs_streamed"] == 1.0
    for store in ("host", "disk"):
        for policy in ("budget:0.01", "exact:0.01"):
            row = by["sketch", policy, store]
            assert row["recall"] == 1.0 and row["num_bound_violations"] == 0
            assert 0 < row["moved_fraction"] < 0.5 and row["moved_bytes"] == row["moved_fraction"] * whole
    assert by["sketch", "exact:0.01", "host"]["moved_bytes"] == by["sketch", "exact:0.01", "disk"]["moved_bytes"]
    assert by["sketch", "budget:0.01", "host"]["index_memory_fraction"] < 0.2
    assert by["ivf", "k = 0.01", "host"]["guarantee"] == "none" and by["lsh", "k = 0.01", "host"]["recall"] < 1
    described = experiments()["offload"]
    said = described.finding(rows)
    assert "times faster than streaming" in said and "Indexes on the CPU" in said
    assert all(len(line) == len(described.columns) for line in described.cells(rows))


def test_evidence_sees_a_lost_key():
    from louver import LouverAttention

    data = heavy_tailed(600, num_q_heads=4, num_kv_heads=2, head_dim=64)
    layer = LouverAttention("topk:5")
    layer.append(data.keys, data.values)
    layer.observe(data.metric_queries, None, 0.125)
    layer.record = True
    result = layer.attend(data.q, 0.125)
    assert evidence(data, result)["recall"] == 1.0
    assert moved_bytes(result.stats, torch.float16) >= 2 * 2 * 64 * 2 * (
        600 % 128
    )  # the open block of both KV heads, at least
    best = (data.q[0, 0] @ data.keys[0, 0].T).argmax()
    result.exact_mask[0, 0, best] = False
    found = evidence(data, result)
    assert found["num_false_negatives"] == 1 and found["recall"] < 1


@pytest.mark.skipif(not disk.STATUS.exists(), reason="only Linux says in /proc what of a process is in memory")
def test_a_cache_on_disk_is_not_in_the_processs_own_memory(tmp_path):
    config = disk.Config(gigabytes=0.2, dtype="bfloat16", layers=1, steps=1, policy="budget:0.01", folder=tmp_path)
    ((row,), _) = disk.run(config)
    assert row["disk_bytes"] == pytest.approx(0.2e9, rel=0.1)
    assert row["rss_anon_bytes"] - row["rss_anon_bytes_before"] < 0.8 * row["disk_bytes"]
    assert experiments()["disk"].finding([row]).startswith("With 0.2 GB of bfloat16 cache on disk")
    assert list(tmp_path.iterdir()) == []


def test_refusals():
    for wrong in ({"shape": (4, 3, 64)}, {"shape": (4, 2)}, {"device": "tpu"}):
        with pytest.raises(InputFileError):
            offload.Config(**wrong)
    if not torch.cuda.is_available():
        with pytest.raises(InputFileError, match="no CUDA"):
            offload.Config(device="cuda")
    for wrong in ({"ann": ("annoy",)}, {"policies": ("some",)}):
        with pytest.raises(PolicyError):
            offload.Config(**wrong)
    for wrong in ({"dtype": "int4"}, {"gigabytes": 0.0}):
        with pytest.raises(InputFileError):
            disk.Config(**wrong)
