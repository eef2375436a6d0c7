"""Where exact keys and values live."""

from louver.kv.device import DeviceStore

__all__ = ["DeviceStore"]
