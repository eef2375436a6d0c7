"""Decode steps of a whole model as replays of one CUDA graph: the host launches once per token instead of once per kernel.

A graph repeats what was captured, addresses and shapes included. So the captured layers write each token behind the last one at a
position that lives on the device, and attend over the whole reserved buffers with their length on the device; nothing in a step
depends on the host. Encoding a block that fills is a launch that most steps have no use for, so there is a graph with it and one without.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from louver.attention import LouverAttention
from louver.attention.fused import follows, fused_step
from louver.errors import OutOfRoomError, PolicyError, UnsupportedModelError
from louver.index.sketch import SketchIndex
from louver.integrations.transformers.cache import LouverCache
from louver.integrations.transformers.layer import LouverLayer, mark, ordinary_tensors
from louver.integrations.transformers.padding import NO_PADDING, Padding
from louver.kernels import get_ops, resolve_backend
from louver.kernels.ops import TierOutput
from louver.kv.clock import Clock
from louver.policies.base import Dense

_WARM_UPS = 2  # steps before the capture, in which kernels are compiled and libraries make their handles


class _Captured(NamedTuple):
    replay: Callable[[], object]
    logits: Tensor
    evidence: list[TierOutput | None]


class CapturedDecoding:
    """Decodes one token per call and row, each call a replay: ``logits = decoding(token)``.

    The cache goes on as usual afterwards; whoever changes it in between (another turn, ``crop``) makes the next call capture anew
    where buffers have moved. Captured steps are not counted in ``cache.stats``; ``evidence`` holds what the last one certified.
    Whether a step is dispatched to dense (kernels/crossover.py) goes by the tokens reserved, on a CPU by nothing: where fewer are held, a
    captured step may drop keys that the usual step, being dense, keeps; its certificate says so.

    Args:
        model: on a GPU, prepared by ``attach``; decoding reads its weights where they are now.
        cache: holds the prompt, without padding, and has room: ``reserve_tokens`` is what it can ever hold in a captured step.
        graph: False launches the same steps one kernel at a time, on any device, to look into them.

    Raises:
        UnsupportedModelError: not every layer is served by Louver, a row is padded, or keys and values are not on the GPU.
        PolicyError: the backend's kernels can't follow a layer's policy without the host.
    """

    def __init__(self, model: nn.Module, cache: LouverCache, *, graph: bool = True) -> None:
        _check(cache, graph)
        self._model, self._cache, self._in_graphs = model, cache, graph
        self._held = -1  # tokens after the last replay
        self._layers: list[_CapturedLayer] = []
        self._graphs: list[_Captured] = []  # of a step that fills no block, and of one that does
        # Of the last step, by layer, None under ``dense``; the next call overwrites it.
        self.evidence: list[TierOutput | None] = []

    @torch.no_grad()
    def __call__(self, token: Tensor) -> Tensor:
        """The logits [batch, vocabulary] that follow token, int64 [batch]; the next call overwrites them.

        Raises:
            OutOfRoomError: the reserved tokens are used up.
        """
        held = self._cache.get_seq_length()
        with ordinary_tensors(), torch.cuda.device(token.device) if token.is_cuda else nullcontext():
            room = min(_attention(layer).store.capacity for layer in self._cache.served_layers)
            if held >= room:
                raise OutOfRoomError(
                    f"all {room} reserved tokens are held; give LouverCache a larger reserve_tokens before the prompt"
                )
            if not self._graphs or any(layer.moved() for layer in self._layers):
                self._capture(token, held)
            elif held != self._held:
                self._clock.set(held)
            self._token.copy_(token[:, None])
            captured = self._graphs[any(layer.fills(held + 1) for layer in self._layers)]
            self._held = -1  # until the step is done: one that fails half way leaves the clock ahead
            captured.replay()
            for layer in self._layers:
                layer.advance()
        self._held, self.evidence = held + 1, captured.evidence
        return captured.logits

    def generate(self, token: Tensor, new_tokens: int) -> Tensor:
        """Greedy continuation [batch, new_tokens] after token, int64 [batch]; waits for the device only where a block fills."""
        chosen = torch.empty(token.shape[0], new_tokens, dtype=torch.long, device=token.device)
        for i in range(new_tokens):
            token = chosen[:, i] = self(token).argmax(-1)
        return chosen

    def _capture(self, token: Tensor, held: int) -> None:
        _check(self._cache, self._in_graphs)  # what is held now may be padded
        self._clock = Clock(token.shape[0], token.device)
        self._layers = [_CapturedLayer(layer, self._clock) for layer in self._cache.served_layers]
        self._token = token[:, None].clone()
        # No mask would make transformers build one from the positions; a mask of four dimensions it passes on as it is.
        self._mask = torch.ones(token.shape[0], 1, 1, 1, dtype=torch.bool, device=token.device)
        self._graphs = []
        self._clock.set(held)
        if not self._in_graphs:
            self._graphs = [self._launched(encode) for encode in (False, True)]
            return
        side = torch.cuda.Stream()  # captures, too: torch's own stream for that is of the device that captured first
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), self._in_place():
            for _ in range(_WARM_UPS):
                self._step(encode=True)
                self._clock.set(held)
                for layer in self._layers:
                    layer.reopen(held)
        torch.cuda.current_stream().wait_stream(side)
        pool, graphs = torch.cuda.graph_pool_handle(), list[_Captured]()  # the two never run at the same time
        for encode in (False, True):
            graph = torch.cuda.CUDAGraph()
            with self._in_place(), torch.cuda.graph(graph, pool=pool, stream=side):
                logits = self._step(encode)
            graphs.append(_Captured(graph.replay, logits, [layer.step for layer in self._layers]))
        self._graphs = graphs

    def _launched(self, encode: bool) -> _Captured:
        logits = torch.empty(0, dtype=getattr(self._model, "dtype", None), device=self._token.device)
        evidence: list[TierOutput | None] = []

        def launch() -> None:
            with self._in_place():
                made = self._step(encode)
            logits.resize_(made.shape).copy_(made)
            evidence[:] = [layer.step for layer in self._layers]

        return _Captured(launch, logits, evidence)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The captured layers in the cache, in place of those they stand for."""
        usual = self._cache.layers
        self._cache.layers = list[Any](self._layers)
        try:
            yield
        finally:
            self._cache.layers = usual

    def _step(self, encode: bool) -> Tensor:
        for layer in self._layers:
            layer.encodes = encode
        self._clock.tick()
        position = self._clock.position.expand(self._token.shape[0], 1)
        model: Any = self._model
        inputs = {"attention_mask": self._mask, "position_ids": position, "use_cache": True}
        return model(self._token, **inputs, **self._cache.kwargs()).logits[:, -1]


class _CapturedLayer(LouverLayer):
    """A LouverLayer whose length is the clock's."""

    attention: LouverAttention
    step: TierOutput | None
    encodes: bool  # in the step that is being captured

    def __init__(self, layer: LouverLayer, clock: Clock) -> None:
        super().__init__(layer.layer_idx, lambda _: layer.attention, layer.shared)
        self.padding, self._clock, self.step, self._stands_for = NO_PADDING, clock, None, layer
        self._keys, self._values = self.attention.store.buffers
        self.is_initialized = True
        policy, index = self.attention.policy, self.attention.index
        self._policy, self._is_dense = policy, isinstance(policy, Dense)
        if isinstance(index, SketchIndex) and not isinstance(policy, Dense):
            index.refresh()
            assert index.sketch is not None
            index.sketch.reserve(self._keys.shape[2] // index.config.frame_len)
        self._captured_at = self._addresses()
        self._ops = get_ops(resolve_backend("auto", self._keys.device))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token at the clock's position; the buffers, marked."""
        self._keys.index_copy_(2, self._clock.position, key_states)
        self._values.index_copy_(2, self._clock.position, value_states)
        keys, values = (mark(x.view_as(x), self) for x in (self._keys, self._values))
        return keys, values

    def attend(self, q: Tensor, padding: Padding, softmax_scale: float) -> Tensor:
        """One decode step over the buffers up to the clock's length."""
        q = q.resolve_neg()  # kernels read memory
        place = (self.attention.store.kv_start, self._clock.kv_len, softmax_scale)
        if self._is_dense:
            return self._ops.attend_dense(q, self._keys, self._values, *place)[0]
        policy, index = self._policy, self.attention.index
        assert isinstance(index, SketchIndex) and index.sketch is not None
        if self.encodes:
            self._ops.encode_block(self._keys, self._values, index.sketch, *place[:2])
        done = fused_step(policy, self._ops, q, self._keys, self._values, index.sketch, place, keep_best=True)
        if done is None:
            raise PolicyError(
                f"policy={policy.spec!r} can't be captured for heads of {q.shape[2]} channels in {q.dtype}"
            )
        self.step = done[0]
        return done[0].out

    def fills(self, kv_len: int) -> bool:
        """Whether a block is full where there are kv_len tokens."""
        index = self.attention.index
        return not self._is_dense and isinstance(index, SketchIndex) and kv_len % index.config.frame_len == 0

    def advance(self) -> None:
        """Take note, on the host, of the token that a replay wrote, and of the block that it encoded."""
        self.attention.store.advance(self._clock.kv_len)
        if not self._is_dense:
            self.attention.index.refresh()

    def reopen(self, kv_len: int) -> None:
        """Forget the block that a step beyond kv_len tokens closed: a replay writes its last token anew, perhaps rounded otherwise."""
        index = self.attention.index
        if not self._is_dense and isinstance(index, SketchIndex) and index.sketch is not None:
            index.sketch.num_blocks.clamp_(max=kv_len // index.config.frame_len)

    def moved(self) -> bool:
        """Whether what was captured is elsewhere now."""
        # A reset, or a cache file, gives the layer another attention; this one's buffers stay where they were.
        return self._stands_for.attention is not self.attention or self._addresses() != self._captured_at

    def _addresses(self) -> list[int]:
        store, sketch = self.attention.store, getattr(self.attention.index, "sketch", None)
        held = [*store.buffers, store.kv_start] + ([] if sketch is None else [x for _, x in sketch.tensors()])
        return [x.data_ptr() for x in held]


def _check(cache: LouverCache, graph: bool) -> None:
    if len({_attention(layer).store.keys.device for layer in cache.served_layers}) > 1:
        raise UnsupportedModelError("a captured step needs every layer on one device")
    if len(cache.served_layers) != len(cache.layers):
        raise UnsupportedModelError(
            "a captured step needs every layer served by Louver; this model has others, with caches of their own"
        )
    for layer in cache.served_layers:
        attention = _attention(layer)
        if attention.store.place != "gpu" and graph:
            raise UnsupportedModelError("a captured step needs keys and values on the GPU")
        if attention.store.has_padding:
            raise UnsupportedModelError(
                "a captured step takes rows without padding; decode padded rows through generate"
            )
        dense, ops = isinstance(attention.policy, Dense), get_ops(resolve_backend("auto", attention.store.keys.device))
        if not dense and not (follows(attention.policy, ops) and isinstance(attention.index, SketchIndex)):
            raise PolicyError(
                f"policy={attention.policy.spec!r} can't be captured here; wanted one that the kernels follow without the host, over the "
                "sketch: 'exact:0.01', 'budget:0.05', 'topk:64', 'fixed:X' or 'dense', and on a GPU 'mass:0.01', 'relative:8', 'error:0.1'"
            )


def _attention(layer: LouverLayer) -> LouverAttention:
    if not isinstance(layer.attention, LouverAttention):
        raise UnsupportedModelError(
            f"a captured step needs layers served by LouverAttention, got {type(layer.attention).__name__}"
        )
    return layer.attention
