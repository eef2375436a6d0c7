"""A file of tensors is read back exactly, or refused with a reason."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from louver.errors import CacheFileError
from louver.kv import tensor_file
from louver.kv.tensor_file import read_tensors, write_tensors

FORM = "louver-test-1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.int32, torch.int64]


@pytest.fixture
def tensors():
    made = {str(dtype): torch.randint(0, 2, (3, 2, 5), dtype=torch.int64).to(dtype) for dtype in DTYPES}
    made["strided"] = torch.randn(2, 3, 40, 4)[:, :, 3:20]
    made["transposed"] = torch.randn(4, 9).T
    return made | {"empty": torch.empty(2, 0, 4), "scalar": torch.tensor(3)}


@pytest.fixture
def saved(tmp_path, tensors):
    path = tmp_path / "cache.safetensors"
    write_tensors(path, tensors, {"note": "täglich 0 00000000"}, FORM)
    return path


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("piece_bytes", [1, 64, 32 << 20])
def test_reads_what_was_written(tmp_path, tensors, monkeypatch, piece_bytes):
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", piece_bytes)
    write_tensors(tmp_path / "x", tensors, {"note": "so"}, FORM)
    found, facts = read_tensors(tmp_path / "x", FORM)
    assert same(found, tensors) and facts == {"note": "so"}
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_is_a_safetensors_file_like_any_other(saved, tensors):
    assert same(load_file(saved), tensors)


def test_nothing_there(tmp_path):
    with pytest.raises(CacheFileError, match="no such file"):
        read_tensors(tmp_path / "nothing", FORM)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.999])
def test_truncated(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CacheFileError, match="truncated"):
        read_tensors(saved, FORM)


def test_any_flipped_byte_is_noticed(saved):
    data = saved.read_bytes()
    for at in {*range(0, len(data), 37), *range(8, 200, 5), len(data) - 1}:
        saved.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CacheFileError):
            read_tensors(saved, FORM)


def test_the_corrupt_tensor_is_named(saved):
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    at = 8 + length + json.loads(data[8 : 8 + length])["strided"]["data_offsets"][0]
    saved.write_bytes(data[:at] + bytes([data[at] ^ 128]) + data[at + 1 :])
    with pytest.raises(CacheFileError, match="checksum of strided"):
        read_tensors(saved, FORM)


def test_foreign_files(tmp_path):
    foreign = tmp_path / "weights.safetensors"
    save_file({"w": torch.ones(3)}, foreign)
    with pytest.raises(CacheFileError, match="not one with the form"):
        read_tensors(foreign, FORM)
    save_file({"w": torch.ones(3)}, foreign, metadata={"format": FORM})
    with pytest.raises(CacheFileError, match="corrupt"):
        read_tensors(foreign, FORM)
    foreign.write_text("Dear diary")
    with pytest.raises(CacheFileError, match="no cache file"):
        read_tensors(foreign, FORM)


def test_another_version_is_said_to_be_one(tmp_path, tensors):
    write_tensors(tmp_path / "x", tensors, {}, "louver-test-2")
    with pytest.raises(CacheFileError, match="by another"):
        read_tensors(tmp_path / "x", FORM)


def test_a_dtype_the_format_lacks_leaves_the_old_file(saved, tensors):
    with pytest.raises(CacheFileError, match="complex64"):
        write_tensors(saved, {"z": torch.ones(2, dtype=torch.complex64)}, {}, FORM)
    assert same(read_tensors(saved, FORM)[0], tensors)
    assert list(saved.parent.iterdir()) == [saved]
