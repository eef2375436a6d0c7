"""Result rows: the one form in which Louver writes a number down.

A file holds one object, ``{"machine": {device, versions, seed, command, ...}, "rows": [...]}``; a row is a flat object with
the field names of docs/design.md. Files are written whole or not at all.
"""

import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from louver.errors import InputFileError
from louver.files import replacing

PACKAGES = ("louver", "torch", "numpy", "safetensors", "transformers", "triton", "vllm")

Row = Mapping[str, Any]


def machine(seed: int | None, command: str | None = None, device: str = "auto") -> dict[str, Any]:
    """Describe this machine and this run: device, versions (None where a package is missing), seed, command.

    The device is the GPU where torch sees one, unless ``device="cpu"`` says that the run was on the processor beside it.
    """
    if command is None:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "device": _device_name(device),
        "num_threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "seed": seed,
        "command": command,
    }


def write_rows(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    seed: int | None,
    command: str | None = None,
    device: str = "auto",
    **more: Any,
) -> None:
    """Write rows with the machine they come from. ``more`` adds top-level entries, such as ``rows_per_layer``.

    ``device="cpu"`` where the rows are of the processor, whatever is beside it.

    The file appears complete or not at all. NaN and infinity have no form in JSON and are written as null.
    """
    document = {"machine": machine(seed, command, device), "rows": [dict(row) for row in rows], **more}
    write_text(path, json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")


def read_rows(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what write_rows wrote; raises an InputFileError for anything else."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputFileError(f"{path}: not a JSON file ({error})") from None
    if not isinstance(document, dict) or not {"machine", "rows"} <= document.keys():
        raise InputFileError(f"{path}: not a file of result rows (wanted an object with `machine` and `rows`)")
    return document


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically, making its folder where needed."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file atomically, making its folder where needed."""
    with replacing(path) as file:
        file.write(data)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} CPUs)"
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} CPUs)"
