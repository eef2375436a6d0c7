"""The demo over a tiny model: which rows it has, and that the ball index finds what a search of every key finds."""

import pytest
import torch

from integrations import tiny_models
from louver.errors import PolicyError
from louver.experiments import generation
from louver.experiments.demo import Config, run
from louver.policies import DEFAULT_POLICY


class Letters:
    """A tokenizer for tiny models: one token per character, as slow tokenizers are, without a chat template."""

    chat_template = None
    is_fast = False
    eos_token_id = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(c) % (tiny_models.VOCAB - 2) + 2 for c in text]}

    def decode(self, ids):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog " * 9)
    return path


def demo(text, **changes):
    config = Config(document=text, document_tokens=390, max_new_tokens=6, question="who?", **changes)
    return run(config, loaded=(tiny_models.llama(), Letters()))


def test_the_sketch_stands_beside_dense(text):
    found = demo(text)
    assert [(row["index"], row["policy"]) for row in found.rows] == [
        ("none", "dense"),
        ("none", "sdpa"),
        ("sketch", DEFAULT_POLICY),
    ]
    row = found.rows[2]
    assert row["num_bound_violations"] == row["num_false_negatives"] == 0
    assert all(r["latency_us_p20"] <= r["latency_us_p50"] <= r["latency_us_p80"] for r in found.rows)
    assert row["latency_vs_sdpa"] == pytest.approx(row["latency_us_p50"] / found.rows[1]["latency_us_p50"])
    assert len(found.rows_per_step) == 6 and len(found.rows_per_layer) == 2


def test_the_ball_index_stands_beside_flat_and_dense(text):
    found = demo(text, index="ball", policy="budget:0.1")
    assert [row["index"] for row in found.rows] == ["none", "none", "flat", "ball"]
    *_, flat, ball = found.rows
    assert ball["num_equal_tokens_flat"] == 6 and "num_equal_tokens_flat" not in flat
    for name in ("recall", "num_relevant", "num_equal_tokens", "exact_fraction", "kl_nats"):
        assert ball[name] == pytest.approx(flat[name], rel=1e-6), name
    assert ball["recall"] == 1 and ball["num_bound_violations"] == 0 and ball["guarantee"] == "exact"
    assert ball["index_bytes"] > flat["index_bytes"] == 0
    assert ball["scanned_fraction"] < flat["scanned_fraction"] == 1


def test_a_policy_that_needs_a_sketch_is_refused_at_the_door(text):
    with pytest.raises(PolicyError, match="index='ball' has not"):
        demo(text, index="ball", policy="exact:0.01")
    with pytest.raises(PolicyError, match="index='tree' is unknown"):
        demo(text, index="tree")


def test_generation_takes_an_index(text):
    config = generation.Config(model="tiny", prompt_file=text, policy="budget:0.1", index="ball", max_new_tokens=3)
    model = tiny_models.llama()
    (row,) = generation.run(config, loaded=(model, Letters()))
    assert row["index"] == "ball" and row["num_tokens"] == 3 and row["index_bytes"] > 0
    with torch.no_grad():
        assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).logits.shape[1] == 4


@pytest.mark.parametrize("store", ["host", "disk"])
def test_generation_says_where_the_cache_is(text, store, tmp_path):
    path = tmp_path / "work" if store == "disk" else None
    config = generation.Config(model="tiny", prompt_file=text, store=store, store_path=path, max_new_tokens=3)
    model = tiny_models.llama()
    (row,) = generation.run(config, loaded=(model, Letters()))
    assert row["store"] == store and row["gpu_bytes"] == 0
    assert row[f"{store}_bytes"] >= row["keys_values_bytes"] > 0
    assert row["host_bytes"] + row["disk_bytes"] == row["keys_values_bytes"] + row["index_bytes"]
