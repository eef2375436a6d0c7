"""The stores, by name."""

import os
from dataclasses import dataclass

from louver.errors import PolicyError
from louver.kv.device import DeviceStore
from louver.kv.disk import DiskStore
from louver.kv.host import HostStore

STORES = ("device", "host", "disk")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where a layer's exact keys and values live. Every field changes speed and memory, none changes a result.

    Raises:
        PolicyError: the store is unknown, or its path is missing or out of place.
    """

    store: str = "device"  # "device": where the model is. "host": RAM. "disk": memory-mapped files
    path: str | os.PathLike[str] | None = None  # disk only: the folder of the working files
    reserve_tokens: int = 0  # allocate this many tokens at once

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise PolicyError(f"store={self.store!r} is unknown; wanted one of {', '.join(STORES)}")
        if self.store == "disk" and self.path is None:
            raise PolicyError("store='disk' needs path=, the folder its working files are to live in")
        if self.store != "disk" and self.path is not None:
            raise PolicyError(f"path={str(self.path)!r} is for store='disk' only, but store={self.store!r}")

    def make(self) -> DeviceStore:
        """An empty store."""
        if self.store == "disk":
            assert self.path is not None
            return DiskStore(self.path, reserve_tokens=self.reserve_tokens)
        return (HostStore if self.store == "host" else DeviceStore)(reserve_tokens=self.reserve_tokens)
