"""The profile of a tiny model, and its picture."""

import pytest
import torch

from experiments.captures import tiny_capture
from experiments.words import Words
from integrations import tiny_models
from louver.cli.profile import timing
from louver.experiments.charts import profile_png
from louver.experiments.profile import Config, _keys_needed, cheapest, recommend, run
from louver.experiments.step_time import KernelTimes, _fitted


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    prompt = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    prompt.write_text("the quick brown fox jumps over the lazy dog " * 8)
    return run(Config(prompt_file=prompt, num_queries=64), loaded=(tiny_models.gemma3(), Words()))


def test_every_layer_and_head_is_there(profile):
    assert [row["layer"] for row in profile.rows_per_layer] == [1, 3]
    assert [(row["layer"], row["head"]) for row in profile.rows_per_head] == [(i, h) for i in (1, 3) for h in range(4)]
    assert [row["policy"] for row in profile.rows] == ["exact:0.002", "exact:0.01", "exact:0.03"]
    for row in profile.rows:
        assert row["num_bound_violations"] == 0 and row["kv_len"] == 352
        assert row["speedup_attention_predicted"] == pytest.approx(1 / row["bytes_fraction"])
        assert 1 <= row["speedup_step_predicted"] <= row["speedup_attention_predicted"]
    for row in profile.rows_per_layer:
        heads = [h for h in profile.rows_per_head if h["layer"] == row["layer"]]
        assert row["output_error"] == pytest.approx(sum(h["output_error"] for h in heads) / 4)
        assert row["keys_for_90_fraction"] <= row["keys_for_99_fraction"]


def test_prediction_stands_beside_a_decode(profile):
    shown = next(row for row in profile.rows if row["policy"] == "exact:0.01")
    for row in [shown, *profile.rows_per_layer]:
        assert row["prediction_error"] == pytest.approx(row["bytes_fraction"] / row["bytes_fraction_measured"] - 1)
        assert abs(row["prediction_error"]) < 0.1
    assert all("bytes_fraction_measured" not in row for row in profile.rows if row is not shown)


def test_a_steps_time_is_predicted_and_measured(profile):
    """Within a factor of four either way: tests share their cores, and this model's steps are mostly calls."""
    here, dense, *further = profile.rows_by_length
    for row in (here, dense):
        assert 1 / 4 < row["step_ms"] / row["step_ms_measured"] < 4
        assert row["step_ms_error"] == pytest.approx(row["step_ms"] / row["step_ms_measured"] - 1)
    assert all("step_ms_measured" not in row for row in further)
    lengths = [(row["kv_len"], row["policy"]) for row in profile.rows_by_length]
    assert lengths == [(n, policy) for n in (352, 1408, 5632) for policy in ("exact:0.01", "dense")]
    shown = next(row for row in profile.rows if row["policy"] == "exact:0.01")
    assert shown["step_ms_dense_measured"] == dense["step_ms_measured"]
    assert shown["speedup_vs_dense"] == pytest.approx(dense["step_ms"] / here["step_ms"])
    assert "not attention" in timing(profile)


def test_predictions_by_hand():
    times = KernelTimes(
        dense_call_us=10.0,
        dense_token_us=0.5,
        sketch_call_us=60.0,
        sketch_key_us=0.1,
        exact_key_us=10.0,
        dense_up_to=100,
    )
    assert times.dense_us(1000) == 510 and times.sketch_us(1000, 0.01) == pytest.approx(260)
    assert times.step_us(100, 0.01) == 60 and times.step_us(1000, 0.01) == pytest.approx(260)
    assert times.crossover_tokens(0.01) == round(50 / 0.3) and times.crossover_tokens(0.05) is None


def test_terms_are_recovered_from_times_and_never_negative():
    terms = [(1.0, n, n * share) for n in (500, 1000, 2000) for share in (0.01, 0.05)]
    rows = [{"latency_us": 40 + 0.1 * n + 3 * exact} for _, n, exact in terms]
    assert _fitted(terms, rows) == pytest.approx([40, 0.1, 3])
    falling = [{"latency_us": 100 - 0.01 * n} for _, n, _ in terms]
    assert min(_fitted(terms, falling)) == 0


def test_heads_and_layers_have_settings_of_their_own(profile):
    for row in [*profile.rows_per_layer, *profile.rows_per_head]:
        assert row["recommended_policy"] in ("exact:0.002", "exact:0.01", "exact:0.03")
        assert row["speedup_attention_predicted"] == pytest.approx(1 / row["bytes_fraction"])
    assert {row["kv_head"] for row in profile.rows_per_head} == {0, 1}
    for row in profile.rows_per_layer:
        heads = [h for h in profile.rows_per_head if h["layer"] == row["layer"]]
        assert row["bytes_fraction"] == pytest.approx(sum(h["bytes_fraction"] for h in heads) / 4)
    choices = {"a": (0.02, 0.1), "b": (0.008, 0.2), "c": (0.001, 0.3)}
    assert [cheapest(choices, wanted) for wanted in (0.1, 0.01, 0.005, 1e-4)] == ["a", "b", "c", "c"]


def test_keys_needed_by_hand():
    capture = tiny_capture()
    layer = capture.layers[0]
    needed = _keys_needed(capture, layer)
    head = 4
    shares = []
    for place in range(33, 64, 16):
        position = int(capture.query_positions[place])
        logits = (
            layer.keys[head // 3, : position + 1].double() @ layer.queries[head, place].double() * capture.softmax_scale
        )
        mass = logits.softmax(0).sort(descending=True).values
        shares.append((int((mass.cumsum(0) < 0.9).sum()) + 1) / (position + 1))
    assert float(needed[head, 0]) == pytest.approx(sum(shares) / len(shares))


def test_recommendations():
    def row(policy, error, share, step):
        return {
            "policy": policy,
            "output_error": error,
            "bytes_fraction": share,
            "speedup_step_predicted": step,
            "kv_len": 10,
        }

    rows = [row("a", 0.02, 0.18, 1.5), row("b", 0.008, 0.2, 1.4), row("c", 0.004, 0.25, 1.3)]
    assert recommend(rows, Config())["policy"] == "b"
    assert recommend(rows, Config(wanted_error=0.005))["policy"] == "c"
    assert recommend(rows, Config(wanted_error=0.001))["policy"] == "c"
    assert recommend([row("b", 0.008, 0.2, 1.01)], Config())["policy"] == "dense"


def test_the_picture_is_drawn_from_rows_alone(profile):
    assert profile_png(profile.rows[1], profile.rows_per_layer, profile.rows_per_head).startswith(b"\x89PNG")
    assert torch.is_grad_enabled()
