"""The policies experiment counts what was selected, what was dropped, and where a policy did not deliver."""

import pytest

from experiments.captures import tiny_capture
from louver.experiments.policies import POLICIES, Config, run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("captures") / "tiny.safetensors"
    tiny_capture().save(path)
    found, more = run(Config(capture=path, stride=32))
    assert len(more["rows_per_layer"]) == 2 * len(found)
    return {row["policy"]: row for row in found}


def test_every_policy_has_a_row_and_keeps_its_word(rows):
    assert list(rows) == list(POLICIES)
    for row in rows.values():
        assert not row["num_bound_violations"] and not row["num_asked_violations"]


def test_guarantees(rows):
    by_guarantee = {g: {p for p, row in rows.items() if row["guarantee"] == g} for g in ("exact", "certified", "none")}
    assert {"topk:80", "budget:0.1", "relative:5"} <= by_guarantee["exact"]
    assert {"mass:0.01", "error:0.1", "exact:0.01", "topk:20|mass:0.05"} <= by_guarantee["certified"]
    assert {"sample-max", "sample-gap", "drop:0.1", "fp8"} <= by_guarantee["none"]


def test_what_was_asked_is_what_was_certified(rows):
    assert rows["mass:0.05"]["dropped_mass"] <= rows["mass:0.05"]["dropped_mass_bound"] <= 0.05
    assert rows["error:0.1"]["output_error"] <= 0.1
    assert rows["error:0.1"]["dropped_mass"] is None


def test_only_samples_depend_on_a_seed(rows):
    drawn = {policy for policy, row in rows.items() if row["selected_cv_over_seeds"] is not None}
    assert drawn == {policy for policy in rows if policy.startswith("sample-")}
    assert rows["sample-max"]["selected_cv_over_seeds"] > 0.1
    assert rows["mass:0.05"]["need_95_correlation"] > 0.5
