"""A step's output and evidence in one piece of memory: handed out as it is, read apart only where somebody asks."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from louver.kernels.ops import TierOutput
from louver.protocols import AttendResult, StepStats

UNIT = torch.int16  # the piece is counted in; every part begins at a multiple of its own size
EVIDENCE = ("lse", "certificate", "arithmetic_bound", "dropped_mass_bound", "tau")
ALIGNED_UNITS = 4  # of an int64


class Part(NamedTuple):
    """One tensor of a piece."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    first: int  # units
    units: int


class Form(NamedTuple):
    """Where the parts of a piece lie, and what its counts mean (StepStats)."""

    parts: tuple[Part, ...]
    out: tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides and offset in a piece of the output's dtype
    byte_weights: tuple[int, ...]
    head_dim: int
    drops: bool

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """The parts of pieces [*some, size], [*some, ...] each, as views."""
        units = packed.view(UNIT)
        return {
            part.name: units[..., part.first : part.first + part.units].view(part.dtype).unflatten(-1, part.shape)
            for part in self.parts
        }

    def stats(self, parts: dict[str, Tensor]) -> StepStats:
        """What the step read, from its parts."""
        return StepStats(
            table=parts["counts"],
            byte_weights=self.byte_weights,
            head_dim=self.head_dim,
            drops=self.drops,
            index_bytes=parts.get("index_bytes"),
        )


def form_of(
    given: dict[str, tuple[torch.dtype, tuple[int, ...]]], byte_weights: tuple[int, ...], head_dim: int, drops: bool
) -> tuple[Form, int]:
    """The form of a piece that holds tensors of these dtypes and shapes one behind the other, and its units."""
    parts, first = [], 0
    for name, (dtype, shape) in given.items():
        units = math.prod(shape) * dtype.itemsize // UNIT.itemsize
        parts.append(Part(name, dtype, shape, first, units))
        first += units
    (out,) = (part for part in parts if part.name == "out")
    strides = (math.prod(out.shape[1:]), out.shape[2], 1)
    at = out.first * UNIT.itemsize // out.dtype.itemsize
    form = Form(tuple(parts), (out.shape, strides, at), byte_weights, head_dim, drops)
    return form, first + -first % ALIGNED_UNITS


def pack(
    step: TierOutput, index_bytes: Tensor | None, byte_weights: tuple[int, ...], head_dim: int, drops: bool
) -> tuple[Tensor, Form]:
    """A step in one piece, a 1-D tensor in the output's dtype, and its form; index_bytes are those that the counts don't cover."""
    given = {"counts": step.counts, "index_bytes": index_bytes, "out": step.out}
    given |= {name: getattr(step, name) for name in EVIDENCE}
    held = {name: x for name, x in given.items() if x is not None}
    form, size = form_of({n: (x.dtype, tuple(x.shape)) for n, x in held.items()}, byte_weights, head_dim, drops)
    pieces = [x.reshape(-1).view(UNIT) for x in held.values()]
    pieces.append(pieces[0].new_zeros(size - sum(x.numel() for x in pieces)))
    return torch.cat(pieces).view(step.out.dtype), form


class PackedResult(AttendResult):
    """The result of a step in one piece: ``out`` at once, the rest when it is asked for.

    Args:
        piece: this result's own, a tensor or what can become one (DLPack).
        form: of the piece.
        out: the piece's output, where that is at hand.
    """

    form: Form

    def __init__(self, piece: Any, form: Form, out: Tensor | None = None) -> None:
        if out is None:
            out = piece.as_strided(*form.out)
        self.__dict__.update(out=out, form=form, _piece=piece)

    @property
    def packed(self) -> Tensor:
        """The piece: output and evidence."""
        piece = self.__dict__["_piece"]
        if not isinstance(piece, Tensor):
            piece = self.__dict__["_piece"] = torch.from_dlpack(piece)
        return piece

    def __reduce__(self) -> tuple:
        return PackedResult, (self.packed, self.form, self.out)

    def __getattr__(self, name: str) -> Any:
        """The evidence and the statistics, kept once they were asked for."""
        form: Form | None = self.__dict__.get("form")
        if form is None or name not in (*EVIDENCE, "stats"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        parts = form.unpack(self.packed)
        self.__dict__.update({each: parts[each] for each in EVIDENCE}, stats=form.stats(parts))
        return self.__dict__[name]
