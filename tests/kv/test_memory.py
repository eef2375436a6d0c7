"""Large buffers ask for huge pages, and are ordinary tensors otherwise."""

import sys
from pathlib import Path

import pytest
import torch

from louver.kv import DeviceStore
from louver.memory import LEAST_BYTES, empty


def advised(x: torch.Tensor) -> bool:
    """Whether the mapping that holds the middle of x asks for huge pages."""
    middle, inside = x.data_ptr() + x.numel() * x.element_size() // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(number, 16) for number in head.split("-"))
            inside = begin <= middle < end
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says which pages a mapping has")
def test_only_large_buffers_ask_for_huge_pages():
    large = empty((2 * LEAST_BYTES,), torch.uint8, torch.device("cpu"))
    assert large.shape == (2 * LEAST_BYTES,) and large.dtype == torch.uint8
    assert advised(large.fill_(1))
    # A control beyond what malloc takes from memory that was freed (32 MiB at most), and that may have been advised.
    assert not advised(torch.ones(8 * LEAST_BYTES, dtype=torch.uint8))
    tokens = LEAST_BYTES // (2 * 64 * 2)
    store = DeviceStore()
    store.append(
        torch.zeros(1, 2, tokens, 64, dtype=torch.bfloat16), torch.zeros(1, 2, tokens, 64, dtype=torch.bfloat16)
    )
    assert advised(store.keys)
