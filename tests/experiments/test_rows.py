"""Rows are written whole or not at all, and read back as they were."""

import json
import math

import pytest
import torch

from louver.errors import InputFileError
from louver.experiments.rows import machine, read_rows, write_bytes, write_rows


def test_rows_come_back_with_their_machine(tmp_path):
    path = tmp_path / "new" / "folder" / "rows.json"
    write_rows(path, [{"kv_len": 8, "recall": 1.0}], seed=7, command="louver demo", rows_per_layer=[{"layer": 0}])
    document = read_rows(path)
    assert document["rows"] == [{"kv_len": 8, "recall": 1.0}]
    assert document["rows_per_layer"] == [{"layer": 0}]
    assert document["machine"]["seed"] == 7
    assert document["machine"]["command"] == "louver demo"


def test_machine_names_what_is_missing():
    facts = machine(seed=None)
    assert facts["device"]
    assert set(facts["versions"]) >= {"python", "torch", "transformers", "triton"}


def test_rows_of_the_processor_name_it_where_a_gpu_is_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr("louver.experiments.rows.torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("louver.experiments.rows.torch.cuda.get_device_name", lambda index: "a GPU")
    path = tmp_path / "rows.json"
    write_rows(path, [], seed=None)
    assert read_rows(path)["machine"]["device"] == "a GPU"
    write_rows(path, [], seed=None, device="cpu")
    assert "CPUs" in read_rows(path)["machine"]["device"]


def test_infinity_and_tensors_become_plain_json(tmp_path):
    path = tmp_path / "rows.json"
    write_rows(path, [{"certificate": math.inf, "nan": math.nan, "counts": torch.tensor([1, 2])}], seed=None)
    text = path.read_text()
    assert "Infinity" not in text and "NaN" not in text
    assert json.loads(text)["rows"] == [{"certificate": None, "nan": None, "counts": [1, 2]}]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    write_bytes(path, b"old")

    def full_disk(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr("louver.experiments.rows.os.replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.json"]


def test_an_unserialisable_row_writes_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_rows(tmp_path / "rows.json", [{"what": object()}], seed=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"rows": []}', "\x00\xff"])
def test_reading_something_else_is_one_clear_error(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(InputFileError, match=r"rows\.json: not a"):
        read_rows(path)


def test_reading_a_missing_file_is_one_clear_error(tmp_path):
    with pytest.raises(InputFileError, match="no such file"):
        read_rows(tmp_path / "nothing.json")
