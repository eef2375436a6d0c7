"""Tuning meets its target with no more bytes than all layers alike, and says when it can't."""

import pytest
import torch

from louver.errors import InputFileError, PolicyError
from louver.experiments.rows import write_rows
from louver.experiments.tuning import Config, perplexity, run
from louver.integrations.transformers import LouverCache


class Letters:
    """A tokenizer of a kind: a token per letter."""

    def __call__(self, text, **_):
        ids = torch.tensor([[1 + ord(letter) % 120 for letter in text]])
        return type("Encoded", (), {"input_ids": ids})


@pytest.fixture(scope="module")
def loaded():
    from integrations.tiny_models import llama

    return llama(num_hidden_layers=3, max_position_embeddings=1024), Letters()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + (i * i + i // 7) % 26) for i in range(900)))
    return path


def tune(text, loaded, **changes):
    settings = {"prompt_file": text, "max_tokens": 800, "held_out": 32, "target_error": 1e-3} | changes
    return run(Config(**settings), loaded=loaded)


def test_the_target_is_met_at_no_more_bytes(text, loaded):
    found = tune(text, loaded, ladder=("topk:2", "budget:0.5", "exact:1"), scope="layer")
    alike = [row for row in found.rows if row["stage"] == "all layers alike"]
    chosen = found.rows[-1]
    assert chosen["stage"] == "chosen" and chosen["kl_nats"] <= 1e-3
    assert max(row["kl_nats"] for row in found.rows) > 1e-3, "nothing was at stake"
    assert chosen["bytes_fraction"] <= min(row["bytes_fraction"] for row in alike if row["kl_nats"] <= 1e-3)
    assert set(found.policies) - {"default"} <= {"0", "1", "2"} and found.num_layers == 3
    assert chosen["perplexity"] == pytest.approx(chosen["perplexity_dense"], rel=0.1)
    assert "each layer at its own" in {row["stage"] for row in found.rows}


def test_heads_choose_for_themselves_and_a_cache_reads_it(text, loaded, tmp_path):
    found = tune(text, loaded, ladder=("exact:0.001+unread:0.6", "exact:0.1+unread:0.02", "exact:1"), target_error=2e-6)
    chosen = found.rows[-1]
    assert chosen["kl_nats"] <= 2e-6 < max(row["kl_nats"] for row in found.rows)
    assert "each head at its own" in {row["stage"] for row in found.rows}
    path = tmp_path / "tuning.json"
    write_rows(path, found.rows, seed=None, policies=found.policies, num_layers=found.num_layers)
    cache = LouverCache.from_tuning(path, loaded[0].config)
    served = {str(i): layer.attention.policy.spec for i, layer in enumerate(cache.layers)}
    assert served == {str(i): found.policies.get(str(i), found.policies["default"]) for i in range(3)}


def test_a_loose_target_takes_the_cheapest(text, loaded):
    found = tune(text, loaded, measure="top1", target_error=1.0, ladder=("topk:2", "exact:1"), scope="layer")
    assert found.policies == {"default": "topk:2"}


def test_a_target_out_of_reach_is_said(text, loaded):
    with pytest.raises(PolicyError, match="drops nothing"):
        tune(text, loaded, ladder=("topk:1", "exact:1"))
    with pytest.raises(PolicyError, match="no policy of topk:1 meets kl"):
        tune(text, loaded, target_error=1e-12, ladder=("topk:1",))


def test_perplexity_by_hand():
    even = torch.zeros(4, 10)
    assert perplexity(even, torch.tensor([1, 2, 3, 4])) == pytest.approx(10)
    sure = torch.nn.functional.one_hot(torch.tensor([2, 3, 4, 0]), 10) * 50.0
    assert perplexity(sure, torch.tensor([1, 2, 3, 4])) == pytest.approx(1)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"measure": "bleu"}, "measure"),
        ({"scope": "model"}, "scope"),
        ({"target_error": 0.0}, "target_error"),
        ({"held_out": 800}, "held_out"),
    ],
)
def test_bad_settings(text, loaded, changes, complaint):
    with pytest.raises(InputFileError, match=complaint):
        tune(text, loaded, **changes)
