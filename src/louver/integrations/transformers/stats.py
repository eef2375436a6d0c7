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
_PENDING = 16


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
        self.counts: Tensor | None = None  # int64, in the order of _COUNTS
        self.sums: Tensor | None = None  # float64: relative certificate, dropped mass bound
        self.worst: Tensor | None = None
        self._pending: list[_Figures] = []
        self._dense: list[tuple[Tensor, int, int]] = []  # arguments of dense_stats

    def add(self, result: AttendResult) -> None:
        self.num_steps += 1
        self.num_outputs += result.out.shape[0] * result.out.shape[1]
        if isinstance(result, DenseResult):  # its certificates are 0
            self._dense.append(result.read)
            if len(self._dense) >= _PENDING:
                self.settle()
            return
        self._pending.append(_Figures(result.stats, result.out, result.certificate, result.dropped_mass_bound))
        if len(self._pending) >= _PENDING:
            self.settle()

    def settle(self) -> None:
        """Take in the figures that wait, those of one kind together."""
        kinds: dict[tuple, list[_Figures]] = {}
        for one in self._pending:
            kinds.setdefault((one.stats.byte_weights, one.stats.drops, one.stats.index_bytes is None), []).append(one)
        shapes: dict[tuple[int, int], list[Tensor]] = {}
        for length, *shape in self._dense:
            shapes.setdefault((shape[0], shape[1]), []).append(length)
        self._pending, self._dense = [], []
        for some in kinds.values():
            self._take(some)
        for shape, lengths in shapes.items():
            nothing = torch.zeros(2, dtype=torch.float64, device=lengths[0].device)
            self._add(_counts_of(dense_stats(torch.cat(lengths), *shape)), nothing, nothing)

    def _take(self, some: list["_Figures"]) -> None:
        figures = zip(*((x.out, x.certificate, x.dropped_mass_bound) for x in some), strict=True)
        outs, certificates, dropped = (torch.cat([x.flatten(0, 1) for x in each]) for each in figures)
        index_bytes = [x.stats.index_bytes for x in some if x.stats.index_bytes is not None]
        stats = replace(
            some[0].stats,
            table=torch.cat([x.stats.table.flatten(0, 1) for x in some])[None],
            index_bytes=torch.cat([x.flatten() for x in index_bytes])[None] if index_bytes else None,
        )
        norm = outs.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        bounds = torch.stack([certificates / norm, dropped]).double()
        self._add(_counts_of(stats), bounds.sum(1), bounds.amax(1))

    def _add(self, counts: Tensor, sums: Tensor, worst: Tensor) -> None:
        if self.counts is None or self.sums is None or self.worst is None:
            self.counts, self.sums, self.worst = counts, sums, worst
        else:
            self.counts, self.sums = self.counts + counts, self.sums + sums
            self.worst = torch.maximum(self.worst, worst)

    @classmethod
    def merged(cls, parts: list["_Totals"]) -> "_Totals":
        whole = cls()
        for part in parts:
            part.settle()
            if part.counts is not None and part.sums is not None and part.worst is not None:
                whole._add(part.counts.cpu(), part.sums.cpu(), part.worst.cpu())
                whole.num_steps += part.num_steps
                whole.num_outputs += part.num_outputs
        return whole

    def figures(self) -> dict:
        self.settle()
        if self.counts is None or self.sums is None or self.worst is None:
            counts, mean, worst = [0] * len(_COUNTS), [0.0, 0.0], [0.0, 0.0]
        else:
            counts, worst = self.counts.tolist(), self.worst.tolist()
            mean = (self.sums / self.num_outputs).tolist()
        return dict(zip(_COUNTS, counts, strict=True)) | {
            "num_steps": self.num_steps,
            "certificate_mean": mean[0],
            "certificate_worst": worst[0],
            "dropped_mass_bound_mean": mean[1],
            "dropped_mass_bound_worst": worst[1],
        }


def _counts_of(stats: StepStats) -> Tensor:
    """The sums named in _COUNTS, int64."""
    return torch.stack([getattr(stats, name).sum() for name in _COUNTS])
