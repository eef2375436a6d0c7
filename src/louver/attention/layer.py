"""LouverAttention: one layer's cache, its index and its policy, behind the LayerAttention seam."""

import os
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from louver.attention.dense import attend_everything
from louver.attention.on_store import OnStore
from louver.attention.replayed import ReplayedSteps
from louver.attention.room import check_room
from louver.attention.sparse import attend, attend_many
from louver.errors import PolicyError
from louver.index.ball import BallIndex
from louver.index.flat import FlatIndex
from louver.index.sketch import SketchIndex
from louver.kernels import resolve_backend
from louver.policies.base import Dense
from louver.policies.spec import DEFAULT_POLICY, parse
from louver.protocols import AttendResult, KeyIndex, Policy
from louver.shapes import Keys, PerRow, Query, Values, check_query
from louver.sketch.layout import SketchConfig

INDEXES = ("sketch", "flat", "ball")


class LouverAttention(OnStore):
    """Serves the decode steps of one layer from a sketch of its cache.

    Args:
        policy: what a step keeps; a specification or a policy. Changes results, within its certificate.
        index: "sketch", or "flat" or "ball" for retrieval policies without a sketch. Speed only.
        config: how the cache is sketched. Speed only.
        backend: which kernels; "auto" is the fastest the device has. Speed only.
        store: where exact keys and values live: "device" (where the model is), "host" (RAM; of a model on a GPU only the
            sketch stays there) or "disk" (memory-mapped files, for a model on a CPU). Speed and memory only.
        path: of a store on disk: the folder of its working files.
        reserve_tokens: allocate this many tokens at once. Speed only.
        max_gpu_bytes: raise an OutOfRoomError before this layer would hold more than that on the GPU.

    Raises:
        PolicyError: the policy or the index is unknown, or the policy needs a sketch and the index is another.
        BackendError: the backend is not there.
    """

    def __init__(
        self,
        policy: str | Policy = DEFAULT_POLICY,
        *,
        index: str = "sketch",
        config: SketchConfig | None = None,
        backend: str = "auto",
        store: str = "device",
        path: str | os.PathLike[str] | None = None,
        reserve_tokens: int = 0,
        max_gpu_bytes: int | None = None,
    ) -> None:
        super().__init__(store=store, path=path, reserve_tokens=reserve_tokens)
        self.policy = parse(policy)
        self.max_gpu_bytes = max_gpu_bytes
        if config is None:
            config = SketchConfig(values=not self.policy.drops)
        resolve_backend(backend)
        if index not in INDEXES:
            raise PolicyError(f"index={index!r} is unknown; wanted one of {', '.join(INDEXES)}")
        if index != "sketch" and not (self.policy.drops or isinstance(self.policy, Dense)):
            raise PolicyError(
                f"policy {self.policy.spec!r} drops nothing, so it needs the sketch's values, which index={index!r} has not; "
                "use a retrieval policy such as 'budget:0.1', or index='sketch'"
            )
        self._replayed = ReplayedSteps(backend)
        self._index_name = index
        self.index: KeyIndex
        if index == "sketch":
            self.index = SketchIndex(self.store, config=config, backend=backend)
        elif index == "flat":
            self.index = FlatIndex(self.store)
        else:
            self.index = BallIndex(self.store)

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """See the prompt's queries [batch, num_q_heads, q_len, head_dim]: the first ones set the metric; then encode."""
        self._align(kv_start)
        if isinstance(self.policy, Dense):
            return
        if isinstance(self.index, SketchIndex):
            position = torch.arange(self.kv_len - queries.shape[2], self.kv_len, device=queries.device)
            self.index.fix_metric(queries, position >= self.store.kv_start[:, None])
            self.index.refresh()
        # Balls are smaller the more keys are grouped at once, so a BallIndex takes the whole prompt in at its first step.
        self.store.settle()

    def append(self, keys: Tensor, values: Tensor) -> tuple[Keys, Values]:
        """Add tokens [batch, num_kv_heads, new_len, head_dim]; return all keys and values held, as views.

        Raises:
            OutOfRoomError: they would take more of the GPU than max_gpu_bytes.
        """
        if self.max_gpu_bytes is not None and keys.is_cuda:
            kv_len, on_gpu = self.kv_len + keys.shape[2], self.store_config.store == "device"
            config, room = None, {"capacity": self.store.capacity_for(kv_len)}
            if isinstance(self.index, SketchIndex):
                config, room["num_blocks"] = self.index.config, self.index.capacity_for(kv_len)
            check_room(keys, kv_len, config, on_gpu, self.max_gpu_bytes, **room)
        if not self._replayed.append(self.store, keys, values):
            self.store.append(keys, values)
        return self.held

    def attend(self, q: Query, softmax_scale: float, kv_start: PerRow | None = None) -> AttendResult:
        """Attention of q [batch, num_q_heads, head_dim] over the tokens held, by this layer's policy."""
        self._align(kv_start)
        if isinstance(self.policy, Dense):
            check_query(q, self.store.keys)
            values = self.store.values
            assert values is not None
            return attend_everything(q, self.store, values, softmax_scale, self.record)
        replayed = None if self.record else self._replayed.attend(q, self.index, self.policy, softmax_scale)
        if replayed is not None:
            return replayed
        return attend(
            q, self.index, policy=self.policy, softmax_scale=softmax_scale, keep_best=True, record=self.record
        )

    def attend_many(self, q: Tensor, softmax_scale: float, kv_start: PerRow | None = None) -> AttendResult | None:
        """Attention of the q_len tokens appended last, q [batch, num_q_heads, q_len, head_dim], each over the tokens up to its own.

        The result has batch * q_len rows, those of one row's tokens side by side. None where this layer serves one token at a
        time only: by the policy ``dense``, or without a sketch.
        """
        self._align(kv_start)
        if isinstance(self.policy, Dense) or not isinstance(self.index, SketchIndex):
            return None
        return attend_many(q, self.index, self.policy, softmax_scale, keep_best=True, record=self.record)

    def _align(self, kv_start: PerRow | None) -> None:
        if kv_start is not None:
            self.store.kv_start = kv_start

    def truncate(self, kv_len: int) -> None:
        """Forget every token from position kv_len on."""
        self.index.truncate(kv_len)

    def select_batch(self, ids: Tensor) -> None:
        """Rearrange, repeat or drop rows: row i becomes the old row ids[i]."""
        self.index.select_batch(ids)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes held, room to grow included: ``keys_values`` and ``index``, and the same bytes by where they are."""
        memory, index = super().memory_bytes(), self.index.memory_bytes()
        place = "gpu" if self.store.keys.is_cuda else "host"
        return memory | {"index": index, place: memory[place] + index}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a file needs to go on from here: tensors, and the arguments that make a layer like this one."""
        held = self.store.values
        assert held is not None, "a layer of a model holds values"
        tensors = {"keys": self.store.keys, "values": held, "kv_start": self.store.kv_start}
        arguments: dict[str, Any] = {"policy": self.policy.spec, "index": self._index_name}
        if isinstance(self.index, SketchIndex):
            tensors |= {f"sketch.{name}": x for name, x in self.index.state().items()}
            arguments["config"] = asdict(self.index.config)
        return tensors, arguments

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from the tensors of ``state``, taken from a layer made with the same arguments. Only for an empty layer."""
        self.store.adopt(tensors["keys"], tensors["values"], tensors["kv_start"])
        if isinstance(self.index, SketchIndex):
            prefix = "sketch."
            mine = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
            if mine:  # a cache of another index has no sketch: one is made at the next step
                self.index.restore(mine)
