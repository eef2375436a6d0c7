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
from louver.errors import PolicyError
from louver.experiments.baselines import Fp8, Kivi4, OracleDrop
from louver.experiments.capture import Capture, Layer
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.index.sketch import SketchIndex
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
    policies: tuple[str, ...] = option(POLICIES, help="Policies, and drop:F, fp8, kivi4.")
    backend: str = option("auto", help="Which kernels; auto is the fastest here.")  # speed only

    @property
    def chosen(self) -> list[Policy | Baseline]:
        """The policies and baselines of the rows.

        Raises:
            PolicyError: one can't be read.
        """
        default = self.policies == POLICIES  # of which this version may lack some
        return [read(spec) for spec in self.policies if not default or _known(spec)]


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
    found: dict[str, list[tuple[int, Figures]]] = {one.spec: [] for one in chosen}
    for done, (i, layer) in enumerate(capture.layers.items()):
        for one, figures in measure_layer(capture, layer, chosen, backend):
            found[one.spec].append((i, figures))
        on_progress("Precision, layer by layer", done + 1, len(capture.layers))
    rows, layer_rows = [], []
    for one in chosen:
        fields = head | {"policy": one.spec, "guarantee": guarantee(one)}
        rows.append(fields | Figures.joined([f for _, f in found[one.spec]]).row())
        layer_rows += [fields | {"layer": i} | f.row() for i, f in found[one.spec]]
    return rows, {"rows_per_layer": layer_rows}


def guarantee(one: Policy | Baseline) -> str:
    """What a row may claim."""
    return one.guarantee


def measure_layer(
    capture: Capture, layer: Layer, chosen: list[Policy | Baseline], backend: str, stride: int = 16
) -> Iterator[tuple[Policy | Baseline, "Figures"]]:
    """The figures of each policy over the measured queries of one layer."""
    index = sketch_of(capture, layer, backend)
    coded = {
        one.spec: one.coded(layer.keys.double(), layer.values.double())
        for one in chosen
        if isinstance(one, Fp8 | Kivi4)
    }
    parts: dict[str, list[Figures]] = {one.spec: [] for one in chosen}
    queries = layer.queries[:, capture.measured(stride)].float()
    for place, position in enumerate(capture.query_positions[capture.measured(stride)].tolist()):
        q, scale = queries[:, place], capture.softmax_scale
        keys, values = (x[:, : position + 1].double() for x in (layer.keys, layer.values))
        scores, truth = attention(q, keys, values, scale)
        here = index.prefix(position + 1)
        for one in chosen:
            if isinstance(one, OracleDrop):
                grouped = scores.unflatten(0, (keys.shape[0], -1))
                out = one.output(grouped, values, scale).flatten(0, 1)
                figures = Figures.of(out, truth, one.bytes_fraction(one.kept(grouped).any(1)))
            elif isinstance(one, Fp8 | Kivi4):
                k, v = (x[:, : position + 1] for x in coded[one.spec])
                figures = Figures.of(attention(q, k, v, scale)[1], truth, one.bytes_fraction(keys.shape[2]))
            else:
                result = attend(q[None], here, policy=one, softmax_scale=scale, keep_best=True)
                figures = Figures.of(result.out[0].double(), truth, result.stats.bytes_fraction, result)
            parts[one.spec].append(figures)
    for one in chosen:
        yield one, Figures.joined(parts[one.spec])


def attention(q: Tensor, keys: Tensor, values: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Scores [num_q_heads, n] and outputs [num_q_heads, head_dim] of q [num_q_heads, head_dim] in float64."""
    scores = q.double().unflatten(0, (keys.shape[0], -1)) @ keys.mT
    return scores.flatten(0, 1), ((scores * softmax_scale).softmax(-1) @ values).flatten(0, 1)


def sketch_of(capture: Capture, layer: Layer, backend: str) -> SketchIndex:
    """One index over all keys, its metric from the fitting queries."""
    keys, values = layer.keys[None].float(), layer.values[None].float()
    return SketchIndex.build(keys, values, layer.queries[None, :, capture.fitting()].float(), backend=backend)


def _known(spec: str) -> bool:
    try:
        read(spec)
    except PolicyError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Relative errors per query and head, and what they cost."""

    error: Tensor
    bound: Tensor  # NaN where there is no certificate
    violations: int
    bytes_fraction: list[float]
    exact_fraction: list[float]
    head_bytes_fraction: list[Tensor] = field(default_factory=list)  # [num_kv_heads] per query, of Louver's policies

    @classmethod
    def of(cls, out: Tensor, truth: Tensor, bytes_fraction: float, result: AttendResult | None = None) -> "Figures":
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
        return cls(
            error=off / norm,
            bound=bound,
            violations=violations,
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
        }
