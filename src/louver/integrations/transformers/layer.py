"""One full-attention layer of a LouverCache: transformers' cache-layer interface over a LayerAttention.

``update`` marks the keys and values it returns with the layer they came from. Models pass those tensors straight on to their
attention function, which finds the layer by the marks; no global state, and a copied cache's keys lead to the copied layer.
"""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from louver.attention import LouverAttention
from louver.errors import LouverWarning
from louver.integrations.transformers import as_of
from louver.integrations.transformers.padding import Padding, PaddingReader
from louver.integrations.transformers.stats import DecodeStats
from louver.integrations.transformers.support import check_states
from louver.protocols import AttendResult, LayerAttention

Observer = Callable[[int, Tensor, AttendResult, LayerAttention, float], None]

_MARK = "_louver_layer"
# A call of update that the attention function has not followed up is normal while a model runs, and two are not.
_UNANSWERED_UPDATES = 2


def ordinary_tensors() -> AbstractContextManager:
    """What a LayerAttention keeps must stay writable: a tensor made inside inference_mode would not be, outside of it."""
    if not torch.is_inference_mode_enabled():
        return torch.no_grad() if torch.is_grad_enabled() else nullcontext()  # the latter in transformers' generate
    both = ExitStack()
    both.enter_context(torch.inference_mode(False))
    both.enter_context(torch.no_grad())
    return both


class Shared:
    """What the layers of one cache have in common."""

    def __init__(self, observer: Observer | None, history: int) -> None:
        self.observer = observer
        self.stats = DecodeStats(history)
        self.read_padding = PaddingReader()
        self._warned: set[str] = set()

    def warn_once(self, topic: str, message: str) -> None:
        """Issue a LouverWarning unless this cache already issued one on the topic."""
        if topic not in self._warned:
            self._warned.add(topic)
            warnings.warn(message, LouverWarning, stacklevel=2)

    def warn_unreached(self, reason: str) -> None:
        """Warn once that the model's attention never asks this cache."""
        self.warn_once("unreached", f"every layer is attended densely: {reason}")


class LouverLayer(CacheLayerMixin):
    """A cache layer whose decode steps are served by a LayerAttention.

    Args:
        layer_idx: the layer's position in the model.
        make_attention: layer_idx -> LayerAttention, called now and after every reset.
        shared: what the layers of the cache have in common.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, layer_idx: int, make_attention: Callable[[int], LayerAttention], shared: Shared) -> None:
        # Not super().__init__(): it assigns keys and values, which are views of the LayerAttention's own here.
        self.layer_idx = layer_idx
        self.shared = shared
        self._make_attention = make_attention
        self.reset()

    def reset(self) -> None:
        """Forget every token and give the memory back."""
        self.is_initialized = False
        self.attention = self._make_attention(self.layer_idx)
        self.padding: Padding | None = None  # as at the first call that stated it; None: not stated yet
        self._unanswered = 0
        self._no_tokens: Tensor | None = None
        self.set_recording(self.shared.observer is not None)

    def restore(
        self, make_attention: Callable[[int], LouverAttention], tensors: dict[str, Tensor], padding: Padding | None
    ) -> None:
        """Become a layer served by make_attention that goes on from a saved one's tensors and padding."""
        self._make_attention = make_attention
        self.reset()
        assert isinstance(self.attention, LouverAttention)
        with ordinary_tensors():
            self.attention.restore(tensors)
            self.lazy_initialization(tensors["keys"], tensors["values"])
        self.padding = padding

    def set_recording(self, record: bool) -> None:
        """Ask the LayerAttention for the evidence an observer wants, if it has a switch for that."""
        if hasattr(self.attention, "record"):
            self.attention.record = record  # pyright: ignore[reportAttributeAccessIssue]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Learn shapes, dtype and device from the first tokens."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._no_tokens = torch.zeros_like(key_states[:, :, :0])
        self.is_initialized = True

    @property
    def keys(self) -> Tensor | None:
        """A view of the keys held, None before the first token."""
        return None if self._no_tokens is None else self.attention.append(self._no_tokens, self._no_tokens)[0]

    @property
    def values(self) -> Tensor | None:
        """A view of the values held, None before the first token."""
        return None if self._no_tokens is None else self.attention.append(self._no_tokens, self._no_tokens)[1]

    @torch.compiler.disable  # as is the attention function
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens and return all keys and all values, both marked."""
        check_states(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._unanswered >= _UNANSWERED_UPDATES:
            self.shared.warn_unreached(
                f"layer {self.layer_idx} took {self._unanswered} forward passes and was never asked for attention; attach(model) was "
                "not called, or the model changes the keys or values it is handed, or does not use transformers' attention interface"
            )
        self._unanswered += 1
        with ordinary_tensors():
            keys, values = self.attention.append(key_states, value_states)
        return mark(keys.view_as(keys), self), mark(
            values.view_as(values), self
        )  # views of their own: the store keeps others

    def answered(self) -> None:
        """Note that the attention function found this layer."""
        self._unanswered = 0

    def accepts(self, padding: Padding | None, q_len: int) -> bool:
        """Whether a call with q_len new tokens and this padding can be served: left padding, the same as in the calls before.

        A row that holds nothing but padding so far, as the first chunks of a prompt can, may have more of it.
        """
        if padding is None:
            return False
        if self.padding is None or self.padding.grows_to(padding, self.get_seq_length() - q_len):
            self.padding = padding
        return self.padding.counts == padding.counts

    def attend(self, q: Tensor, padding: Padding, softmax_scale: float) -> Tensor:
        """The output [batch, num_q_heads, head_dim] of one decode step, counted and shown to the observer."""
        with ordinary_tensors():
            result = self.attention.attend(q, softmax_scale, padding.kv_start)
        self.shared.stats.add(self.layer_idx, result)
        if self.shared.observer is not None:
            self.shared.observer(self.layer_idx, q, result, self.attention, softmax_scale)
        return result.out

    def attend_many(self, q: Tensor, padding: Padding, softmax_scale: float) -> Tensor | None:
        """The output [batch, q_len, num_q_heads, head_dim] of the tokens appended last; None where attention is to be dense.

        ``attend_many`` is an optional method of a LayerAttention. The observer is told of one token after another.
        """
        many = getattr(self.attention, "attend_many", None)
        with ordinary_tensors():
            result = None if many is None else many(q, softmax_scale, padding.kv_start)
        if result is None:
            return None
        self.shared.stats.add(self.layer_idx, result)
        if self.shared.observer is not None:
            for i, (one, seen) in enumerate(as_of.steps(result, self.attention, q.shape[2])):
                self.shared.observer(self.layer_idx, q[:, :, i], one, seen, softmax_scale)
        return result.out.unflatten(0, (-1, q.shape[2]))

    def observe(self, queries: Tensor, padding: Padding, softmax_scale: float) -> None:
        """Show the LayerAttention the queries [batch, num_q_heads, q_len, head_dim] of a prompt."""
        with ordinary_tensors():
            self.attention.observe(queries, padding.kv_start, softmax_scale)

    def get_seq_length(self) -> int:
        """Tokens held, padding included."""
        return self.attention.kv_len if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: there is no maximum."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for a call with query_length new tokens."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int | Tensor) -> None:
        """Remove the last -tokens_to_remove tokens; 0 removes none, and a positive number is an error as in transformers."""
        tokens_to_remove = int(tokens_to_remove)  # transformers before 5.18 passes a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                f"crop takes the number of tokens to remove as a negative number, got {tokens_to_remove}; "
                f"to keep {tokens_to_remove} tokens, call crop({tokens_to_remove} - cache.get_seq_length())"
            )
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        keep = self.attention.kv_len + tokens_to_remove
        if keep > 0:
            with ordinary_tensors():
                self.attention.truncate(keep)
        else:
            self.reset()  # what comes next may have another batch, and its own padding

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rearrange the rows for beam search."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows indices."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row repeats times."""
        if self._no_tokens is not None:
            rows = torch.arange(self._no_tokens.shape[0], device=self._no_tokens.device)
            self._select(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """Nothing: where keys live is the LayerAttention's business."""

    def prefetch(self) -> None:
        """Nothing: where keys live is the LayerAttention's business."""

    def _select(self, ids: Tensor) -> None:
        if self._no_tokens is None:
            return
        with ordinary_tensors():
            ids = ids.to(self._no_tokens.device)
            self.attention.select_batch(ids)
            self._no_tokens = self._no_tokens[ids]
            if self.padding is not None:
                self.padding = self.padding.select(ids)

    def __repr__(self) -> str:
        return f"LouverLayer({self.layer_idx}, {type(self.attention).__name__}, {self.get_seq_length():,} tokens)"


def mark(held: Tensor, layer: LouverLayer) -> Tensor:
    """The keys or values held, from which ``layer_of`` finds layer."""
    setattr(held, _MARK, layer)
    return held


def layer_of(held: Tensor) -> LouverLayer | None:
    """The LouverLayer that handed out these keys or values, None if another cache did, or the model made them."""
    return getattr(held, _MARK, None)
