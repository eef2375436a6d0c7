"""All experiments in a row leave rows, and say the commands that make them."""

from pathlib import Path

import pytest

from experiments.words import Words
from integrations import tiny_models
from louver.errors import InputFileError
from louver.experiments.catalog import experiments
from louver.experiments.rows import read_rows
from louver.experiments.suite import Config, command_line, run, settings_of


def test_rows_and_commands(tmp_path):
    said = []
    config = Config(out=tmp_path, only=("precision", "geometry"))
    paths, failed = run(config, say=said.append, loaded=(tiny_models.llama(max_position_embeddings=8192), Words()))
    assert [path.name for path in paths] == ["geometry.json", "precision.json"] and not failed
    assert (tmp_path / "capture.safetensors").exists()
    for path in paths:
        document = read_rows(path)
        assert (
            document["rows"]
            and document["machine"]["command"]
            == f"louver experiment {path.stem} --capture {tmp_path}/capture.safetensors"
        )
        assert document["machine"]["command"] in said


def test_an_experiment_that_cannot_run_does_not_stop_the_others(tmp_path):
    model = tiny_models.llama(max_position_embeddings=8192)

    class ShortText(Words):
        def __call__(self, text, **options):
            return super().__call__(text[:300], **options)

    loaded = (model, ShortText())
    paths, failed = run(Config(out=tmp_path, only=("geometry", "growth")), loaded=loaded)
    assert [path.name for path in paths] == ["geometry.json"]
    assert "the capture holds" in failed["growth"]


def test_settings():
    recall = experiments()["recall"]
    quick = settings_of(recall, Config(out=Path("x"), model="m"), Path("c"))
    assert quick == {**recall.quick, "capture": Path("c")}
    full = settings_of(experiments()["coverage"], Config(out=Path("x"), model="m", full=True), Path("c"))
    assert full == {"model": "m"}
    assert command_line(recall, {"k": (5, 10), "stride": 3}) == "louver experiment recall --k 5,10 --stride 3"
    with pytest.raises(InputFileError, match="no experiment 'magic'"):
        Config(out=Path("x"), only=("magic",))
