"""One dense reading of a prompt, branched to many ways of serving the decode steps after it.

A prompt is read once. Its keys, values and queries are recorded per layer and then shown to any LayerAttention exactly as a cache
would have shown them, part by part, so every method decodes after the same prompt and none pays for reading it again. Answers are
fed to the model token by token (teacher forcing): a greedy answer equals the expected one if and only if every token of it is the
most probable one after those before it, so forcing loses nothing and costs one pass. Rows of a batch are equally long.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from louver.attention import DenseAttention
from louver.experiments.decoding import PREFILL_CHUNK_TOKENS
from louver.protocols import LayerAttention
from louver.shapes import PerRow

Layers = Mapping[int, LayerAttention]  # by layer index
TOKENS_PER_CALL = 16  # new tokens that a layer with ``attend_many`` serves in one forward pass


class Recorder(DenseAttention):
    """Dense attention that remembers the queries of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Tensor] = []
        self.softmax_scale = 0.0
        self.reading = True  # what is decoded later is no part of the prompt

    def observe(self, queries: Tensor, kv_start: PerRow | None, softmax_scale: float) -> None:
        """Remember the queries [batch, num_q_heads, q_len, head_dim]."""
        super().observe(queries, kv_start, softmax_scale)
        if self.reading:
            self.queries.append(queries)
            self.softmax_scale = softmax_scale


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What a method made of the tokens it was fed."""

    logits: Float[Tensor, "batch steps vocab"]  # float32, on the model's device
    bytes_fraction: float
    exact_fraction: float


class Prompt:
    """A prompt that a model has read, all but its last token, which is the first decode step's.

    The model must be attached to Louver; ``read`` does it.
    """

    def __init__(self, model: Any, cache: Any, ids: Int[Tensor, "batch prompt_len"]) -> None:
        self.model, self.ids = model, ids
        self._cache = cache
        self.recorded: dict[int, Recorder] = {layer.layer_idx: layer.attention for layer in cache.served_layers}
        for recorder in self.recorded.values():
            recorder.reading = False

    @classmethod
    def read(
        cls, model: Any, ids: Int[Tensor, "batch prompt_len"], on_progress: Callable[[int], None] = lambda done: None
    ) -> "Prompt":
        """Run ids through the model, with dense attention."""
        from louver.integrations.transformers import attach

        cache = attach(model, layer=lambda _: Recorder())
        ids = ids.to(model.device)
        length = ids.shape[1] - 1
        starts = list(range(0, length, PREFILL_CHUNK_TOKENS))
        if len(starts) > 1 and length - starts[-1] == 1:
            starts.pop()  # a single token would count as a decode step
        with torch.no_grad():
            for start, end in zip(starts, [*starts[1:], length], strict=True):
                model(input_ids=ids[:, start:end], **cache.kwargs(), use_cache=True, logits_to_keep=1)
                on_progress(end)
        return cls(model, cache, ids)

    def served_by(self, make: Callable[[int], LayerAttention]) -> dict[int, LayerAttention]:
        """New layers that have seen this prompt, part by part."""
        layers = {}
        for layer_idx, recorder in self.recorded.items():
            keys, values = recorder.store.keys, recorder.store.values
            assert values is not None
            layers[layer_idx] = attention = make(layer_idx)
            start = 0
            for queries in recorder.queries:
                part = slice(start, start + queries.shape[2])
                attention.append(keys[:, :, part], values[:, :, part])
                attention.observe(queries, None, recorder.softmax_scale)
                start = part.stop
        return layers

    def forced(self, layers: Layers, tokens: Int[Tensor, "batch steps"]) -> Decoded:
        """Feed the prompt's last token and all of ``tokens`` but the last; the logits predict ``tokens``."""
        fed = torch.cat([self.ids[:, -1:], tokens[:, :-1].to(self.ids)], 1)
        together = TOKENS_PER_CALL if all(_serves_many(layer) for layer in layers.values()) else 1
        return self._run(layers, lambda cache, call: [call(part) for part in fed.split(together, 1)])

    def greedy(
        self, layers: Layers, num_steps: int, on_step: Callable[[int], None] = lambda done: None
    ) -> tuple[Int[Tensor, "batch num_steps"], Decoded]:
        """Let the model go on by itself; also the tokens it chose."""

        def loop(cache: Any, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
            fed, found = self.ids[:, -1:], []
            for step in range(num_steps):
                found.append(call(fed))
                fed = found[-1].argmax(-1)
                on_step(step + 1)
            return found

        decoded = self._run(layers, loop)
        return decoded.logits.argmax(-1), decoded

    def _run(self, layers: Layers, loop: Callable[[Any, Callable[[Tensor], Tensor]], list[Tensor]]) -> Decoded:
        cache = self._branch(layers)

        def call(part: Tensor) -> Tensor:
            return self.model(input_ids=part, **cache.kwargs(), use_cache=True).logits.float()

        try:
            with torch.no_grad():
                logits = torch.cat(loop(cache, call), 1)
            summary = cache.summary()
        finally:
            for layer in layers.values():
                layer.truncate(self.ids.shape[1] - 1)
        counted = summary.num_steps > 0  # several tokens at once on dense layers are transformers' own attention
        return Decoded(
            logits=logits,
            bytes_fraction=summary.bytes_fraction if counted else 1.0,
            exact_fraction=summary.exact_fraction if counted else 1.0,
        )

    def _branch(self, layers: Layers) -> Any:
        """A cache over these layers; what Louver does not serve is copied from the reading."""
        from louver.integrations.transformers import LouverCache, LouverLayer

        cache = LouverCache(self.model.config, layer=lambda layer_idx: layers[layer_idx])
        for i, (mine, read) in enumerate(zip(cache.layers, self._cache.layers, strict=True)):
            if isinstance(mine, LouverLayer):
                nothing = self.recorded[i].store.keys[:, :, :0]
                mine.lazy_initialization(nothing, nothing)
            else:
                cache.layers[i] = copy.deepcopy(read)
        return cache


def _serves_many(layer: LayerAttention) -> bool:
    """Whether several tokens in one call are served as they are one by one."""
    return type(layer) in (DenseAttention, Recorder) or hasattr(layer, "attend_many")
