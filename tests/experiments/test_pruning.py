"""The pruning experiment counts what it says, against figures worked out by hand from the scores."""

import pytest
import torch

from experiments.captures import tiny_capture
from louver.errors import InputFileError, PolicyError
from louver.experiments.codecs import CODECS, METRICS
from louver.experiments.pruning import Config, ask, methods, run

EVERYTHING = {
    "index": ("ball", "box", "sketch"),
    "subspaces": (1, 8),
    "center": ("mean", "key"),
    "grouping": ("kcenter", "kmeans"),
    "enclosure": ("ball", "box"),
    "slicing": ("contiguous", "rotated"),
    "codec": ("sketch", *CODECS),
    "metric": ("frame", "diagonal", "identity", "full"),
}


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("captures") / "tiny.safetensors"
    tiny_capture().save(path)
    return path


@pytest.fixture(scope="module")
def everything(capture_file):
    rows, more = run(Config(capture=capture_file, targets=(5.0, 0.05), **EVERYTHING))
    return rows, more["rows_per_layer"]


def test_no_exact_rule_loses_a_key(everything):
    rows, _ = everything
    assert len(rows) > 100
    for row in rows:
        assert row["guarantee"] == ("none" if row["rule"] == "oracle-and" else "exact")
        assert (
            row["num_false_negatives"] == 0 and row["recall"] == 1
        )  # the oracle knows the answer, so it loses none either
        assert row["selected_fraction"] <= row["scanned_fraction"] <= row["scanned_union_fraction"] <= 1


def test_ta_leaves_what_sum_leaves(everything):
    def scanned(rule):
        keep = ("index", "subspaces", "grouping", "enclosure", "center", "slicing", "target")
        return {
            tuple(r[k] for k in keep): r["scanned_fraction"]
            for r in everything[0]
            if r["rule"] == rule and "center" in r
        }

    both = scanned("ta")
    assert both and all(scanned("sum")[key] == value for key, value in both.items())


def test_the_sound_and_leaves_nearly_everything(everything):
    by_rule = {r: [x["scanned_fraction"] for x in everything[0] if x["rule"] == r] for r in ("and", "sum")}
    assert min(by_rule["and"]) > 0.9 > max(min(by_rule["sum"]), 0.5)


def test_joint_and_product_pass_rates(everything):
    for row in everything[0]:
        assert ("joint_pass_fraction" in row) == (row["rule"] == "oracle-and")
        if row["rule"] == "oracle-and":
            assert row["selected_fraction"] <= row["joint_pass_fraction"] <= row["scanned_fraction"]
            assert 0 < row["product_pass_fraction"] < 1


def test_bytes_follow_from_what_was_read(everything):
    """Index, scanned keys and selected values: worked out anew from the fractions, where there is one plane."""
    rows, layer_rows = everything
    for row in layer_rows:
        if row.get("planes") != 2:
            selected = row["bytes_fraction"] - row["index_bytes_fraction"] - row["scanned_union_fraction"] / 2
            assert row["selected_fraction"] / 2 - 1e-9 <= selected <= 3 * row["selected_fraction"] / 2 + 1e-9
    assert len(layer_rows) == 2 * len(rows)


def test_the_shipped_sketch_agrees_with_its_codec(everything):
    """The codec is the sketch in float64: what differs is float32 slack, and the block that is still open."""
    figures = {}
    for row in everything[0]:
        if row.get("planes") == 1 and row["codec"] in ("sketch", "frames"):
            figures.setdefault((row["metric"], row["target"]), {})[row["codec"]] = row["scanned_fraction"]
    assert len(figures) == 6
    open_share = 600 % 128 / 600
    for pair in figures.values():
        assert pair["frames"] <= pair["sketch"] <= pair["frames"] + open_share + 0.01


@pytest.mark.parametrize("name", CODECS)
def test_codec_bounds_hold(name):
    capture = tiny_capture()
    layer = capture.layers[0]
    question = ask(capture, layer)
    truth = question.q.double() @ layer.keys.double().mT
    from dataclasses import replace

    for metric in METRICS[type(CODECS[name])]:
        first, second = replace(CODECS[name], metric=metric).encode(layer.keys, question.fitting)
        upper = [plane.upper(question.q.double()) for plane in (first, second)]
        assert all((u >= truth).all() for u in upper)
        assert (upper[1] - truth).mean() < (upper[0] - truth).mean()


def test_cost_and_time(everything):
    for row in everything[0]:
        assert row["build_ms"] > 0 and row["query_us"] > 0
        bounds = row["work_fraction"] - row["scanned_fraction"]
        corners = 2 if row.get("enclosure") == "box" else 1
        assert bounds == pytest.approx(corners / row["group_len"] if row["index"] != "sketch" else 1)


def test_queries_see_no_later_keys():
    capture = tiny_capture()
    question = ask(capture, capture.layers[0])
    positions = capture.query_positions[capture.measured()]
    allowed = torch.isfinite(question.scores)
    assert (allowed.sum(-1) == positions.repeat(3) + 1).all()


def test_what_makes_no_sense_is_left_out_or_refused(capture_file):
    names = [
        m.fields() for m in methods(Config(capture=capture_file, subspaces=(1,), codec=("key4",), metric=("frame",)))
    ]
    assert [(m["index"], m["rule"]) for m in names] == [("ball", "sum"), ("box", "sum")]
    with pytest.raises(PolicyError, match="codec='zip' is unknown"):
        Config(capture=capture_file, codec=("zip",))
    with pytest.raises(PolicyError, match=r"target 1\.5"):
        Config(capture=capture_file, targets=(1.5,))
    with pytest.raises(PolicyError, match="makes sense"):
        run(Config(capture=capture_file, index=("sketch",), codec=("sketch",), metric=("full",)))
    with pytest.raises(InputFileError, match="no such file"):
        run(Config(capture=capture_file.parent / "other"))
