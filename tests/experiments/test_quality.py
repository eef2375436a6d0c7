"""The experiments on whole models, on a model and a tokenizer small enough for that."""

import math
import random

import pytest
import torch

from experiments.toy import ToyTokenizer, toy_model
from louver.errors import InputFileError
from louver.experiments import denoising, false_negatives, long_generation, perplexity, quality
from louver.experiments.baselines.hidden import Hidden
from louver.experiments.catalog import experiments
from louver.experiments.list_tasks import LIST_TASKS, list_samples
from louver.experiments.long_tasks import LONG_TASKS, haystack, long_batch, text_batch
from louver.experiments.words import Vocabulary

POLICIES = ("dense", "exact:0.05", "budget:1", "kivi4", "streaming:0.2")


@pytest.fixture(scope="module")
def loaded():
    return toy_model(), ToyTokenizer()


@pytest.fixture(scope="module")
def vocabulary(loaded):
    return Vocabulary(loaded[1])


def shown(name, rows):
    """The table and the finding can be written."""
    described = experiments()[name]
    assert all(len(line) == len(described.columns) for line in described.cells(rows))
    return described.finding(rows)


@pytest.mark.parametrize("task", LIST_TASKS)
def test_list_samples(task, vocabulary):
    samples = list_samples(task, vocabulary, 20, 7)
    assert samples == list_samples(task, vocabulary, 20, 7) != list_samples(task, vocabulary, 20, 8)
    assert len({(len(s.prompt), len(s.answer)) for s in samples}) == 1
    for s in samples:
        assert len(s.relevant) == len(s.answer) and not set(s.relevant) & set(s.separators + s.others)
        assert max(s.relevant + s.separators + s.others) < len(s.prompt)
        if task != "sum":  # what is copied stands where it is said to stand
            assert [s.prompt[i] for i in s.relevant] == s.answer
    with pytest.raises(InputFileError, match="unknown"):
        list_samples("sums", vocabulary, 1, 0)


@pytest.mark.parametrize("task", LONG_TASKS)
def test_long_batches(task, vocabulary):
    text = haystack(vocabulary, 3000)
    batch = long_batch(task, vocabulary, text, 400, 5, 3)
    again = long_batch(task, vocabulary, text, 400, 5, 3)
    assert batch.prompts.shape == (5, 400) and torch.equal(batch.prompts, again.prompts)
    assert batch.counts[:, 0].all() and batch.counts.shape == batch.answers.shape
    if task not in (
        "aggregation",
        "multi-needle",
        "tracking",
    ):  # the answer's tokens stand in the text as they are to be said
        for prompt, answer, counts in zip(batch.prompts.tolist(), batch.answers.tolist(), batch.counts, strict=True):
            wanted = answer[: int(counts.sum())]
            assert any(prompt[i : i + len(wanted)] == wanted for i in range(400))
    with pytest.raises(InputFileError, match="too few"):
        long_batch(task, vocabulary, text, 100, 1, 0)


def test_text_batches(vocabulary):
    text = haystack(vocabulary, 3000)
    read, following = text_batch(vocabulary, text, 100, 20, 4)
    assert read.shape == (4, 100) and following.shape == (4, 20)
    assert [*read[0].tolist(), *following[0].tolist()] == text[:120]
    with pytest.raises(InputFileError, match="at least"):
        text_batch(vocabulary, text, 5000, 20, 1)


def test_hidden_keys_are_not_attended():
    """Against attention over the other keys alone, step by step."""
    hidden = torch.zeros(2, 2, 30, dtype=torch.bool)
    hidden[0, 0, [3, 4]] = hidden[1, 0, 7] = hidden[0, 1, 20] = True
    layer = Hidden(hidden)
    keys, values = torch.randn(2, 2, 32, 16), torch.randn(2, 2, 32, 16)
    layer.append(keys[:, :, :29], values[:, :, :29])
    for step in range(3):
        layer.append(keys[:, :, 29 + step : 30 + step], values[:, :, 29 + step : 30 + step])
        q = torch.randn(2, 4, 16)
        out = layer.attend(q, 0.25).out
        for row in range(2):
            seen = [i for i in range(30 + step) if i >= 30 or not hidden[row, min(step, 1), i]]
            for head in range(4):
                weights = (keys[row, head // 2, seen] @ q[row, head] * 0.25).softmax(0)
                torch.testing.assert_close(out[row, head], weights @ values[row, head // 2, seen])


def test_false_negatives(loaded):
    config = false_negatives.Config(num_samples=6, tasks=("recall", "sum"), counts=(1, 3), fractions=(0.2,), batch=4)
    rows, _ = false_negatives.run(config, loaded=loaded)
    recall = {(row["hidden"], row["num_hidden"]): row for row in rows if row["task"] == "recall"}
    nothing = recall["nothing", None]
    assert nothing["kl_nats"] < 1e-6 and nothing["top1_agreement"] == 1 and nothing["hidden_fraction"] == 0
    assert recall["relevant", 1]["kl_nats"] > 0 and recall["relevant", 1]["num_samples"] == 6
    assert {key[1] for key in recall if key[0] == "irrelevant"} == {1, 3}
    assert recall["random", None]["hidden_fraction"] == pytest.approx(0.2, abs=0.02)
    assert all(row["guarantee"] == "none" for row in rows)
    assert "with the key it needs hidden" in shown("false-negatives", rows)
    assert rows == false_negatives.run(config, loaded=loaded)[0]


def test_what_is_hidden_is_what_is_said(vocabulary):
    sample = list_samples("recall", vocabulary, 1, 0)[0]
    rng = random.Random(0)
    for hiding in false_negatives.hidings(false_negatives.Config(counts=(1, 2, 4))):
        found = hiding.positions(sample, 0, rng)
        assert found is not None and len(found) == len(set(found)) and max([-1, *found]) < len(sample.prompt) - 1
        needed = sample.relevant[0] in found
        if hiding.kind.startswith("relevant"):
            assert needed and len(found) == hiding.count
        elif hiding.kind != "random":
            assert not needed and len(found) == hiding.count


def test_quality(loaded):
    config = quality.Config(
        tasks=("single-needle", "multi-needle"), kv_lens=(300,), policies=POLICIES, num_samples=5, batch=3, floor=0.0
    )
    rows, _ = quality.run(config, loaded=loaded)
    assert len(rows) == 4 * len(POLICIES)
    for row in rows:
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1 and not row["is_verdict"]
        if row["policy"] in ("dense", "budget:1"):
            assert row["accuracy_gain"] == 0 and row["within_dense_interval"] and row["kl_nats"] < 1e-4
    by_policy = {row["policy"]: row for row in rows if row["kv_len"] is None}
    assert by_policy["dense"]["num_samples"] == 10 and by_policy["dense"]["bytes_fraction"] == pytest.approx(1)
    assert by_policy["streaming:0.2"]["bytes_fraction"] == pytest.approx(0.2, abs=0.01)
    assert 0.3 < by_policy["kivi4"]["bytes_fraction"] < 0.4 and by_policy["exact:0.05"]["guarantee"] == "certified"
    assert "no verdict" in shown("quality", rows)


def test_a_task_the_model_cannot_do_is_reported_for_dense_alone(loaded):
    config = quality.Config(tasks=("documents",), kv_lens=(300,), policies=POLICIES, num_samples=4, floor=0.9)
    rows, _ = quality.run(config, loaded=loaded)
    assert [row["policy"] for row in rows] == ["dense"]
    assert "can do none" in shown("quality", rows)


def test_perplexity(loaded):
    config = perplexity.Config(kv_len=200, num_steps=8, num_samples=3, policies=POLICIES, batch=2)
    rows, _ = perplexity.run(config, loaded=loaded)
    by_policy = {row["policy"]: row for row in rows}
    dense = by_policy["dense"]
    assert dense["kl_nats"] < 1e-9 and dense["perplexity_change"] == 0 and dense["num_tokens"] == 24
    assert abs(by_policy["budget:1"]["perplexity_change"]) < 1e-3
    moved = by_policy["streaming:0.2"]
    assert moved["perplexity"] == pytest.approx(dense["perplexity"] * (1 + moved["perplexity_change"]))
    assert moved["perplexity_change_low"] <= moved["perplexity_change"] <= moved["perplexity_change_high"]
    assert "over 24 tokens" in shown("perplexity", rows)


def test_denoising(loaded):
    config = denoising.Config(
        kept=(0.05, 1.0), tasks=("quote",), kv_lens=(300,), num_samples=4, text_len=200, num_texts=2
    )
    rows, _ = denoising.run(config, loaded=loaded)
    everything = [row for row in rows if row["kept_fraction"] == 1]
    assert {row["task"] for row in everything} == {"quote", "all", "text"}
    assert all(row["kl_nats"] < 1e-4 for row in everything)
    assert "beat dense attention" in shown("denoising", rows)


def test_long_generation(loaded):
    config = long_generation.Config(kv_len=150, num_steps=40, num_samples=2, policies=("budget:1", "streaming:0.1"))
    rows, _ = long_generation.run(config, loaded=loaded)
    same, other = rows
    assert same["num_equal_tokens"] == 40 and same["all_equal_fraction"] == 1 and same["top1_agreement"] == 1
    assert other["num_equal_tokens"] < 40 and other["kl_nats"] > same["kl_nats"]
    assert len(other["kl_nats_quarters"]) == 4
    assert math.isclose(sum(other["kl_nats_quarters"]) / 4, other["kl_nats"], rel_tol=1e-6)
    assert "Over 80 tokens" in shown("long-generation", rows)


def test_refusals():
    with pytest.raises(InputFileError, match="unknown"):
        quality.Config(tasks=("nothing",))
    with pytest.raises(InputFileError, match="too short"):
        quality.Config(kv_lens=(10,))
    with pytest.raises(InputFileError, match="unknown"):
        false_negatives.Config(tasks=("nothing",))
    with pytest.raises(InputFileError, match="shares below 1"):
        false_negatives.Config(fractions=(2.0,))
