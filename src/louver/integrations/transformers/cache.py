"""LouverCache: a transformers Cache whose full-attention layers are served by Louver."""

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from louver.attention import LouverAttention
from louver.integrations.transformers import cache_file
from louver.integrations.transformers.layer import LouverLayer, Observer, Shared
from louver.integrations.transformers.stats import DecodeStats, Summary
from louver.integrations.transformers.support import check_config
from louver.integrations.transformers.tuning import PolicyChoice, choose_policies, read_tuning
from louver.policies import DEFAULT_POLICY, parse
from louver.protocols import LayerAttention, Policy

_PLACES = {"gpu": "on the GPU", "host": "in RAM", "disk": "on disk"}


class LouverCache(Cache):
    """The keys and values of a model, with the decode steps of every full-attention layer served by a LayerAttention.

    Layers with a sliding window, linear attention or shared keys are transformers' own and stay as they are. The cache can be
    used for several turns, cropped, copied, reordered and repeated like any other. Use ``attach`` to get one.

    Args:
        config: the model's config.
        policy: what a decode step keeps, such as ``exact:0.01`` (results), or one per layer: ``{"default": "exact:0.005", 3:
            "exact:0.03"}``, by layer index. Ignored where ``layer`` is given.
        layer: layer_idx -> LayerAttention, to serve the layers in another way, a baseline's say (results).
        observer: called as observer(layer_idx, q, result, layer_attention, softmax_scale) after every decode step of a
            layer. May be set at any time.
        reserve_tokens: allocate this many tokens at once (speed only).
        backend: which kernels to use, ``auto`` for the best there is (speed only).
        index: ``sketch``, or ``flat`` or ``ball`` for retrieval policies without a sketch (speed only).
        history: keep the StepStats of this many layer steps in ``stats.history`` (memory only).
        store: where exact keys and values live (speed and memory only): ``device``, where the model is; ``host``, in RAM, so
            that of a model on a GPU only the sketch takes up the GPU; ``disk``, in memory-mapped files, for a model on a CPU.
        path: of ``store="disk"``: the folder of the working files. They vanish with the process; ``save`` keeps a cache.
        max_gpu_bytes: raise an OutOfRoomError, saying what would fit, before the served layers take more of the GPU than this.

    Raises:
        UnsupportedModelError: the model does not do plain softmax attention.
        PolicyError: the policy cannot be read, or needs a sketch and ``index`` is another; or the store is unknown or lacks its
            path.
        OutOfRoomError: the working files cannot be made.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        policy: PolicyChoice = DEFAULT_POLICY,
        layer: Callable[[int], LayerAttention] | None = None,
        observer: Observer | None = None,
        reserve_tokens: int = 0,
        backend: str = "auto",
        history: int = 0,
        store: str = "device",
        path: str | os.PathLike[str] | None = None,
        max_gpu_bytes: int | None = None,
        index: str = "sketch",
    ) -> None:
        check_config(config)
        self._config = config
        default, by_layer = choose_policies(policy, DynamicCache(config=config).layers)
        self.policy = default if layer is None else None
        self.layer_policies = by_layer if layer is None else {}
        # transformers itself knows which layer of which model needs which kind of cache; only the plain ones are taken over.
        theirs = DynamicCache(config=config).layers
        served = [type(layer) is DynamicLayer for layer in theirs]
        self.options: dict[str, Any] = {
            "index": index,
            "backend": backend,
            "reserve_tokens": reserve_tokens,
            "store": store,
            "path": path,
            "max_gpu_bytes": None if max_gpu_bytes is None else max_gpu_bytes // max(1, sum(served)),
        }
        self._shared = Shared(observer, history)
        make_attention = layer or self._make_attention
        super().__init__(
            layers=[
                LouverLayer(i, make_attention, self._shared) if taken else layer
                for i, (layer, taken) in enumerate(zip(theirs, served, strict=True))
            ]
        )

    def _make_attention(self, layer_idx: int) -> LayerAttention:
        return LouverAttention(self.layer_policies.get(layer_idx, self.policy or "dense"), **self.options)

    @classmethod
    def from_tuning(cls, path: str | os.PathLike[str], config: PreTrainedConfig, **options: Any) -> "LouverCache":
        """A cache with the policies that ``louver tune`` found for a model; ``attach(model, tuning=path)`` does the same.

        Args:
            path: what ``louver tune`` wrote.
            config: the model's config.
            **options: passed on to LouverCache.

        Raises:
            InputFileError: there is no such file, or it holds no tuning, or that of a model with other layers.
        """
        return cls(config, read_tuning(path, config), **options)

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the tokens and their index to a file, from which ``load`` goes on as if nothing had happened.

        The file appears whole or not at all: whatever happens meanwhile, an earlier file of that name stays readable. It is
        safetensors, about 1.3 times as large as the 16-bit cache, and opens on any device.

        Raises:
            CacheFileError: the cache holds no tokens, or is served by layers of your own.
        """
        cache_file.save(self, self._config, file)

    @classmethod
    def load(
        cls,
        file: str | os.PathLike[str],
        config: PreTrainedConfig,
        *,
        policy: str | Policy | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> "LouverCache":
        """Go on from a file that ``save`` wrote, for a model that ``attach`` has prepared.

        Nothing is ever written to the file. With ``store="disk"`` it is mapped, not read into memory, until the first new token
        moves the tokens to working files.

        Args:
            file: what ``save`` wrote.
            config: the model's config. It must describe the model that made the cache; weights cannot be compared.
            policy: what a decode step keeps; default: as saved.
            device: where the model is; default: the kind of device the cache was saved on, if there is one here.
            **options: passed on to LouverCache.

        Raises:
            CacheFileError: the file is missing, truncated, corrupt, no Louver cache, or the cache of another model.
        """
        return cache_file.load(cls, file, config, None if policy is None else parse(policy).spec, device, options)

    def kwargs(self) -> dict[str, "LouverCache"]:
        """The cache as a keyword argument of ``model.generate`` and ``model(...)``, under the name transformers gives it."""
        return keywords(self)

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

    def memory(self) -> dict[str, int | float]:
        """Bytes held, room to grow included, by name.

        ``keys_values`` and ``index`` of the served layers, ``other_layers``, and their ``total``; the same bytes by where they are,
        ``gpu``, ``host`` and ``disk``; and ``index_fraction``, the index over the keys and values.
        """
        held = [layer.attention.memory_bytes() for layer in self.served_layers]
        parts = ("keys_values", "index", "gpu", "host", "disk")
        memory: dict[str, int | float] = {name: sum(part.get(name, 0) for part in held) for name in parts}
        memory["other_layers"] = 0
        for layer in self.layers:
            if not isinstance(layer, LouverLayer):
                for x in _tensors(vars(layer)):
                    memory["other_layers"] += x.numel() * x.element_size()
                    memory["gpu" if x.is_cuda else "host"] += x.numel() * x.element_size()
        memory["total"] = memory["keys_values"] + memory["index"] + memory["other_layers"]
        return memory | {"index_fraction": memory["index"] / max(1, memory["keys_values"])}

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
            self._policy_text(),
            f"serves {len(served)} of {len(self.layers)} layers",
            f"{tokens:,} tokens",
            f"{_mib(memory['keys_values'] + memory['other_layers'])} + {_mib(memory['index'])} index",
            *(f"{_mib(memory[place])} {where}" for place, where in _PLACES.items() if memory[place]),
        ]
        if summary.num_steps:
            parts.append(f"decoding reads {summary.bytes_fraction:.1%} of dense bytes")
        return f"LouverCache({', '.join(parts)})"

    def _policy_text(self) -> str:
        if self.policy is None:
            return "layers of your own"
        own = len(self.layer_policies)
        return self.policy.spec + (f" ({own} layers have their own)" if own else "")


def keywords(cache: Cache) -> dict[str, Any]:
    """Any cache as a keyword argument, under the name transformers gives it."""
    return {_argument_name(): cache}


def _argument_name() -> str:
    # transformers 5.24 renamed past_key_values to cache, everywhere at once.
    parameters = inspect.signature(vars(GenerationMixin)["prepare_inputs_for_generation"]).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for item in held.values():
            yield from _tensors(item)


def _mib(num_bytes: int | float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
