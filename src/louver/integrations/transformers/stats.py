"""What the decode steps of a cache read and what they certified, as running totals.

Each attended layer adds a handful of sums that stay on the device, a few steps at a time; nothing synchronises until somebody
asks. Memory does not grow with the number of steps, unless a history is asked for.
"""

from collections import deque
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from louver.attention.dense import DenseResult, dense_stats
from louver.attention.packed import Form, PackedResult
from louver.protocols import AttendResult, StepStats

_COUNTS = ("num_keys", "num_scanned", "num_exact", "num_coarse", "num_unread", "bytes_read", "bytes_dense")


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Totals over decode steps, rows and heads. Counts are stored, ratios derived."""

    num_steps: int  # attended layers x steps
    num_keys: int
    num_scanned: int
    num_exact: int
    num_coarse: int
    num_unread: int
    bytes_read: int
    bytes_dense: int
    certificate_mean: float  # relative: certificate / |out|, over rows, query heads and steps
    certificate_worst: float
    dropped_mass_bound_mean: float
    dropped_mass_bound_worst: float

    @property
    def bytes_fraction(self) -> float:
        """Bytes read over bytes dense attention reads from a 16-bit cache."""
        return self.bytes_read / max(1, self.bytes_dense)

    @property
    def exact_fraction(self) -> float:
        """Keys attended exactly over all valid keys."""
        return self.num_exact / max(1, self.num_keys)

    @property
    def coarse_fraction(self) -> float:
        """Keys attended through a sketched key and a sketched value over all valid keys."""
        return self.num_coarse / max(1, self.num_keys)

    @property
    def unread_fraction(self) -> float:
        """Keys attended through a sketched key and the mean value over all valid keys."""
        return self.num_unread / max(1, self.num_keys)

    @property
    def scanned_fraction(self) -> float:
        """Keys read in full over all valid keys."""
        return self.num_scanned / max(1, self.num_keys)


@dataclass(frozen=True, kw_only=True)
class LayerSummary(Summary):
    """The totals of one layer."""

    layer_idx: int


class DecodeStats:
    """Running totals of every layer's decode steps.

    Args:
        history: keep the StepStats of this many attended layers x steps, newest last (0: none).
    """

    def __init__(self, history: int = 0) -> None:
        self.history: deque[tuple[int, StepStats]] = deque(maxlen=history)
        self.num_dense_calls = 0  # decode calls served by plain SDPA, because of a mask that is no left padding
        self._totals: dict[int, _Totals] = {}

    def add(self, layer_idx: int, result: AttendResult) -> None:
        """Count one decode step of one layer."""
        self._totals.setdefault(layer_idx, _Totals()).add(result)
        if self.history.maxlen:
            self.history.append((layer_idx, result.stats))

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.history.clear()
        self._totals.clear()
        self.num_dense_calls = 0

    def summary(self) -> Summary:
        """Totals over all layers."""
        return Summary(**_Totals.merged(list(self._totals.values())).figures())

    def per_layer(self) -> list[LayerSummary]:
        """Totals of each layer that attended at least once, in order."""
        return [LayerSummary(layer_idx=i, **self._totals[i].figures()) for i in sorted(self._totals)]

    def __repr__(self) -> str:
        s = self.summary()
        if s.num_steps == 0:
            return "DecodeStats(no decode step yet)"
        return (
            f"DecodeStats({s.num_steps} layer steps, {s.bytes_fraction:.1%} of dense bytes; keys {s.exact_fraction:.1%} exact, "
            f"{s.coarse_fraction:.1%} coarse, {s.unread_fraction:.1%} unread; relative certificate "
            f"{s.certificate_mean:.2g} mean, {s.certificate_worst:.2g} worst)"
        )


# Steps whose figures wait until their sums are taken together: one by one they would take longer than a short step.
_PENDING = 64
_PENDING_BYTES = 1 << 20  # of outputs, for large batches


class _Figures(NamedTuple):
    """What the totals need of a result; not the result, which may hold the whole cache."""

    stats: StepStats
    out: Tensor
    certificate: Tensor
    dropped_mass_bound: Tensor


class _Totals:
    """Sums and maxima of one layer, as small device tensors."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_outputs = 0
        self.tables: dict[_Kind, Tensor] = {}  # int64: the sums of COUNTS, and of index_bytes
        self.sums: Tensor | None = None  # float64: relative certificate, dropped mass bound
        self.worst: Tensor | None = None
        self._pending: list[_Figures] = []
        self._packed: dict[Form, list[PackedResult]] = {}
        self._dense: list[tuple[Tensor, int, int]] = []  # arguments of dense_stats
        self._waiting = 0
        self._waiting_bytes = 0

    def add(self, result: AttendResult) -> None:
        self.num_steps += 1
        self.num_outputs += result.out.shape[0] * result.out.shape[1]
        if isinstance(result, DenseResult):  # its certificates are 0
            self._dense.append(result.read)
        elif isinstance(result, PackedResult):
            self._packed.setdefault(result.form, []).append(result)
            self._waiting_bytes += result.out.nbytes
        else:
            self._pending.append(_Figures(result.stats, result.out, result.certificate, result.dropped_mass_bound))
            self._waiting_bytes += result.out.nbytes
        self._waiting += 1
        if self._waiting >= _PENDING or self._waiting_bytes > _PENDING_BYTES:
            self.settle()

    def settle(self) -> None:
        """Take in the figures that wait, those of one kind together."""
        kinds: dict[tuple, list[_Figures]] = {}
        for one in self._pending:
            kinds.setdefault((_Kind.of(one.stats), one.stats.index_bytes is None), []).append(one)
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for length, *shape in self._dense:
            shapes.setdefault((shape[0], shape[1]), []).append(length)
        packed, self._packed = self._packed, {}
        self._pending, self._dense, self._waiting, self._waiting_bytes = [], [], 0, 0
        for some in kinds.values():
            self._take(some)
        for form, pieces in packed.items():
            parts = {name: x.flatten(0, 1) for name, x in form.unpack(torch.stack([x.packed for x in pieces])).items()}
            self._take([_Figures(form.stats(parts), parts["out"], parts["certificate"], parts["dropped_mass_bound"])])
        for shape, lengths in shapes.items():
            nothing = torch.zeros(2, dtype=torch.float64, device=lengths[0].device)
            self._count(dense_stats(torch.cat(lengths), *shape))
            self._bound(nothing, nothing)

    def _take(self, some: list["_Figures"]) -> None:
        figures = zip(*((x.out, x.certificate, x.dropped_mass_bound) for x in some), strict=True)
        outs, certificates, dropped = (_joined([x.flatten(0, 1) for x in each]) for each in figures)
        index_bytes = [x.stats.index_bytes.flatten() for x in some if x.stats.index_bytes is not None]
        table = _joined([x.stats.table.flatten(0, 1) for x in some])
        self._count(
            replace(some[0].stats, table=table[None], index_bytes=_joined(index_bytes)[None] if index_bytes else None)
        )
        norm = outs.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        bounds = torch.stack([certificates / norm, dropped]).double()
        self._bound(bounds.sum(1), bounds.amax(1))

    def _count(self, stats: StepStats) -> None:
        counted = stats.table.sum((0, 1))
        more = counted.new_zeros(1) if stats.index_bytes is None else stats.index_bytes.sum().long()[None]
        self._add_table(_Kind.of(stats), torch.cat([counted, more]))

    def _add_table(self, kind: "_Kind", counted: Tensor) -> None:
        held = self.tables.get(kind)
        self.tables[kind] = counted if held is None else held + counted

    def _bound(self, sums: Tensor, worst: Tensor) -> None:
        if self.sums is None or self.worst is None:
            self.sums, self.worst = sums, worst
        else:
            self.sums, self.worst = self.sums + sums, torch.maximum(self.worst, worst)

    @classmethod
    def merged(cls, parts: list["_Totals"]) -> "_Totals":
        whole = cls()
        for part in parts:
            part.settle()
            for kind, counted in part.tables.items():
                whole._add_table(kind, counted.cpu())
            if part.sums is not None and part.worst is not None:
                whole._bound(part.sums.cpu(), part.worst.cpu())
                whole.num_steps += part.num_steps
                whole.num_outputs += part.num_outputs
        return whole

    def figures(self) -> dict:
        self.settle()
        counts = dict.fromkeys(_COUNTS, 0)
        for kind, counted in self.tables.items():
            stats = kind.stats(counted.cpu())
            counts = {name: counts[name] + int(getattr(stats, name)) for name in _COUNTS}
        if self.sums is None or self.worst is None:
            mean, worst = [0.0, 0.0], [0.0, 0.0]
        else:
            mean, worst = (self.sums / self.num_outputs).tolist(), self.worst.tolist()
        return counts | {
            "num_steps": self.num_steps,
            "certificate_mean": mean[0],
            "certificate_worst": worst[0],
            "dropped_mass_bound_mean": mean[1],
            "dropped_mass_bound_worst": worst[1],
        }


class _Kind(NamedTuple):
    """What counts mean; all that StepStats makes of them is linear, so sums are read like one step's."""

    byte_weights: tuple[int, ...]
    head_dim: int
    drops: bool

    @classmethod
    def of(cls, stats: StepStats) -> "_Kind":
        return cls(stats.byte_weights, stats.head_dim, stats.drops)

    def stats(self, counted: Tensor) -> StepStats:
        """Of the sums of COUNTS and, behind them, of index_bytes."""
        return StepStats(table=counted[None, None, :-1], index_bytes=counted[None, -1:], **self._asdict())


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
