"""A head takes what is worth its bytes; what it is fitted to is what ``attend`` does."""

from pathlib import Path

import pytest
import torch

from experiments.captures import tiny_capture
from louver.errors import PolicyError
from louver.experiments.fitting import Curves, Fitted, curves
from louver.experiments.precision import Config, run

TABLE = Curves(
    policies=("exact:0.001", "exact:0.1", "exact:1"),
    error=torch.tensor([[0.5, 0.02], [0.05, 0.01], [0.0, 0.0]]),
    bytes_fraction=torch.tensor([[0.15, 0.15], [0.3, 0.3], [1.1, 1.1]]),
)


def test_each_head_takes_what_it_is_worth():
    assert TABLE.at(1.0) == "exact:0.1/exact:0.001"  # the first gains 0.45 for 0.15 of the bytes, the second 0.01
    assert TABLE.at(1.0, by_head=False) == "exact:0.1"
    assert TABLE.at(10.0) == "exact:0.001" and TABLE.at(1e-4) == "exact:1"


@pytest.mark.parametrize("project", [False, True])
def test_the_curves_are_those_of_the_layer(project):
    capture = tiny_capture()
    layer = capture.layers[0]
    weight = torch.eye(6 * 32) if project else None  # a projection that keeps every channel apart
    found = curves(capture, layer, "reference", ("exact:0.01+unread:0.6", "exact:0.1", "exact:1"), 4, weight)
    assert found.error.shape == found.bytes_fraction.shape == (3, 2)
    assert (found.error.diff(dim=0) < 0).all() and (found.bytes_fraction.diff(dim=0) > 0).all()
    assert (found.error[2] < 1e-5).all()
    if project:  # a head's error over the norm of all six outputs is less than over its own
        assert (found.error < curves(capture, layer, "reference", found.policies, 4).error).all()


def test_heads_that_choose_beat_layers_that_choose(tmp_path, monkeypatch):
    """On the queries that were fitted the sum of error and price is lower; a row says what every layer was served with."""
    path = tmp_path / "tiny.safetensors"
    capture = tiny_capture()
    for layer in capture.layers.values():
        layer.queries[:3] *= 4  # sharp heads beside diffuse ones
    capture.save(path)
    monkeypatch.setattr("louver.experiments.fitting.GRID", ("exact:0.002+unread:0.6", "exact:0.02", "exact:0.2"))
    rows, more = run(Config(capture=path, policies=("fit:0.1", "fit-layers:0.1"), backend="reference"))
    assert [row["policy"] for row in rows] == ["fit:0.1", "fit-layers:0.1"]
    assert all(row["num_bound_violations"] == 0 and row["guarantee"] == "certified" for row in rows)
    cost = [row["output_error"] + 0.1 * row["bytes_fraction"] for row in rows]
    assert cost[0] < cost[1]
    served = [row["served"] for row in more["rows_per_layer"]]
    assert any("/" in spec for spec in served[:2]) and not any("/" in spec for spec in served[2:])


def test_a_price_that_is_none():
    with pytest.raises(PolicyError, match="no price"):
        Fitted(price=0.0)
    with pytest.raises(PolicyError, match="usage: fit:PRICE"):
        assert Config(capture=Path("none"), policies=("fit:cheap",)).chosen
