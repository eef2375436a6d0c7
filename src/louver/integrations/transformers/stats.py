"""What the decode steps of a cache read and what they certified, as running totals.

Each attended layer adds a handful of sums that stay on the device, a few steps at a time; nothing synchronises until somebody
asks. Memory does not grow with the number of steps, unless a history is asked for.
"""

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from louver.attention.dense import DenseResult, dense_stats
from louver.attention.packed import Form, PackedResult
from louver.protocols import AttendResult, StepStats

T = TypeVar("T")
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
        self._totals = _Totals()

    def add(self, layer_idx: int, result: AttendResult) -> None:
        """Count one decode step of one layer."""
        self._totals.add(layer_idx, result)
        if self.history.maxlen:
            self.history.append((layer_idx, result.stats))

    def clear(self) -> None:
        """Forget everything counted so far."""
        self.history.clear()
        self._totals = _Totals()
        self.num_dense_calls = 0

    def summary(self) -> Summary:
        """Totals over all layers."""
        return Summary(**self._totals.figures())

    def per_layer(self) -> list[LayerSummary]:
        """Totals of each layer that attended at least once, in order."""
        return [LayerSummary(layer_idx=i, **self._totals.figures(i)) for i in self._totals.layers()]

    def __repr__(self) -> str:
        s = self.summary()
        if s.num_steps == 0:
            return "DecodeStats(no decode step yet)"
        return (
            f"DecodeStats({s.num_steps} layer steps, {s.bytes_fraction:.1%} of dense bytes; keys {s.exact_fraction:.1%} exact, "
            f"{s.coarse_fraction:.1%} coarse, {s.unread_fraction:.1%} unread; relative certificate "
            f"{s.certificate_mean:.2g} mean, {s.certificate_worst:.2g} worst)"
        )


# Steps of a layer whose figures wait until their sums are taken together, those of all layers at once: layer by layer it would take the
# host 1 ms each, and step by step longer than a short step.
_PENDING = 64
_PENDING_BYTES = 1 << 20  # of a layer's outputs, for large batches


class _Figures(NamedTuple):
    """What the totals need of a result; not the result, which may hold the whole cache."""

    stats: StepStats
    out: Tensor
    certificate: Tensor
    dropped_mass_bound: Tensor


class _Dense(NamedTuple):
    """Of a dense step, whose certificates are 0."""

    read: tuple[Tensor, int, int]  # arguments of dense_stats
    num_outputs: int


class _Sums(NamedTuple):
    """Of some layers: sums of COUNTS and, behind them, of index_bytes, int64; sums and maxima of relative certificate and dropped mass bound, float64."""

    counted: Tensor  # [layers, columns]
    bounds: Tensor  # [layers, 2]
    worst: Tensor  # [layers, 2]

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(self.counted + other.counted, self.bounds + other.bounds, torch.maximum(self.worst, other.worst))


class _Totals:
    """Sums and maxima of every layer, as small device tensors."""

    def __init__(self) -> None:
        self._steps: Counter[int] = Counter()
        self._outputs: Counter[int] = Counter()
        self._sums: dict[tuple[tuple[int, ...], "_Kind"], _Sums] = {}
        self._waiting: list[tuple[int, PackedResult | _Figures | _Dense]] = []
        self._waiting_bytes = 0

    def add(self, layer_idx: int, result: AttendResult) -> None:
        out = result.out
        if isinstance(result, PackedResult):
            kept = result
        elif isinstance(result, DenseResult):
            kept = _Dense(result.read, out.shape[0] * out.shape[1])
        else:
            kept = _Figures(result.stats, out, result.certificate, result.dropped_mass_bound)
        self._waiting.append((layer_idx, kept))
        self._waiting_bytes += out.nbytes
        layers = len(self._steps) or 1
        if len(self._waiting) >= _PENDING * layers or self._waiting_bytes > _PENDING_BYTES * layers:
            self.settle()

    def settle(self) -> None:
        """Take in the figures that wait, those of one kind together."""
        waiting, self._waiting, self._waiting_bytes = self._waiting, [], 0
        forms: dict[int, Form] = {}  # by id: to hash a form for every result takes as long as all the rest
        packed: dict[int, dict[int, list[PackedResult]]] = {}
        dense: dict[tuple[int, int, int, int, torch.device], dict[int, list[_Dense]]] = {}
        figures: dict[tuple, list[_Figures]] = {}
        for layer, one in waiting:
            self._steps[layer] += 1
            if isinstance(one, PackedResult):
                forms[id(one.form)] = one.form
                packed.setdefault(id(one.form), {}).setdefault(layer, []).append(one)
            elif isinstance(one, _Dense):
                lengths, num_kv_heads, head_dim = one.read
                key = (len(lengths), one.num_outputs, num_kv_heads, head_dim, lengths.device)
                dense.setdefault(key, {}).setdefault(layer, []).append(one)
            else:
                figures.setdefault((layer, _Kind.of(one.stats), one.stats.index_bytes is None), []).append(one)
        equal: dict[tuple[Form, torch.device], dict[int, list[PackedResult]]] = {}
        for of, by_layer in packed.items():
            for layer, some in by_layer.items():  # each on one device
                equal.setdefault((forms[of], some[0].out.device), {}).setdefault(layer, []).extend(some)
        for (form, _), by_layer in equal.items():
            for layers, some in _as_many(by_layer):
                parts = {k: x.flatten(0, 1) for k, x in form.unpack(torch.stack([x.packed for x in some])).items()}
                self._take(layers, [_Figures(form.stats(parts), *(parts[name] for name in _Figures._fields[1:]))])
        for (_, num_outputs, num_kv_heads, head_dim, _), by_layer in dense.items():
            for layers, some in _as_many(by_layer):  # as many rows in each: layers may be a step apart
                lengths = [x.read[0] for x in some]
                nothing = torch.zeros(len(layers), 2, dtype=torch.float64, device=lengths[0].device)
                for layer in layers:
                    self._outputs[layer] += num_outputs * len(some) // len(layers)
                self._keep(layers, dense_stats(torch.cat(lengths), num_kv_heads, head_dim), nothing, nothing)
        for (layer, *_), some in figures.items():
            self._take((layer,), some)

    def _take(self, layers: tuple[int, ...], some: list[_Figures]) -> None:
        """Figures of layers, those of one behind those of the other, as many rows of each."""
        each = zip(*((x.out, x.certificate, x.dropped_mass_bound) for x in some), strict=True)
        outs, certificates, dropped = (_joined([x.flatten(0, 1) for x in one]) for one in each)
        index_bytes = [x.stats.index_bytes.flatten() for x in some if x.stats.index_bytes is not None]
        table = _joined([x.stats.table.flatten(0, 1) for x in some])
        norm = outs.float().norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        # Of an output that is not finite nothing is certified.
        relative = torch.nan_to_num(certificates / norm, nan=torch.inf, posinf=torch.inf)
        dropped = torch.nan_to_num(dropped, nan=1.0)
        bounds = torch.stack([relative, dropped], -1).double().unflatten(0, (len(layers), -1))
        for layer in layers:
            self._outputs[layer] += bounds.shape[1]
        stats = replace(
            some[0].stats, table=table[None], index_bytes=_joined(index_bytes)[None] if index_bytes else None
        )
        self._keep(layers, stats, bounds.sum(1), bounds.amax(1))

    def _keep(self, layers: tuple[int, ...], stats: StepStats, bounds: Tensor, worst: Tensor) -> None:
        counted = stats.table.reshape(len(layers), -1, stats.table.shape[-1]).sum(1)
        more = counted.new_zeros(len(layers), 1)
        if stats.index_bytes is not None:
            more = stats.index_bytes.reshape(len(layers), -1).sum(1, keepdim=True).long()
        key, sums = (layers, _Kind.of(stats)), _Sums(torch.cat([counted, more], 1), bounds, worst)
        held = self._sums.get(key)
        self._sums[key] = sums if held is None else held.plus(sums)

    def layers(self) -> list[int]:
        """Those that attended, in order."""
        return sorted({*self._steps, *(layer for layer, _ in self._waiting)})

    def figures(self, layer: int | None = None) -> dict[str, Any]:
        """The fields of a Summary, of one layer or of all."""
        self.settle()
        counts = dict.fromkeys(_COUNTS, 0)
        total, worst = [0.0, 0.0], [0.0, 0.0]
        for (layers, kind), sums in self._sums.items():
            if layer is not None and layer not in layers:
                continue
            rows = slice(None) if layer is None else slice(layers.index(layer), layers.index(layer) + 1)
            counted, bounds, most = (x[rows].cpu() for x in sums)
            stats = kind.stats(counted.sum(0))
            counts = {name: counts[name] + int(getattr(stats, name)) for name in _COUNTS}
            total = [a + b for a, b in zip(total, bounds.sum(0).tolist(), strict=True)]
            worst = [max(a, b) for a, b in zip(worst, most.amax(0).tolist(), strict=True)]
        outputs = self._outputs.total() if layer is None else self._outputs[layer]
        mean = [x / max(1, outputs) for x in total]
        return counts | {
            "num_steps": self._steps.total() if layer is None else self._steps[layer],
            "certificate_mean": mean[0],
            "certificate_worst": worst[0],
            "dropped_mass_bound_mean": mean[1],
            "dropped_mass_bound_worst": worst[1],
        }


def _as_many(by_layer: dict[int, list[T]]) -> Iterator[tuple[tuple[int, ...], list[T]]]:
    """Layers that have as many of something each, and all that they have, those of one behind those of the other."""
    alike: dict[int, list[int]] = {}
    for layer, some in by_layer.items():
        alike.setdefault(len(some), []).append(layer)
    for layers in alike.values():
        yield tuple(layers), [one for layer in layers for one in by_layer[layer]]


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
