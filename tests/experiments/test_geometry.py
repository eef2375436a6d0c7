"""The geometry experiment's figures, against cases worked out by hand."""

import pytest
import torch

from experiments.captures import tiny_capture
from louver.errors import InputFileError, PolicyError
from louver.experiments.catalog import experiments
from louver.experiments.geometry import Config, _distributions, _overlap, _sizes, run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("captures") / "tiny.safetensors"
    tiny_capture().save(path)
    return path


def test_rows(path):
    rows, more = run(Config(capture=path, k=5))
    assert [row["layer"] for row in rows] == [0, 3] and len(more["rows_per_head"]) == 4
    for row in rows:
        heads = [head for head in more["rows_per_head"] if head["layer"] == row["layer"]]
        assert row["norm_ratio"] == pytest.approx(sum(head["norm_ratio"] for head in heads) / 2)
        assert row["norm_ratio_max"] == max(head["norm_ratio"] for head in heads)
        assert 0 <= row["cosine_recall"] < 1 and row["hnsw_recall_queries"] > 0.5
        assert row["above_bar_p5"] <= row["above_bar_p50"] <= row["above_bar_p95"] <= 568
    norms = tiny_capture().layers[0].keys[:, :568].norm(dim=-1)
    assert rows[0]["norm_ratio"] == pytest.approx(float((norms.amax(1) / norms.amin(1)).mean()), rel=1e-5)
    assert "of the top 5" in experiments()["geometry"].finding(rows)


def test_two_clouds():
    torch.manual_seed(1)
    x = torch.randn(4000, 16) * torch.arange(1, 17)
    same = _distributions(x, x)
    assert same["mean_distance"] == 0 and same["covariance_overlap"] == pytest.approx(1)
    assert same["principal_angle"] < 1e-3 and same["mean_cosine"] == pytest.approx(1)
    turned = _distributions(x, x.flip(1) + 100)
    assert turned["principal_angle"] > 80 and turned["covariance_overlap"] < 0.5 and turned["mean_distance"] > 3


def test_overlap_and_sizes_by_hand():
    truth = torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    assert _overlap(truth, torch.tensor([[4.0, 0.0, 3.0, 0.0], [1.0, 2.0, 3.0, 4.0]]), 2) == 0.75
    fitting = torch.arange(100.0)[None].repeat(3, 1)
    sizes = _sizes(fitting, torch.stack([torch.full((100,), 98.0), torch.full((100,), 99.0), torch.arange(100.0)]))
    assert sizes["above_bar_p50"] == 1 and sizes["above_bar_p5"] < 1 and sizes["above_bar_p95"] > 50


def test_refusals(path):
    with pytest.raises(PolicyError, match="kind='oak'"):
        Config(capture=path, kinds=("oak",))
    with pytest.raises(InputFileError, match="k=0"):
        Config(capture=path, k=0)
