"""Every stored row keeps what is promised; the check itself can fail."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import evidence


def test_no_stored_row_breaks_a_promise():
    assert evidence.violations() == []
    counted = [row for _, row in evidence.rows() if row.get("num_bound_violations") is not None]
    asked = [row for _, row in evidence.rows() if row.get("num_asked_violations") is not None]
    assert len(counted) > 300 and len(asked) > 200, "the rows that speak for the bounds are gone"


@pytest.mark.parametrize(
    "row",
    [
        {"guarantee": "certified", "policy": "exact:0.01", "num_bound_violations": 1},
        {"guarantee": "none", "policy": "sample-max", "num_bound_violations": 2},
        {"guarantee": "certified", "policy": "exact:0.01", "num_bound_violations": None},
        {"guarantee": "certified", "policy": "error:0.1", "num_bound_violations": 0, "num_asked_violations": None},
        {"guarantee": "certified", "policy": "topk:5|mass:0.1", "num_bound_violations": 0, "num_asked_violations": 3},
        {"guarantee": "exact", "index": "ball", "num_false_negatives": 1},
    ],
)
def test_a_broken_promise_is_told(row, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps({"machine": {}, "rows": [row]}))
    assert len(evidence.violations(tmp_path)) == 1
    kept = {"guarantee": "none", "index": "lsh", "policy": None, "num_false_negatives": 9, "num_bound_violations": None}
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [kept]}))
    assert evidence.violations(tmp_path) == []
