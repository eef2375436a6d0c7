"""A step's output and evidence in one piece of memory: handed out by one copy, read apart only where somebody asks."""

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


def pack(
    step: TierOutput, index_bytes: Tensor | None, byte_weights: tuple[int, ...], head_dim: int, drops: bool
) -> tuple[Tensor, Form]:
    """A step in one piece, a 1-D tensor in the output's dtype, and its form; index_bytes are those that the counts don't cover."""
    given = {"counts": step.counts, "index_bytes": index_bytes, "out": step.out}
    given |= {name: getattr(step, name) for name in EVIDENCE}
    parts, pieces, first = [], [], 0
    for name, x in given.items():
        if x is None:
            continue
        pieces.append(x.reshape(-1).view(UNIT))
        units = pieces[-1].numel()
        parts.append(Part(name, x.dtype, tuple(x.shape), first, units))
        first += units
    pieces.append(pieces[0].new_zeros(-first % ALIGNED_UNITS))
    at = next(part.first for part in parts if part.name == "out") * UNIT.itemsize // step.out.element_size()
    out = (tuple(step.out.shape), step.out.contiguous().stride(), at)
    return torch.cat(pieces).view(step.out.dtype), Form(tuple(parts), out, byte_weights, head_dim, drops)


class PackedResult(AttendResult):
    """The result of a step in one piece: ``out`` at once, the rest when it is asked for."""

    packed: Tensor  # this result's own
    form: Form

    def __init__(self, packed: Tensor, form: Form) -> None:
        out = packed.as_strided(*form.out)
        self.__dict__.update(out=out, exact_mask=None, packed=packed, form=form)

    def __getattr__(self, name: str) -> Any:
        """The evidence and the statistics, kept once they were asked for."""
        form: Form | None = self.__dict__.get("form")
        if form is None or name not in (*EVIDENCE, "stats"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        parts = form.unpack(self.__dict__["packed"])
        self.__dict__.update({each: parts[each] for each in EVIDENCE}, stats=form.stats(parts))
        return self.__dict__[name]
