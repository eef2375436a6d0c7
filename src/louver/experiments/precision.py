"""The precision experiment: how far the attention output is off, against the bytes a step reads, on a real capture.

Louver's own policies run through SketchIndex and ``attend`` as they would in a model, position by position; the truth is float64.
Beside them: attention over the true top only (an oracle), and caches in fewer bits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.attention import attend
from louver.attention.asked import num_asked_violations
from louver.errors import PolicyError
from louver.experiments.baselines import Fp8, Kivi4, OracleDrop
from louver.experiments.capture import Capture, Layer
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.fitting import Fitted, curves
from louver.experiments.truth import attention, sketch_of
from louver.kernels import resolve_backend
from louver.policies import parse
from louver.protocols import AttendResult, Policy

_PRECISION = ("exact:0.002", "exact:0.01", "exact:0.01+unread:0.02", "exact:0.03")
_BASELINES = ("drop:0.01", "drop:0.1", "fp8", "kivi4")
POLICIES = (*_PRECISION, "error:0.2", "error:0.1", *_BASELINES)
Baseline = OracleDrop | Fp8 | Kivi4


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare: a row per policy. Every field but backend changes results."""

    capture: Path = option(help="What `louver capture` wrote.")
    policies: tuple[str, ...] = option(POLICIES, help="Policies, and drop:F, fp8, kivi4, fit:PRICE, fit-layers:PRICE.")
    backend: str = option("auto", help="Which kernels; auto is the fastest here.")  # speed only

    @property
    def chosen(self) -> list[Policy | Baseline | Fitted]:
        """The policies and baselines of the rows.

        Raises:
            PolicyError: one can't be read.
        """
        default = self.policies == POLICIES  # of which this version may lack some
        return [_read(spec) for spec in self.policies if not default or _known(spec)]


def read(spec: str) -> Policy | Baseline:
    """A policy, or one of the baselines ``drop:F``, ``fp8``, ``kivi4``."""
    if spec in ("fp8", "kivi4"):
        return Fp8() if spec == "fp8" else Kivi4()
    name, _, argument = spec.partition(":")
    if name == "drop":
        try:
            return OracleDrop(fraction=float(argument))
        except ValueError:
            raise PolicyError(f"{spec!r} can't be read; usage: drop:F, a share of the keys") from None
    return parse(spec)


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """Rows, and rows per layer.

    Raises:
        InputFileError: the capture can't be read.
        PolicyError: a policy can't be read.
        BackendError: the backend is not there.
    """
    chosen = config.chosen
    capture = Capture.load(config.capture)
    backend = resolve_backend(config.backend)
    head = capture.shape_fields() | {"index": "sketch", "backend": backend, "device": "cpu"}
    found: list[list[tuple[int, str, Figures]]] = [[] for _ in chosen]
    for done, (i, layer) in enumerate(capture.layers.items()):
        served = _served(capture, layer, chosen, backend)
        for place, (one, figures) in enumerate(measure_layer(capture, layer, served, backend)):
            found[place].append((i, one.spec, figures))
        on_progress("Precision, layer by layer", done + 1, len(capture.layers))
    rows, layer_rows = [], []
    for one, parts in zip(chosen, found, strict=True):
        fields = head | {"policy": one.spec, "guarantee": guarantee(one)}
        rows.append(fields | Figures.joined([f for *_, f in parts]).row())
        layer_rows += [fields | {"layer": i, "served": spec} | f.row() for i, spec, f in parts]
    return rows, {"rows_per_layer": layer_rows}


def _read(spec: str) -> Policy | Baseline | Fitted:
    """What ``read`` reads, and policies that every layer or head chooses for itself."""
    name, _, price = spec.partition(":")
    if name not in ("fit", "fit-layers"):
        return read(spec)
    try:
        return Fitted(price=float(price), by_head=name == "fit")
    except ValueError:
        raise PolicyError(f"{spec!r} can't be read; usage: {name}:PRICE, the error that all bytes are worth") from None


def _served(
    capture: Capture, layer: Layer, chosen: list[Policy | Baseline | Fitted], backend: str
) -> list[Policy | Baseline]:
    """What a layer is served with: the policies themselves, or what the layer's heads choose at a price."""
    if not any(isinstance(one, Fitted) for one in chosen):
        return [one for one in chosen if not isinstance(one, Fitted)]
    known = curves(capture, layer, backend)
    return [parse(known.at(one.price, one.by_head)) if isinstance(one, Fitted) else one for one in chosen]


def guarantee(one: Policy | Baseline | Fitted) -> str:
    """What a row may claim."""
    return one.guarantee


def measure_layer(
    capture: Capture, layer: Layer, chosen: list[Policy | Baseline], backend: str, stride: int = 16
) -> Iterator[tuple[Policy | Baseline, "Figures"]]:
    """The figures of each policy over the measured queries of one layer, in order."""
    index = sketch_of(capture, layer, backend)
    coded = {
        one.spec: one.coded(layer.keys.double(), layer.values.double())
        for one in chosen
        if isinstance(one, Fp8 | Kivi4)
    }
    parts: list[list[Figures]] = [[] for _ in chosen]
    queries = layer.queries[:, capture.measured(stride)].float()
    for place, position in enumerate(capture.query_positions[capture.measured(stride)].tolist()):
        q, scale = queries[:, place], capture.softmax_scale
        keys, values = (x[:, : position + 1].double() for x in (layer.keys, layer.values))
        scores, truth = attention(q, keys, values, scale)
        here = index.prefix(position + 1)
        for one, mine in zip(chosen, parts, strict=True):
            if isinstance(one, OracleDrop):
                grouped = scores.unflatten(0, (keys.shape[0], -1))
                out = one.output(grouped, values, scale).flatten(0, 1)
                figures = Figures.of(out, truth, one.bytes_fraction(one.kept(grouped).any(1)))
            elif isinstance(one, Fp8 | Kivi4):
                k, v = (x[:, : position + 1] for x in coded[one.spec])
                figures = Figures.of(attention(q, k, v, scale)[1], truth, one.bytes_fraction(keys.shape[2]))
            else:
                result = attend(q[None], here, policy=one, softmax_scale=scale, keep_best=True)
                figures = Figures.of(result.out[0].double(), truth, result.stats.bytes_fraction, result, one)
            mine.append(figures)
    yield from zip(chosen, map(Figures.joined, parts), strict=True)


def _known(spec: str) -> bool:
    try:
        _read(spec)
    except PolicyError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Relative errors per query and head, and what they cost."""

    error: Tensor
    bound: Tensor  # NaN where there is no certificate
    violations: int  # where the truth exceeded its bound
    missed: int  # where a certificate exceeded what was asked for
    bytes_fraction: list[float]
    exact_fraction: list[float]
    head_bytes_fraction: list[Tensor] = field(default_factory=list)  # [num_kv_heads] per query, of Louver's policies

    @classmethod
    def of(
        cls,
        out: Tensor,
        truth: Tensor,
        bytes_fraction: float,
        result: AttendResult | None = None,
        policy: Policy | None = None,
    ) -> "Figures":
        norm = truth.norm(dim=-1)
        off = (out - truth).norm(dim=-1)
        head_bytes = []
        if result is None:
            bound, violations, exact = torch.full_like(off, torch.nan), 0, []
        else:
            allowed = (result.certificate + result.arithmetic_bound)[0].double()
            bound, violations = allowed / norm, int((off > allowed).sum())
            exact = [result.stats.fraction("exact")]
            head_bytes = [(result.stats.bytes_read / result.stats.bytes_dense)[0]]
        missed = 0 if result is None or policy is None else num_asked_violations(policy, result)
        return cls(
            error=off / norm,
            bound=bound,
            violations=violations,
            missed=missed,
            bytes_fraction=[bytes_fraction],
            exact_fraction=exact,
            head_bytes_fraction=head_bytes,
        )

    @classmethod
    def joined(cls, parts: list["Figures"]) -> "Figures":
        return cls(
            error=torch.cat([p.error for p in parts]),
            bound=torch.cat([p.bound for p in parts]),
            violations=sum(p.violations for p in parts),
            missed=sum(p.missed for p in parts),
            bytes_fraction=[x for p in parts for x in p.bytes_fraction],
            exact_fraction=[x for p in parts for x in p.exact_fraction],
            head_bytes_fraction=[x for p in parts for x in p.head_bytes_fraction],
        )

    def row(self) -> dict[str, Any]:
        certified = not bool(self.bound.isnan().any())
        return {
            "bytes_fraction": sum(self.bytes_fraction) / len(self.bytes_fraction),
            "exact_fraction": sum(self.exact_fraction) / len(self.exact_fraction) if self.exact_fraction else None,
            "output_error": self.error.mean().item(),
            "output_error_p99": self.error.quantile(0.99).item(),
            "output_error_bound": self.bound.mean().item() if certified else None,
            "output_error_bound_median": self.bound.median().item() if certified else None,
            "num_bound_violations": self.violations if certified else None,
            "num_asked_violations": self.missed if certified else None,
        }
