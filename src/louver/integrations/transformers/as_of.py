"""What an observer is shown of a call with several new tokens: each of them as a decode step of its own."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from louver.kv.device import DeviceStore
from louver.protocols import AttendResult, LayerAttention


class AsOf:
    """A LayerAttention as one of the last tokens sees it, to be read only: ``store`` and ``kv_len`` end with that token."""

    def __init__(self, attention: LayerAttention, kv_len: int) -> None:
        self.attention, self.kv_len = attention, kv_len

    @property
    def store(self) -> DeviceStore:
        """The tokens up to this one."""
        whole: Any = self.attention.store  # pyright: ignore[reportAttributeAccessIssue] - of any layer that has one
        keys, values = (x[:, :, : self.kv_len] for x in (whole.keys, whole.values))
        return DeviceStore.wrap(
            keys, values, whole.kv_start.clamp(max=self.kv_len), whole.kv_len.clamp(max=self.kv_len)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.attention, name)


def steps(result: AttendResult, attention: LayerAttention, q_len: int) -> Iterator[tuple[AttendResult, Any]]:
    """(result, attention as of then) of each token of a result with rows batch * q_len."""
    for i in range(q_len):
        seen = AsOf(attention, attention.kv_len - (q_len - 1 - i))
        parts: dict[str, Any] = {f.name: getattr(result, f.name) for f in fields(result)}
        tensors = {name: x[i::q_len] for name, x in parts.items() if isinstance(x, Tensor)}
        if result.exact_mask is not None:
            tensors["exact_mask"] = tensors["exact_mask"][..., : seen.kv_len]
        counted = {name: getattr(result.stats, name) for name in ("table", "index_bytes")}
        stats = replace(result.stats, **{name: x if x is None else x[i::q_len] for name, x in counted.items()})
        yield AttendResult(**{**parts, **tensors, "stats": stats}), seen
