"""The end-to-end benchmark, on the CPU and small: that it decodes through every kind of cache, not how fast."""

import pytest

pytest.importorskip("transformers")

from louver.experiments.decode_gpu import DYNAMIC, FLASH, Config, run


def test_every_kind_of_cache_decodes():
    config = Config(
        kv_len=300,
        ways=(DYNAMIC, "dense", "dense" + FLASH, "topk:20", "exact:0.05"),
        num_layers=2,
        hidden_size=128,
        num_q_heads=2,
        num_kv_heads=1,
        new_tokens=3,
        device="cpu",
    )
    rows = run(config)
    assert [row["policy"] for row in rows] == list(config.ways)
    assert all(row["tokens_per_s"] > 0 and row["num_attention_syncs"] is None for row in rows)
    assert max(row["speedup_vs_best_dense"] for row in rows[:3]) == 1
