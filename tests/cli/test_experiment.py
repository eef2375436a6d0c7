"""The commands write their rows and pictures, and say what is wrong in one line."""

import pytest
from typer.testing import CliRunner

from experiments.captures import tiny_capture
from louver.cli import app
from louver.experiments.rows import read_rows

runner = CliRunner()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_capture().save(tmp_path / "x.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_pruning(folder):
    arguments = (
        "experiment pruning --capture x.safetensors --index ball,sketch --subspaces 8 --codec sketch --metric frame"
    )
    done = runner.invoke(app, [*arguments.split(), "--json", "rows.json", "--per-layer", "--targets", "20,0.1"])
    assert done.exit_code == 0, done.output
    document = read_rows(folder / "rows.json")
    assert [(r["index"], r["rule"]) for r in document["rows"][::2]] == [
        ("ball", "sum"), ("ball", "ta"), ("ball", "and"), ("ball", "oracle-and"), ("sketch", "sum"),
    ]  # fmt: skip
    assert {r["layer"] for r in document["rows_per_layer"]} == {0, 3}
    assert (folder / "louver-pruning.png").stat().st_size > 1000
    assert "k = 10%" in done.output and "Sound rules lost 0 keys" in done.output and "oracle-and" in done.output


def test_precision(folder):
    arguments = "experiment precision --capture x.safetensors --policies exact:0.01,fp8 --json rows.json --plot p.png"
    done = runner.invoke(app, arguments.split())
    assert done.exit_code == 0, done.output
    document = read_rows(folder / "rows.json")
    assert [r["policy"] for r in document["rows"]] == ["exact:0.01", "fp8"] and "rows_per_layer" not in document
    assert (folder / "p.png").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("pruning --capture nothing", "no such file"),
        ("pruning --capture x.safetensors --targets many", "--targets: 'many'"),
        ("pruning --capture x.safetensors --codec zip", "codec='zip' is unknown"),
        ("precision --capture x.safetensors --policies exact:7", "exact"),
        ("precision --capture x.safetensors --backend magic", "backend='magic'"),
    ],
)
def test_what_is_wrong_is_one_line(folder, arguments, complaint):
    done = runner.invoke(app, ["experiment", *arguments.split()])
    assert done.exit_code == 2
    assert complaint in done.output and done.output.strip().startswith("error: ")
    assert len(done.output.strip().splitlines()) == 1


def test_capture_names_a_layer_that_is_not_a_number(folder):
    done = runner.invoke(app, ["capture", "--layers", "0,x"])
    assert done.exit_code == 2 and "--layers: 'x'" in done.output
