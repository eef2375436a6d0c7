"""What every LayerAttention over one store of its own has in common: taking in tokens, and saying how many there are."""

import os

from torch import Tensor

from louver.kv.stores import StoreConfig
from louver.shapes import Keys, Values


class OnStore:
    """Holds a layer's exact keys and values in a store of its own.

    Args:
        store: "device" (where the model is), "host" (RAM) or "disk" (memory-mapped files). Speed and memory only.
        path: of a store on disk: the folder of its working files.
        reserve_tokens: allocate this many tokens at once. Speed only.
    """

    def __init__(
        self, *, store: str = "device", path: str | os.PathLike[str] | None = None, reserve_tokens: int = 0
    ) -> None:
        self.store_config = StoreConfig(store=store, path=path, reserve_tokens=reserve_tokens)
        self.store = self.store_config.make()
        self.record = False

    @property
    def kv_len(self) -> int:
        """Tokens held, padding included."""
        return len(self.store)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Keys, Values]:
        """Add tokens [batch, num_kv_heads, new_len, head_dim]; return all keys and values held, as views."""
        self.store.append(keys, values)
        return self.held

    @property
    def held(self) -> tuple[Keys, Values]:
        """All keys and values held, as views."""
        values = self.store.values
        assert values is not None
        return self.store.keys, values

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, room to grow included: ``keys_values`` and ``index``, and the same bytes by where they are."""
        held = self.store.memory_bytes()
        return {"keys_values": held, "index": 0, "gpu": 0, "host": 0, "disk": 0} | {self.store.place: held}
