"""DeviceStore holds what concatenation would hold, whatever is done to it."""

import copy
import itertools
import pickle

import pytest
import torch

from louver.errors import ShapeError
from louver.kv import DeviceStore
from louver.protocols import KVStore


def tokens(batch: int, new_len: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(batch, 2, new_len, 5).to(dtype)


def test_is_a_kv_store_from_the_start():
    store = DeviceStore()
    assert isinstance(store, KVStore)
    assert store.is_empty and store.keys.shape == (0, 0, 0, 0) and store.values is None
    assert store.kv_start.shape == store.kv_len.shape == (0,)
    store.append(tokens(1, 3), None)
    assert isinstance(store, KVStore)


@pytest.mark.parametrize("with_values", [True, False])
@pytest.mark.parametrize("reserve_tokens", [0, 7, 1000])
@pytest.mark.parametrize("lengths", [[1] * 200, [63, 1, 1, 64, 65], [0, 1], [500, 300]])
def test_holds_what_concatenation_holds(lengths, reserve_tokens, with_values):
    store, keys, values = DeviceStore(reserve_tokens=reserve_tokens), [], []
    for new_len in lengths:
        keys.append(tokens(3, new_len))
        values.append(tokens(3, new_len))
        store.append(keys[-1], values[-1] if with_values else None)
    assert torch.equal(store.keys, torch.cat(keys, 2))
    assert store.values is None if not with_values else torch.equal(store.values, torch.cat(values, 2))
    assert len(store) == sum(lengths)
    assert store.kv_len.tolist() == [sum(lengths)] * 3 and store.kv_len.dtype == torch.int32
    assert store.kv_start.tolist() == [0, 0, 0] and store.kv_start.dtype == torch.int32


def test_grows_by_a_quarter():
    store, capacities = DeviceStore(), []
    for _ in range(3000):
        store.append(tokens(1, 1), tokens(1, 1))
        capacities.append(store.capacity)
    grown = sorted(set(capacities))
    assert len(grown) < 20
    assert all(b <= 1.25 * a + 64 for a, b in itertools.pairwise(grown))


def test_reserved_tokens_are_one_allocation():
    store = DeviceStore(reserve_tokens=100)
    store.append(tokens(1, 10), tokens(1, 10))
    where = store.keys.data_ptr()
    store.append(tokens(1, 90), tokens(1, 90))
    assert store.keys.data_ptr() == where
    assert store.memory_bytes() == 2 * 2 * 100 * 5 * 4


def test_reading_is_a_view():
    store = DeviceStore()
    store.append(tokens(1, 10), tokens(1, 10))
    assert store.keys.data_ptr() == store.keys.data_ptr()
    assert store.keys.stride(2) == 5


def test_truncate_and_append_again():
    store, first, second = DeviceStore(), tokens(2, 10), tokens(2, 4)
    store.append(first, first)
    store.truncate(12)
    assert len(store) == 10
    store.truncate(6)
    store.append(second, second)
    assert torch.equal(store.keys, torch.cat([first[:, :, :6], second], 2))
    assert store.kv_len.tolist() == [10, 10]
    store.truncate(0)
    assert store.keys.shape == (2, 2, 0, 5)


def test_select_batch():
    store, keys, values = DeviceStore(), tokens(3, 70), tokens(3, 70)
    store.append(keys, values)
    store.kv_start = torch.tensor([0, 5, 9])
    store.select_batch(torch.tensor([2, 0, 0, 1]))
    assert torch.equal(store.keys, keys[[2, 0, 0, 1]]) and torch.equal(store.values, values[[2, 0, 0, 1]])
    assert store.kv_start.tolist() == [9, 0, 0, 5]
    more = tokens(4, 1)
    store.append(more, more)
    assert torch.equal(store.keys[:, :, -1:], more)
    DeviceStore().select_batch(torch.tensor([0]))  # nothing held, nothing to do


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keeps_the_dtype(dtype):
    store = DeviceStore()
    store.append(tokens(1, 3, dtype), tokens(1, 3, dtype))
    assert store.keys.dtype == dtype


def test_wraps_without_a_copy():
    keys = tokens(2, 8)
    store = DeviceStore.wrap(keys, kv_start=torch.tensor([1, 0]), kv_len=torch.tensor([8, 5]))
    assert store.keys.data_ptr() == keys.data_ptr()
    assert store.kv_start.tolist() == [1, 0] and store.kv_len.tolist() == [8, 5]
    store.truncate(6)
    assert store.kv_len.tolist() == [6, 5]
    with pytest.raises(ShapeError, match="different lengths"):
        store.append(tokens(2, 1), None)


def test_appending_to_wrapped_tensors_leaves_them_alone():
    keys = tokens(2, 8)
    before = keys.clone()
    store = DeviceStore.wrap(keys)
    store.truncate(4)
    store.append(tokens(2, 2), None)
    assert torch.equal(keys, before)


def test_clear():
    store = DeviceStore()
    store.append(tokens(1, 3), None)
    store.clear()
    assert store.is_empty and len(store) == 0 and store.memory_bytes() == 0
    store.append(tokens(4, 2), tokens(4, 2))
    assert store.keys.shape == (4, 2, 2, 5)


def test_copies_are_independent():
    store = DeviceStore()
    store.append(tokens(1, 3), tokens(1, 3))
    twin = copy.deepcopy(store)
    twin.append(tokens(1, 1), tokens(1, 1))
    twin.keys.zero_()
    assert len(store) == 3 and store.keys.abs().sum() > 0


def test_a_pickled_store_shows_what_is_written_to_it():
    store = DeviceStore()
    store.append(*torch.randn(2, 1, 2, 9, 8))
    assert store.keys.shape[2] == store.values.shape[2] == 9 and not store.has_padding
    twin = pickle.loads(pickle.dumps(store))
    twin.truncate(3)
    keys, values = torch.randn(2, 1, 2, 6, 8)
    twin.append(keys, values)
    assert torch.equal(twin.keys[:, :, 3:], keys) and torch.equal(twin.values[:, :, 3:], values)
    assert torch.equal(twin.keys[:, :, :3], store.keys[:, :, :3])


def test_made_in_inference_mode_stays_writable():
    store = DeviceStore()
    with torch.inference_mode():
        store.append(tokens(2, 3), tokens(2, 3))
        store.select_batch(torch.tensor([1, 0]))
    with torch.no_grad():
        store.append(tokens(2, 100), tokens(2, 100))
        store.append(tokens(2, 1), tokens(2, 1))
    assert len(store) == 104


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (tokens(2, 1), None, "values for all"),
        (tokens(3, 1), tokens(3, 1), "cannot append"),
        (tokens(2, 1, torch.float16), tokens(2, 1, torch.float16), "cannot append"),
        (tokens(2, 1), tokens(2, 2), "must agree"),
        (tokens(2, 1)[0], tokens(2, 1)[0], "wanted"),
        (tokens(2, 1).long(), tokens(2, 1).long(), "dtype"),
    ],
)
def test_refuses_what_does_not_fit(keys, values, message):
    store = DeviceStore()
    store.append(tokens(2, 3), tokens(2, 3))
    with pytest.raises(ShapeError, match=message):
        store.append(keys, values)
    assert len(store) == 3


def test_other_errors():
    with pytest.raises(ShapeError, match="reserve_tokens"):
        DeviceStore(reserve_tokens=-1)
    store = DeviceStore()
    store.append(tokens(2, 3), None)
    with pytest.raises(ShapeError, match="truncate"):
        store.truncate(-1)
    with pytest.raises(ShapeError, match="batch"):
        store.kv_start = torch.tensor([1, 2, 3])


def test_a_view_taken_without_gradients_does_not_take_them_from_later_ones():
    keys = tokens(1, 9).requires_grad_()
    store = DeviceStore.wrap(keys)
    with torch.no_grad():
        assert store.keys.shape == keys.shape
    store.keys.sum().backward()
    assert keys.grad is not None and (keys.grad == 1).all()
