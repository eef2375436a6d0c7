"""The coverage experiment counts the keys that hold the attention, against a count made by hand."""

from pathlib import Path

import pytest
import torch

from experiments.words import Words
from integrations import tiny_models
from louver.errors import InputFileError
from louver.experiments.catalog import experiments
from louver.experiments.coverage import Config, all_weights, keys_needed, run


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompt") / "prompt.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 5)
    config = Config(
        prompt_file=path,
        tokens=180,
        question="what is this about?",
        max_new_tokens=6,
        policy="exact:1",
        recorded_layers=1,
    )
    return run(config, loaded=(tiny_models.llama(), Words()))


def test_keys_needed_by_hand():
    weights = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.97, 0.01, 0.01, 0.01]])
    assert keys_needed(weights, (0.5, 0.75, 0.999)).tolist() == [[1, 2, 4], [1, 1, 4]]
    q, keys = torch.randn(1, 4, 8), torch.randn(1, 2, 5, 8)
    logits = torch.stack([keys[0, head // 2] @ q[0, head] * 0.3 for head in range(4)])
    torch.testing.assert_close(all_weights(q, keys, 0.3), logits.softmax(-1))


def test_rows_and_steps_agree(outcome):
    rows, more = outcome
    steps, recording = more["rows_per_step"], more["recording"]
    assert [row["share"] for row in rows] == [0.5, 0.9, 0.99] and len(steps) == len(recording["steps"]) == 6
    assert [row["kv_len"] for row in steps] == [202 + i for i in range(6)]
    for row, name in zip(rows, ("keys_for_50", "keys_for_90", "keys_for_99"), strict=True):
        assert row["keys"] == pytest.approx(sum(step[name] for step in steps) / 6)
        assert row["widest_keys"] == max(step[name] for step in steps) == steps[row["widest_step"]][name]
        assert f"[{steps[row['narrowest_step']]['text'].strip()}]" in row["narrowest_text"].replace("[ ", "[")
    assert all(step["keys_for_50"] <= step["keys_for_90"] <= step["keys_for_99"] <= step["kv_len"] for step in steps)


def test_the_recording_holds_the_strongest_tokens(outcome):
    _, more = outcome
    recording = more["recording"]
    assert len(recording["texts"]) == 202 + 6 - 1 and recording["first_step"] == 201
    for step, layers in enumerate(recording["steps"]):
        (frame,) = layers.values()
        tokens, weights = ([float(x) for x in frame[name].split()] for name in ("tokens", "weights"))
        assert max(tokens) <= recording["first_step"] + step and len(tokens) == len(weights) == 40
        assert weights == sorted(weights, reverse=True) and sum(weights) <= 1.001
        assert frame["exact"] == 1 and frame["unread"] == 0


def test_the_finding_and_refusals(outcome):
    assert "99% of the mass took" in experiments()["coverage"].finding(outcome[0])
    with pytest.raises(InputFileError, match="share 2"):
        Config(shares=(2.0,))
    with pytest.raises(InputFileError, match="no such file"):
        run(Config(prompt_file=Path("nothing")), loaded=(tiny_models.llama(), Words()))
