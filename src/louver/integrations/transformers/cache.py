"""LouverCache: a transformers Cache whose full-attention layers are served by Louver."""

import inspect
from collections.abc import Callable

from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from louver.attention import LouverAttention
from louver.integrations.transformers.layer import LouverLayer, Observer, Shared
from louver.integrations.transformers.stats import DecodeStats, Summary
from louver.integrations.transformers.support import check_config
from louver.policies import parse
from louver.protocols import LayerAttention, Policy


class LouverCache(Cache):
    """The keys and values of a model, with the decode steps of every full-attention layer served by a LayerAttention.

    Layers with a sliding window, linear attention or shared keys are transformers' own and stay as they are. The cache can be
    used for several turns, cropped, copied, reordered and repeated like any other. Use ``attach`` to get one.

    Args:
        config: the model's config.
        policy: what a decode step keeps, such as ``exact:0.01`` (results). Ignored where ``layer`` is given.
        layer: layer_idx -> LayerAttention, to serve the layers in another way, a baseline's say (results).
        observer: called as observer(layer_idx, q, result, layer_attention, softmax_scale) after every decode step of a
            layer. May be set at any time.
        reserve_tokens: allocate this many tokens at once (speed only).
        backend: which kernels to use, ``auto`` for the best there is (speed only).
        history: keep the StepStats of this many layer steps in ``stats.history`` (memory only).

    Raises:
        UnsupportedModelError: the model does not do plain softmax attention.
        PolicyError: the policy cannot be read.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: str | Policy = "exact:0.01",
        layer: Callable[[int], LayerAttention] | None = None,
        observer: Observer | None = None,
        reserve_tokens: int = 0,
        backend: str = "auto",
        history: int = 0,
    ) -> None:
        check_config(config)
        self.policy = parse(policy) if layer is None else None
        options = {"policy": self.policy, "backend": backend, "reserve_tokens": reserve_tokens}
        make_attention = layer or (lambda layer_idx: LouverAttention(**options))
        self._shared = Shared(observer, history)
        # transformers itself knows which layer of which model needs which kind of cache; only the plain ones are taken over.
        layers = [
            LouverLayer(i, make_attention, self._shared) if type(theirs) is DynamicLayer else theirs
            for i, theirs in enumerate(DynamicCache(config=config).layers)
        ]
        super().__init__(layers=layers)

    def kwargs(self) -> dict[str, "LouverCache"]:
        """The cache as a keyword argument of ``model.generate`` and ``model(...)``, under the name transformers gives it."""
        return {_argument_name(): self}

    @property
    def stats(self) -> DecodeStats:
        """What the decode steps read and certified so far."""
        return self._shared.stats

    @property
    def observer(self) -> Observer | None:
        """Called after every decode step of a layer; None for nobody."""
        return self._shared.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._shared.observer = observer
        for layer in self.served_layers:
            layer.set_recording(observer is not None)

    @property
    def served_layers(self) -> list[LouverLayer]:
        """The layers that Louver serves."""
        return [layer for layer in self.layers if isinstance(layer, LouverLayer)]

    @property
    def is_compileable(self) -> bool:
        """False: ``generate`` must not compile the model around this cache."""
        return False

    def summary(self) -> Summary:
        """Totals over all decode steps so far."""
        return self.stats.summary()

    def memory(self) -> dict[str, int]:
        """Bytes held: ``keys_values`` and ``index`` of the served layers, ``other_layers``, and their ``total``."""
        held = [layer.attention.memory_bytes() for layer in self.served_layers]
        memory = {name: sum(part[name] for part in held) for name in ("keys_values", "index")}
        memory["other_layers"] = sum(_bytes(layer) for layer in self.layers if not isinstance(layer, LouverLayer))
        return memory | {"total": sum(memory.values())}

    def warn_unreached(self, reason: str) -> None:
        """Warn, once per cache, that the model's attention never asks it."""
        self._shared.warn_unreached(reason)

    def reset(self) -> None:
        """Forget every token and every figure, keep the settings."""
        super().reset()
        self.stats.clear()

    def __repr__(self) -> str:
        served, summary, memory = self.served_layers, self.summary(), self.memory()
        tokens = served[0].get_seq_length() if served else 0
        parts = [
            self.policy.spec if self.policy else "layers of your own",
            f"serves {len(served)} of {len(self.layers)} layers",
            f"{tokens:,} tokens",
            f"{(memory['keys_values'] + memory['other_layers']) / 2**20:.1f} MiB + {memory['index'] / 2**20:.1f} MiB index",
        ]
        if summary.num_steps:
            parts.append(f"decoding reads {summary.bytes_fraction:.1%} of dense bytes")
        return f"LouverCache({', '.join(parts)})"


def _argument_name() -> str:
    # transformers 5.24 renamed past_key_values to cache, everywhere at once.
    parameters = inspect.signature(vars(GenerationMixin)["prepare_inputs_for_generation"]).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _bytes(layer: object) -> int:
    tensors = (value for value in vars(layer).values() if isinstance(value, Tensor))
    return sum(x.numel() * x.element_size() for x in tensors)
