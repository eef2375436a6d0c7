"""Stores elsewhere hold what a DeviceStore holds, and are refused where they cannot work."""

import copy
import errno
import os
import re
from pathlib import Path

import pytest
import torch

from helpers import build_case
from louver import LouverAttention
from louver.attention import DenseAttention
from louver.attention.room import check_room
from louver.errors import OutOfRoomError, PolicyError, ShapeError
from louver.kv import DeviceStore, DiskStore, HostStore, StoreConfig, disk
from louver.protocols import KVStore
from louver.sketch import SketchConfig
from louver.sketch.layout import PER_BLOCK
from strategies import generator

CONFIG = SketchConfig(frame_len=16)


@pytest.fixture(params=["host", "disk"])
def options(request, tmp_path):
    return {"store": request.param} | ({"path": tmp_path} if request.param == "disk" else {})


def tokens(batch, new_len, dtype=torch.float32):
    return torch.randn(batch, 2, new_len, 6).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1] * 70, [63, 1, 1, 64], [0, 1], [500, 3]])
def test_holds_what_concatenation_holds(options, lengths, dtype):
    store, keys = StoreConfig(**options).make(), []
    assert isinstance(store, KVStore) and store.is_empty and store.place == options["store"]
    for new_len in lengths:
        keys.append(tokens(3, new_len, dtype))
        store.append(keys[-1], -keys[-1])
        store.settle()
    assert torch.equal(store.keys, torch.cat(keys, 2)) and torch.equal(store.values, -torch.cat(keys, 2))
    store.truncate(1)
    store.select_batch(torch.tensor([2, 0]))
    store.append(keys[0][:2], keys[0][:2])
    assert torch.equal(store.keys, torch.cat([torch.cat(keys, 2)[[2, 0], :, :1], keys[0][:2]], 2))
    assert store.memory_bytes() > 0
    store.clear()
    assert store.is_empty and store.memory_bytes() == 0


@pytest.mark.parametrize("store", [DeviceStore, HostStore])
def test_a_tensor_that_torch_negates_as_it_is_read_is_kept_as_it_reads(store, monkeypatch):
    """What ``z.conj().imag`` is: a prompt that is kept as it came is read by kernels, which read memory."""
    keys, values = tokens(1, 30), tokens(1, 30)
    given, write = [], DeviceStore._write

    def watched(self, keys, values, end):
        given.extend((keys, values))
        write(self, keys, values, end)

    monkeypatch.setattr(store, "_write", watched)
    held = store()
    held.append(torch._neg_view(-keys), torch._neg_view(-values))
    assert [x.is_neg() for x in given] == [False, False]
    assert torch.equal(held.keys, keys) and torch.equal(held.values, values)
    held.append(torch._neg_view(-keys), torch._neg_view(-values))
    assert torch.equal(held.keys, torch.cat([keys, keys], 2)) and len(given) == 4


def test_copies_are_independent(options):
    store, keys = StoreConfig(**options).make(), tokens(1, 30)
    store.append(keys, keys)
    twin = copy.deepcopy(store)
    assert type(twin) is type(store)
    twin.append(tokens(1, 1), tokens(1, 1))
    twin.keys.zero_()
    assert len(store) == 30 and torch.equal(store.keys, keys)


@pytest.mark.parametrize("spec", ["exact:0.05", "topk:4+sinks:2+recent:3", "dense"])
def test_a_layer_gives_the_same_output_wherever_its_tokens_are(options, spec):
    case = build_case(1, kv_len=90)
    layers = [LouverAttention(spec, config=CONFIG, **more) for more in ({}, options)]
    for layer in layers:
        layer.append(case.keys[:, :, :70], case.values[:, :, :70])
        layer.observe(case.q[:, :, None].expand(-1, -1, 5, -1), None, 0.125)
        for at in range(70, 90):
            layer.append(case.keys[:, :, at : at + 1], case.values[:, :, at : at + 1])
            layer.attend(case.q, 0.125)
    one, other = (layer.attend(case.q, 0.125) for layer in layers)
    assert torch.equal(one.out, other.out) and torch.equal(one.certificate, other.certificate)


def test_memory_says_where(options):
    for layer in (LouverAttention(config=CONFIG, **options), DenseAttention(**options)):
        layer.append(torch.randn(1, 2, 64, 64), torch.randn(1, 2, 64, 64))
        layer.observe(torch.randn(1, 2, 4, 64), None, 0.125)
        memory = layer.memory_bytes()
        assert memory["gpu"] == 0 and memory["host"] + memory["disk"] == memory["keys_values"] + memory["index"]
        assert memory[options["store"]] >= memory["keys_values"] > 0


def test_a_retrieval_layer_codes_no_values():
    layers = [LouverAttention(spec) for spec in ("budget:0.05", "exact:0.05")]
    for layer in layers:
        layer.append(torch.randn(1, 2, 256, 64), torch.randn(1, 2, 256, 64))
        layer.observe(torch.randn(1, 4, 8, 64), None, 0.125)
    few, many = (layer.memory_bytes()["index"] for layer in layers)
    assert few < 0.53 * many


def test_working_files_are_nameless(tmp_path):
    store = DiskStore(tmp_path / "made" / "as needed")
    store.append(tokens(1, 40), tokens(1, 40))
    assert list((tmp_path / "made" / "as needed").iterdir()) == []
    if os.path.exists("/proc/self/maps"):
        assert str(tmp_path) in Path("/proc/self/maps").read_text()


def test_a_full_disk_is_an_error_and_not_the_end(tmp_path, monkeypatch):
    def full(handle, num_bytes):
        raise OSError(errno.ENOSPC, "No space left on device")

    store = DiskStore(tmp_path)
    monkeypatch.setattr(disk, "_reserve", full)
    with pytest.raises(OutOfRoomError, match="No space left"):
        store.append(tokens(1, 4), tokens(1, 4))


def test_refuses_what_cannot_work(tmp_path):
    with pytest.raises(PolicyError, match="device, host, disk"):
        StoreConfig(store="cloud")
    with pytest.raises(PolicyError, match="needs path"):
        LouverAttention(store="disk")
    with pytest.raises(PolicyError, match="for store='disk' only"):
        DenseAttention(store="host", path=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutOfRoomError, match="cannot hold working files"):
        DiskStore(tmp_path / "file")
    with pytest.raises(ShapeError, match="store='host'"):
        DiskStore(tmp_path).append(*torch.empty(2, 1, 1, 4, 8, device="meta").unbind())
    with pytest.raises(ShapeError, match="reserve_tokens"):
        HostStore(reserve_tokens=-1)


def test_room_on_a_gpu_is_counted_before_it_is_taken():
    layer = LouverAttention("exact:0.01")
    keys = torch.randn(1, 2, 1280, 64)
    layer.append(keys, keys)
    layer.observe(torch.randn(1, 4, 8, 64), None, 0.125)
    config = layer.index.config
    held = layer.memory_bytes()["index"] - 4 * (1 + 2 * 64 * 2)  # less block counts, metric weights, mean values
    check_room(keys, 1280, config, False, held)
    with pytest.raises(OutOfRoomError, match=r"1,280 tokens would take .* 1,279 tokens as it is; .* retrieval policy"):
        check_room(keys, 1280, config, False, held - 1)
    with pytest.raises(OutOfRoomError, match="store='host'"):
        check_room(keys, 1280, config, True, held)
    check_room(keys, 1280, None, False, 0)
    check_room(keys, 100, config, False, 0)  # no block is closed, nothing is sketched


@pytest.mark.parametrize("store", ["device", "host"])
@pytest.mark.parametrize("reserve_tokens", [0, 1000, 5000])
def test_room_is_counted_as_it_is_taken(store, reserve_tokens, monkeypatch):
    """With the room that was reserved, and what buffers grow by; on a GPU, of which this CPU takes the part."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(HostStore, "_write", DeviceStore._write)
    made = {"config": CONFIG, "store": store, "reserve_tokens": reserve_tokens}

    def decode(max_gpu_bytes):
        """Bytes on the GPU after each append, until one is refused; why."""
        layer, held = LouverAttention("exact:0.01", max_gpu_bytes=max_gpu_bytes, **made), []
        for new_len in [700, *[16] * 40]:
            keys = torch.randn(1, 2, new_len, 6, generator=generator(new_len))
            try:
                layer.append(keys, keys)
            except OutOfRoomError as error:
                return held, str(error)
            layer.observe(torch.randn(1, 2, 4, 6, generator=generator(1)), None, 0.4)
            sketch = sum(x.numel() * x.element_size() for n, x in layer.index.sketch.tensors() if n in PER_BLOCK)
            held.append(sketch + (layer.store.memory_bytes() if store == "device" else 0))
        return held, None

    free, refused = decode(1 << 40)
    assert refused is None and sorted(free) == free
    for limit in sorted({*free, *(x - 1 for x in free)}):
        held, refused = decode(limit)
        assert held == [x for x in free if x <= limit], "refused when it would not fit, and not before"
        assert (refused is None) == (limit >= free[-1])


def test_the_advice_about_room_holds():
    """As many tokens as it names do fit when they are reserved, and half as many again would not."""
    keys, config, limit = torch.randn(1, 2, 4, 64), SketchConfig(frame_len=96), 5_000_000
    keys_only = SketchConfig(frame_len=96, values=False)
    with pytest.raises(OutOfRoomError, match=r"4,000 tokens, with room for 1,000,000, would take") as caught:
        check_room(keys, 4000, config, True, limit, capacity=1_000_000, num_blocks=1_000_000 // 96)
    fits = [
        int(x.replace(",", "")) for x in re.findall(r"([\d,]+)(?: tokens)? (?:as it is|with store)", str(caught.value))
    ]
    assert "reserve_tokens" in str(caught.value) and len(fits) == 3
    for tokens, (how, on_gpu) in zip(fits, [(config, True), (config, False), (keys_only, False)], strict=True):
        check_room(keys, 10, how, on_gpu, limit, capacity=tokens, num_blocks=tokens // 96)
        with pytest.raises(OutOfRoomError):
            check_room(keys, 10, how, on_gpu, limit, capacity=tokens * 3 // 2, num_blocks=tokens * 3 // 2 // 96)
