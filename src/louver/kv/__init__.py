"""Where exact keys and values live: on the device, in the host's RAM, on disk; and the file a cache is kept in."""

from louver.kv.device import DeviceStore
from louver.kv.disk import DiskStore
from louver.kv.host import HostStore
from louver.kv.stores import STORES, StoreConfig

__all__ = ["STORES", "DeviceStore", "DiskStore", "HostStore", "StoreConfig"]
