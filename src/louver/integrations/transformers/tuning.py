"""A policy per layer: how a LouverCache is told of it, and the file in which ``louver tune`` keeps what it found."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from louver.errors import InputFileError, PolicyError
from louver.policies import parse
from louver.protocols import Policy

PolicyChoice = str | Policy | Mapping[int | str, str | Policy]  # for all layers, or by layer index beside "default"


def choose_policies(choice: PolicyChoice, layers: Sequence[object]) -> tuple[Policy, dict[int, Policy]]:
    """The policy of most layers, and those of the layers that have their own.

    Raises:
        PolicyError: a policy can't be read, there is no default, or a layer is none that Louver serves.
    """
    if not isinstance(choice, Mapping):
        return parse(choice), {}
    if "default" not in choice:
        raise PolicyError("policy={...} by layer needs a 'default' for the layers it does not name")
    by_layer: dict[int, Policy] = {}
    for name, spec in choice.items():
        if name == "default":
            continue
        index = int(name) if str(name).isdecimal() else -1
        if not 0 <= index < len(layers) or type(layers[index]) is not DynamicLayer:
            raise PolicyError(
                f"policy={{{name!r}: ...}} names no layer that Louver serves; wanted an index from 0 to {len(layers) - 1} of a "
                "layer with full attention, or 'default'"
            )
        by_layer[index] = parse(spec)
    return parse(choice["default"]), by_layer


def read_tuning(path: str | os.PathLike[str], config: PreTrainedConfig) -> PolicyChoice:
    """The policies in a file that ``louver tune`` wrote, for a model with as many layers.

    Raises:
        InputFileError: there is no such file, or it holds no tuning, or that of another model.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        policies, num_layers = document["policies"], document["num_layers"]
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file; `louver tune --json {path}` makes one") from None
    except IsADirectoryError:
        raise InputFileError(f"{path}: is a folder; wanted the file that `louver tune` wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
        raise InputFileError(f"{path}: not what `louver tune` writes (wanted `policies` and `num_layers`)") from None
    mine = config.get_text_config(decoder=True).num_hidden_layers
    if num_layers != mine:
        raise InputFileError(f"{path}: tuned for a model with {num_layers} layers, this one has {mine}")
    return policies
