"""What every LayerAttention over one store of its own has in common: taking in tokens, and saying how many there are."""

from torch import Tensor

from louver.kv.device import DeviceStore
from louver.shapes import Keys, Values


class OnStore:
    """Holds a layer's exact keys and values in a DeviceStore.

    Args:
        reserve_tokens: allocate this many tokens at once (speed only, never results).
    """

    def __init__(self, *, reserve_tokens: int = 0) -> None:
        self.store = DeviceStore(reserve_tokens=reserve_tokens)
        self.record = False

    @property
    def kv_len(self) -> int:
        """Tokens held, padding included."""
        return len(self.store)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Keys, Values]:
        """Add tokens [batch, num_kv_heads, new_len, head_dim]; return all keys and values held, as views."""
        self.store.append(keys, values)
        held = self.store.values
        assert held is not None
        return self.store.keys, held
