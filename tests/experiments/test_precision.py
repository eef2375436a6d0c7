"""The precision experiment judges every policy against float64, and charges it what it reads."""

import pytest
import torch

from experiments.captures import tiny_capture
from louver import FlatIndex, attend
from louver.errors import PolicyError
from louver.experiments.baselines import Fp8, Kivi4, OracleDrop
from louver.experiments.precision import Config, measure_layer, read, run
from louver.experiments.truth import attention, sketch_of

ALL = ("exact:0.01+unread:0", "exact:1", "budget:0.1", "dense", "drop:0.1", "drop:1", "fp8", "kivi4")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("captures") / "tiny.safetensors"
    tiny_capture().save(path)
    found, more = run(Config(capture=path, policies=ALL))
    assert len(more["rows_per_layer"]) == 2 * len(found)
    return {row["policy"]: row for row in found}


def test_guarantees_and_violations(rows):
    assert [rows[p]["guarantee"] for p in ALL[:4]] == ["certified", "certified", "exact", "exact"]
    assert {rows[p]["guarantee"] for p in ALL[4:]} == {"none"}
    assert all(rows[p]["num_bound_violations"] == 0 for p in ALL[:4])
    assert all(rows[p]["output_error_bound"] is None for p in ALL[4:])


def test_errors_are_those_of_the_method(rows):
    assert rows["exact:1"]["output_error"] < 1e-5 and rows["dense"]["output_error"] < 1e-5
    assert rows["drop:1"]["output_error"] < 1e-9
    assert rows["exact:0.01+unread:0"]["output_error"] < rows["fp8"]["output_error"]
    assert (
        0.01 < rows["kivi4"]["output_error"] < rows["fp8"]["output_error"] < 0.5
    )  # offsets cost one scale per tensor dear


def test_bytes(rows):
    assert rows["dense"]["bytes_fraction"] == pytest.approx(1)
    assert rows["fp8"]["bytes_fraction"] == 0.5 and rows["kivi4"]["bytes_fraction"] == 0.3125
    assert 0.155 + 0.1 <= rows["drop:0.1"]["bytes_fraction"] <= 0.155 + 0.3
    assert rows["drop:1"]["bytes_fraction"] == pytest.approx(1.155)


def test_a_prefix_is_the_index_built_at_that_length():
    """One index over all keys, looked at from an earlier position, answers as one that never saw the rest."""
    capture = tiny_capture()
    layer = capture.layers[0]
    whole = sketch_of(capture, layer, "reference")
    for kv_len in (1, 127, 128, 300, 600):
        earlier = whole.prefix(kv_len)
        q = layer.queries[None, :, 40]
        tau = torch.full((1, 6), 30.0)
        flat = FlatIndex.build(layer.keys[None, :, :kv_len])
        assert torch.equal(earlier.search(q, tau).mask(kv_len), flat.search(q, tau).mask(kv_len))
        result = attend(q, earlier, policy="exact:0.05")
        assert int(result.stats.num_keys[0, 0]) == kv_len
        truth = attention(q[0], layer.keys[:, :kv_len].double(), layer.values[:, :kv_len].double(), 32**-0.5)[1]
        off = (result.out[0].double() - truth).norm(dim=-1)
        assert (off <= (result.certificate + result.arithmetic_bound)[0]).all()
    assert whole.sketch is not None and int(whole.sketch.num_blocks) == 4


def test_baselines_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0, 448.0]]], dtype=torch.float64).expand(1, 40, 4)
    keys, values = Fp8().coded(x, x / 448)
    assert torch.equal(keys, x) and torch.allclose(values, x / 448)
    keys, values = Kivi4().coded(x.clone(), x)
    assert (keys - x).abs().max() < 1e-6
    assert (values[..., 1:3] - x[..., 1:3]).abs().max() <= 447 / 15 / 2
    assert torch.equal(keys[:, 32:], x[:, 32:])
    scores = torch.tensor([[3.0, 1.0, 2.0, -torch.inf]]).double()
    assert OracleDrop(fraction=0.5).kept(scores).tolist() == [[True, False, True, False]]
    assert OracleDrop(fraction=0.5).output(scores, torch.eye(4).double()[None], 1.0)[0, 0, 1] == 0


def test_the_oracle_keeps_what_matters():
    capture = tiny_capture()
    drops = [OracleDrop(fraction=f) for f in (0.01, 0.1, 0.5)]
    errors = [f.error.mean() for _, f in measure_layer(capture, capture.layers[0], list(drops), "reference")]
    assert errors == sorted(errors, reverse=True)


def test_specs():
    assert read("drop:0.1").spec == "drop:0.1" and read("fp8").spec == "fp8" and read("exact:0.01").spec == "exact:0.01"
    for bad in ("drop:x", "fp9", "exact:2"):
        with pytest.raises(PolicyError):
            read(bad)
