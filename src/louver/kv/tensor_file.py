"""Named tensors and facts in one safetensors file, with checksums: written piece by piece, read by mapping.

The layout is that of safetensors: eight bytes with the header's length, the header in JSON, the tensors' bytes. Louver's facts are
strings under ``__metadata__``, as the format has it, among them ``crc32``: one checksum for the header (taken with
the checksums' digits as zeros) and one per tensor. No pickle, no code: reading a file cannot run anything.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from louver.errors import CacheFileError
from louver.files import replacing

PIECE_BYTES = 32 << 20
_CRC = "crc32"
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.bool: "BOOL",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float64: "F64",
}


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, str], form: str
) -> None:
    """Write the tensors, on whatever device, with string facts, as a file of the form named.

    The file appears whole or not at all, and never more than a piece of a tensor is copied to memory.

    Raises:
        CacheFileError: a tensor has a dtype that the format lacks.
    """
    # The widest elements first, so that every tensor is aligned to its own.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    checksums = [0] * (len(names) + 1)
    with replacing(path) as file:
        file.write(_header(tensors, names, facts, form, checksums))
        for i, name in enumerate(names):
            checksums[i + 1] = _write(file, tensors[name])
        checksums[0] = zlib.crc32(_header(tensors, names, facts, form, [0] * len(checksums)))
        file.seek(0)
        file.write(_header(tensors, names, facts, form, checksums))


def _header(
    tensors: Mapping[str, Tensor], names: list[str], facts: Mapping[str, str], form: str, checksums: list[int]
) -> bytes:
    crc = " ".join(f"{x:08x}" for x in checksums)
    header: dict[str, object] = {"__metadata__": {**facts, "format": form, _CRC: crc}}
    offset = 0
    for name in names:
        x = tensors[name]
        if x.dtype not in _DTYPES:
            raise CacheFileError(f"{name} has dtype {x.dtype}, which a cache file cannot hold")
        end = offset + x.numel() * x.element_size()
        header[name] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(file: BinaryIO, x: Tensor) -> int:
    checksum = 0
    for piece in _pieces(x):
        data = _bytes(piece)
        file.write(data)
        checksum = zlib.crc32(data, checksum)
    return checksum


def _bytes(piece: Tensor) -> Any:
    return piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _pieces(x: Tensor) -> Iterator[Tensor]:
    """Consecutive parts of x, in the order of its elements, none much larger than PIECE_BYTES."""
    if x.numel() * x.element_size() <= PIECE_BYTES or x.dim() == 0:
        yield x
    elif x.shape[0] == 1:
        yield from _pieces(x[0])
    else:
        rows = max(1, PIECE_BYTES * x.shape[0] // (x.numel() * x.element_size()))
        for part in x.split(rows):
            yield from _pieces(part[0] if part.shape[0] == 1 else part)


def read_tensors(path: str | os.PathLike[str], form: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file of the form named, mapped and not read into memory, and its facts. All checksums are verified.

    Raises:
        CacheFileError: there is no such file, or it is truncated, corrupt, or of another form.
    """
    if not Path(path).is_file():
        raise CacheFileError(f"{path}: {'is no file' if Path(path).exists() else 'no such file'}")
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
            names = list(file.keys())
            _check_form(path, facts.get("format"), form)
            tensors = {name: file.get_tensor(name) for name in names}
        _verify(path, tensors, facts)
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        if isinstance(error, CacheFileError):
            raise
        raise CacheFileError(f"{path}: truncated, corrupt or no cache file at all ({error})") from None
    return tensors, {name: fact for name, fact in facts.items() if name not in ("format", _CRC)}


def _check_form(path: str | os.PathLike[str], found: str | None, wanted: str) -> None:
    if found == wanted:
        return
    family = wanted.rpartition("-")[0]
    if found is not None and found.rpartition("-")[0] == family:
        raise CacheFileError(
            f"{path}: has the form {found!r} and this version reads {wanted!r}; was it saved by another?"
        )
    raise CacheFileError(f"{path}: a safetensors file, but not one with the form {wanted!r}")


def _verify(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    with open(path, "rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
    crc = facts[_CRC]
    wanted = [int(x, 16) for x in crc.split()]
    blank = header.replace(crc.encode(), " ".join(["0" * 8] * len(wanted)).encode())
    names = [name for name in json.loads(header) if name != "__metadata__"]  # in the order they were written
    if zlib.crc32(length + blank) != wanted[0]:
        raise CacheFileError(f"{path}: corrupt (the header's checksum is wrong)")
    for name, checksum in zip(names, wanted[1:], strict=True):
        found = 0
        for piece in _pieces(tensors[name]):
            found = zlib.crc32(_bytes(piece), found)
        if found != checksum:
            raise CacheFileError(f"{path}: corrupt (the checksum of {name} is wrong)")
