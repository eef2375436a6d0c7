"""Growing caches: what stays fixed, and what that does to the bounds."""

import pytest

from experiments.captures import tiny_capture
from louver.errors import PolicyError
from louver.experiments.catalog import experiments
from louver.experiments.growth import FIXED_NUMBER, FIXED_SIZE, Config, run


def test_rows(tmp_path):
    path = tmp_path / "tiny.safetensors"
    tiny_capture().save(path)
    rows, _ = run(Config(capture=path, kv_lens=(64, 512, 4096), k=5, subspaces=8))
    assert [(row["kv_len"], row["setting"]) for row in rows] == [
        (n, s) for n in (64, 512) for s in (FIXED_SIZE, FIXED_NUMBER)
    ]
    assert [row["group_len"] for row in rows] == [4, 4, 4, 32] and [row["num_groups"] for row in rows] == [
        16,
        16,
        128,
        16,
    ]
    assert rows[0]["scanned_fraction"] == rows[1]["scanned_fraction"]
    assert rows[2]["scanned_fraction"] < rows[3]["scanned_fraction"]
    for row in rows:
        assert row["num_false_negatives"] == 0 and row["guarantee"] == "exact"
        assert row["scanned_keys"] == pytest.approx(row["scanned_fraction"] * row["kv_len"])
        assert row["work_fraction"] == pytest.approx(1 / row["group_len"] + row["scanned_fraction"])
    assert "at 64 keys" in experiments()["growth"].finding(rows)
    with pytest.raises(PolicyError, match="holds 568 keys"):
        run(Config(capture=path, kv_lens=(4096,)))
    with pytest.raises(PolicyError, match="shortest"):
        Config(capture=path, kv_lens=(16,))
