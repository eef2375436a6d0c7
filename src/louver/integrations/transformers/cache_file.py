"""A LouverCache in one file: a prompt processed once goes on in another process, with identical tokens.

The file is safetensors of the form "louver-cache-2". Per served layer it holds what ``LouverAttention.state`` names: exact keys and
values, padding and the sketch in its canonical layout with its metric weights and mean values. Layers that are transformers' own
(sliding windows, linear attention) keep their tensors and settings as they are. ``facts`` tells the model by its shape.
"""

import json
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from louver.attention import LouverAttention
from louver.errors import CacheFileError
from louver.integrations.transformers.layer import LouverLayer
from louver.integrations.transformers.padding import Padding
from louver.kv.tensor_file import read_tensors, write_tensors
from louver.sketch.layout import SketchConfig

if TYPE_CHECKING:
    from louver.integrations.transformers.cache import LouverCache

FORM = "louver-cache-2"
# What makes keys and values of one model meaningless to another, as far as a config can tell. Weights are not compared.
_MODEL_FIELDS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "sliding_window",
    "layer_types",
)


def save(cache: "LouverCache", config: PreTrainedConfig, path: str | os.PathLike[str]) -> None:
    """Write a cache and its index to path, atomically.

    Raises:
        CacheFileError: the cache holds no tokens, or a layer that no file can hold.
    """
    if not cache.get_seq_length():
        raise CacheFileError("the cache holds no tokens yet; run the prompt first, then save")
    tensors: dict[str, Tensor] = {}
    layers = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LouverLayer):
            if not isinstance(layer.attention, LouverAttention):
                raise CacheFileError(f"layer {i} is served by {type(layer.attention).__name__}, which cannot be saved")
            mine, arguments = layer.attention.state()
            padding = None if layer.padding is None else list(layer.padding.counts)
            layers.append({"louver": arguments, "padding": padding})
        else:
            plain = _Plain()
            state = {name: plain.pack(name, value) for name, value in vars(layer).items()}
            mine = plain.tensors
            layers.append({"type": type(layer).__name__, "state": state})
        tensors |= {f"layers.{i}.{name}": x for name, x in mine.items()}
    facts = {
        "model": json.dumps(_describe(config)),
        "layers": json.dumps(layers),
        "device": next(iter(tensors.values())).device.type,
        "policy": "" if cache.policy is None else cache.policy.spec,
    }
    write_tensors(path, tensors, facts, FORM)


def load(
    make_cache: "type[LouverCache]",
    path: str | os.PathLike[str],
    config: PreTrainedConfig,
    policy: str | None,
    device: torch.device | str | None,
    options: dict[str, Any],
) -> "LouverCache":
    """The cache that ``save`` wrote.

    Raises:
        CacheFileError: the file is missing, truncated, corrupt, of another form, or of another model.
    """
    tensors, facts = read_tensors(path, FORM)
    _check_model(path, json.loads(facts["model"]), _describe(config))
    layers = json.loads(facts["layers"])
    index = next((saved["louver"]["index"] for saved in layers if "louver" in saved), "sketch")
    options = {"index": index, **options}
    cache = make_cache(config, policy or facts["policy"] or "dense", **options)
    if not (policy or facts["policy"]):
        cache.policy = None
    available = facts["device"] == "cpu" or torch.cuda.is_available()
    target = torch.device(device or (facts["device"] if available else "cpu"))
    if len(cache.layers) != len(layers):
        raise CacheFileError(f"{path}: has {len(layers)} layers where this transformers makes {len(cache.layers)}")
    for i, (saved, layer) in enumerate(zip(layers, cache.layers, strict=True)):
        prefix = f"layers.{i}."
        mine = {k.removeprefix(prefix): x.to(target) for k, x in tensors.items() if k.startswith(prefix)}
        if isinstance(layer, LouverLayer):
            arguments = cache.options | _arguments(saved["louver"], policy)
            layer.restore(
                lambda _, arguments=arguments: LouverAttention(**arguments),
                mine,
                _padding(saved["padding"], mine["kv_start"]),
            )
        elif saved.get("type") != type(layer).__name__:
            raise CacheFileError(f"{path}: layer {i} is of type {saved.get('type')}, here it is {type(layer).__name__}")
        else:
            plain = _Plain(mine, target)
            vars(layer).update({name: plain.unpack(value) for name, value in saved["state"].items()})
    return cache


def _arguments(saved: dict[str, Any], policy: str | None) -> dict[str, Any]:
    config = {} if "config" not in saved else {"config": SketchConfig(**saved["config"])}
    return {"policy": policy or saved["policy"], **config}


def _padding(counts: list[int] | None, kv_start: Tensor) -> Padding | None:
    if counts is None:
        return None
    return Padding(kv_start.clone(), tuple(counts)) if counts else Padding()


def _describe(config: PreTrainedConfig) -> dict[str, Any]:
    text = config.get_text_config(decoder=True)
    return {name: getattr(text, name, None) for name in _MODEL_FIELDS}


def _check_model(path: str | os.PathLike[str], saved: dict[str, Any], mine: dict[str, Any]) -> None:
    for name in _MODEL_FIELDS:
        if saved.get(name) != mine[name]:
            raise CacheFileError(
                f"{path}: the cache of another model ({name} is {saved.get(name)} in the file and {mine[name]} in this config)"
            )


class _Plain:
    """The attributes of transformers' own layers as JSON, their tensors set apart. What is neither is refused."""

    def __init__(self, tensors: dict[str, Tensor] | None = None, device: torch.device | None = None) -> None:
        self.tensors = {} if tensors is None else tensors
        self._device = device

    def pack(self, name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.tensors[name] = value
            return {"tensor": name}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": True}
        if isinstance(value, dict):
            return {"dict": [[key, self.pack(f"{name}.{key}", item)] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            return {"list": [self.pack(f"{name}.{i}", item) for i, item in enumerate(value)]}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise CacheFileError(f"a cache layer's {name} is a {type(value).__name__}, which a file cannot hold")

    def unpack(self, packed: Any) -> Any:
        if not isinstance(packed, dict):
            return packed
        ((kind, content),) = packed.items()
        if kind == "tensor":
            return self.tensors[content].clone()
        if kind == "dtype":
            return getattr(torch, content)
        if kind == "device":
            return self._device
        if kind == "dict":
            return {key: self.unpack(item) for key, item in content}
        return [self.unpack(item) for item in content]
