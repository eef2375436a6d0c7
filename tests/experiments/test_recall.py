"""The recall experiment counts what each method found, against the true scores."""

from pathlib import Path

import pytest
import torch

from experiments.captures import tiny_capture
from louver.errors import PolicyError
from louver.experiments.baselines import AnnOptions
from louver.experiments.baselines.trees import Tree
from louver.experiments.catalog import experiments
from louver.experiments.recall import METHODS, Config, ask, run, size_matched, widened


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("captures") / "tiny.safetensors"
    tiny_capture().save(path)
    found, more = run(Config(capture=path, k=(5, 10), methods=tuple(m for m in METHODS if m != "pq")))
    assert {row["layer"] for row in more["rows_per_layer"]} == {0, 3}
    return found


def pick(rows, index, setting, k):
    (row,) = [r for r in rows if r["index"].startswith(index) and r["setting"] == setting and r["k"] == k]
    return row


def test_louver_loses_nothing_and_says_so(rows):
    for row in rows:
        exact = row["index"] == "louver"
        assert row["guarantee"] == ("exact" if exact else "none")
        assert (row["num_false_negatives"] == 0 and row["recall"] == 1) or not exact
        assert row["false_negatives_per_query"] == pytest.approx(row["num_false_negatives"] / row["num_queries"])
        assert row["recall"] == pytest.approx(1 - row["num_false_negatives"] / (row["num_queries"] * row["k"]))
        assert row["bytes_fraction"] > 0 and 0 <= row["scanned_fraction"] <= 1
    assert {row["num_queries"] for row in rows} == {2 * 2 * 6}  # layers, places, heads


def test_streaming_by_hand(rows):
    capture, found, wanted = tiny_capture(), 0, 0
    for layer in capture.layers.values():
        question, _ = ask(capture, layer, 16)
        n = question.keys.shape[2]
        kept = {*range(4), *range(n - 76, n)}
        for place in range(2):
            for head in range(6):
                best = question.scores[place, head].topk(10).indices.tolist()
                found, wanted = found + len(kept & set(best)), wanted + 10
    assert pick(rows, "streaming", "8 k tokens", 10)["recall"] == pytest.approx(found / wanted)


def test_questions_are_causal_and_fit_on_the_tokens_before():
    capture = tiny_capture()
    question, fitting = ask(capture, capture.layers[0], 16)
    assert question.keys.shape[2] == 600 - 64 + 32 and fitting.shape[2] == 32
    assert (capture.query_positions[capture.measured(16)] >= question.keys.shape[2]).all()
    head = torch.einsum("d,nd->n", question.queries[1, 4].double(), question.keys[0, 1].double())
    torch.testing.assert_close(question.scores[1, 4], head)


def test_what_costs_more_finds_more(rows):
    for k in (5, 10):
        assert pick(rows, "kdtree", "usual", k)["recall"] == pick(rows, "balltree", "usual", k)["recall"] == 1
        assert pick(rows, "quest", "8 k tokens", k)["recall"] >= pick(rows, "quest", "1 k tokens", k)["recall"]
        assert pick(rows, "quest", "1 k tokens", k)["bytes_fraction"] < 0.2


def test_settings():
    sized = {kind: size_matched(kind, 8192, 64, 40.0) for kind in ("hnsw", "ivf", "pq", "lsh")}
    assert sized["hnsw"].neighbors == 5 and sized["pq"].num_codes == 32 and sized["lsh"].bits_per_channel == 5
    assert sized["ivf"].num_lists == 2048 and sized["ivf"].num_probes == 91
    assert widened(AnnOptions(kind="lsh"), 4).rescored == 4 and widened(AnnOptions(kind="hnsw"), 2).ef_search == 32
    with pytest.raises(PolicyError, match="method 'kd'"):
        Config(capture=Path("x"), methods=("kd",))
    with pytest.raises(PolicyError, match="k=0"):
        Config(capture=Path("x"), k=(0,))
    with pytest.raises(PolicyError, match="kind='oak'"):
        Tree("oak", 0.1)


def test_the_finding_reads_rows(rows):
    said = experiments()["recall"].finding(rows)
    assert "Louver lost 0 keys in 48 queries (recall 1)" in said
