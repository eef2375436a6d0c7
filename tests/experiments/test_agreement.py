"""The agreement experiment leads every policy along dense attention's tokens and says where they part."""

import pytest

from louver.experiments.agreement import Config, joined, run
from louver.experiments.demo_model import demo_model

pytestmark = pytest.mark.model
SPECS = ("dense", "exact:1", "exact:0.01", "error:0.2", "mass:0.01", "fixed:1e30", "fp8", "kivi4")


@pytest.fixture(scope="module")
def outcome():
    config = Config(policies=SPECS, prompts=(0, 1), prompt_tokens=300, steps=4, audit_stride=2)
    rows, more = run(config, loaded=demo_model())
    return {row["policy"]: row for row in rows}, more["rows_per_prompt"]


def test_dense_agrees_with_itself(outcome):
    rows, _ = outcome
    assert rows["dense"]["kl_nats_max"] == 0 and rows["dense"]["num_equal_prompts"] == 2
    assert rows["exact:1"]["kl_nats_max"] < 1e-6 and rows["exact:1"]["top1_agreement"] == 1


def test_what_drops_nearly_everything_parts_ways(outcome):
    rows, _ = outcome
    assert rows["fixed:1e30"]["kl_nats"] > 100 * rows["exact:0.01"]["kl_nats"]


def test_certificates_are_checked_and_kept(outcome):
    rows, per_prompt = outcome
    for spec in SPECS[:-2]:
        assert rows[spec]["num_checked"] == 2 * 2 * 30 * 9  # prompts, audited steps, layers, heads
        assert rows[spec]["num_bound_violations"] == 0 and rows[spec]["num_asked_violations"] == 0
    assert len(per_prompt) == 2 * len(SPECS) and {row["num_steps"] for row in per_prompt} == {4}


def test_codes_are_charged_and_promise_nothing(outcome):
    rows, _ = outcome
    for code, coded in (("fp8", 0.5), ("kivi4", 0.3125)):
        open_group = (1 - coded) * 31 / 300  # at most 31 tokens of at least 300 are still exact
        assert coded < rows[code]["bytes_fraction"] <= coded + open_group
    assert rows["fp8"]["guarantee"] == "none"
    assert rows["fp8"]["num_bound_violations"] is None


def test_rows_of_prompts_are_joined_by_policy(outcome):
    rows, per_prompt = outcome
    assert joined(per_prompt) == list(rows.values())
