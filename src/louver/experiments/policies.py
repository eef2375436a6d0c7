"""The policies experiment: what every policy keeps, how much that varies, and whether it delivers what it says.

Every policy attends the measured queries of a capture as it would in a model, position by position; the truth is float64. What is
selected is counted per query head: the keys of closed blocks that it treats exactly (those of the open block are exact in any case). ``need_95`` is the smallest share of the keys that holds 95% of the
head's mass, which no policy knows in advance: a policy that follows it spends where attention is diffuse.

Two coefficients of variation (standard deviation over mean of the selected share): over queries and heads, where much of the spread is
the data's own; and, for policies that draw a sample, over seeds at the same query and head, where all of it is the estimator's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from louver.attention import attend
from louver.experiments.baselines import Fp8, Kivi4, OracleDrop
from louver.experiments.capture import Capture, Layer
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.precision import Baseline, Figures, guarantee, read
from louver.experiments.truth import attention, sketch_of
from louver.index.sketch import SketchIndex
from louver.kernels import resolve_backend
from louver.policies import Sampled
from louver.protocols import AttendResult, Policy

POLICIES = (
    "exact:0.002", "exact:0.01", "exact:0.03", "error:0.5", "error:0.2", "error:0.1", "error:0.05", "mass:0.001", "mass:0.01",
    "mass:0.05", "mass:0.1", "topk:80", "budget:0.01", "budget:0.1", "relative:5", "relative:8", "topk:20|mass:0.05", "sample-max",
    "sample-topk:3", "sample-mean-max", "sample-gap", "sample-budget:0.01", "sample-budget:0.1", "drop:0.01", "drop:0.1", "fp8", "kivi4",
)  # fmt: skip
NEED = 0.95  # of the mass
SEEDS = 4  # that a sampling policy is run with


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare: a row per policy. Every field but backend changes results."""

    capture: Path = option(help="What `louver capture` wrote.")
    policies: tuple[str, ...] = option(POLICIES, help="Policies, and drop:F, fp8, kivi4.")
    backend: str = option("auto", help="Which kernels; auto is the fastest here.")  # speed only
    stride: int = option(16, help="Measure every so many of the captured queries.")


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """Rows, and rows per layer.

    Raises:
        InputFileError: the capture can't be read.
        PolicyError: a policy can't be read.
        BackendError: the backend is not there.
    """
    chosen = [read(spec) for spec in config.policies]
    capture = Capture.load(config.capture)
    backend = resolve_backend(config.backend)
    head = capture.shape_fields() | {"index": "sketch", "backend": backend, "device": "cpu"}
    tallies = {one.spec: {i: Tally() for i in capture.layers} for one in chosen}
    for done, (i, layer) in enumerate(capture.layers.items()):
        index = sketch_of(capture, layer, backend)
        for step in _steps(capture, layer, config.stride):
            here = index.prefix(step.keys.shape[1])
            for one in chosen:
                tallies[one.spec][i].add(one, step, here)
        on_progress("Policies, layer by layer", done + 1, len(capture.layers))
    rows, layer_rows = [], []
    for one in chosen:
        fields = head | {"policy": one.spec, "guarantee": guarantee(one)}
        rows.append(fields | Tally.joined(list(tallies[one.spec].values())).row())
        layer_rows += [fields | {"layer": i} | tally.row() for i, tally in tallies[one.spec].items()]
    positions = capture.query_positions[capture.measured(config.stride)].tolist()
    return rows, {"rows_per_layer": layer_rows, "rows_per_step": _step_rows(rows, tallies, positions)}


def _step_rows(
    rows: list[dict[str, Any]], tallies: dict[str, dict[int, "Tally"]], positions: list[int]
) -> list[dict[str, Any]]:
    """A row per position and policy: the share selected, and what 95% of the mass would have needed, over layers and heads."""
    found = []
    for row in rows:
        parts = list(tallies[row["policy"]].values())
        if not parts[0].selected:
            continue
        for place, position in enumerate(positions):
            selected, need = (torch.cat([getattr(p, name)[place] for p in parts]) for name in ("selected", "need"))
            shared = {"policy": row["policy"], "guarantee": row["guarantee"], "position": position}
            figures = {"selected_fraction": selected.mean().item(), "need_95_fraction": need.mean().item()}
            found.append(shared | figures)
    return found


@dataclass(frozen=True, kw_only=True)
class Step:
    """One query of every head, and the truth of it in float64."""

    q: Tensor  # [num_q_heads, head_dim]
    keys: Tensor  # [num_kv_heads, n, head_dim]
    values: Tensor
    coded: dict[str, tuple[Tensor, Tensor]]  # of the whole layer, by baseline
    softmax_scale: float

    def __post_init__(self) -> None:
        scores, truth = attention(self.q, self.keys, self.values, self.softmax_scale)
        self.__dict__.update(scores=scores, truth=truth, masses=(scores * self.softmax_scale).softmax(-1))

    scores: Tensor = field(init=False)
    truth: Tensor = field(init=False)
    masses: Tensor = field(init=False)

    @property
    def need(self) -> Tensor:
        """The smallest share of the keys that holds NEED of the mass, per query head."""
        ordered = self.masses.sort(-1, descending=True).values
        return ((ordered.cumsum(-1) < NEED).sum(-1) + 1).double() / ordered.shape[-1]


def _steps(capture: Capture, layer: Layer, stride: int) -> Iterator[Step]:
    keys, values = layer.keys.double(), layer.values.double()
    coded = {one.spec: one.coded(keys, values) for one in (Fp8(), Kivi4())}
    queries = layer.queries[:, capture.measured(stride)].float()
    for place, position in enumerate(capture.query_positions[capture.measured(stride)].tolist()):
        seen = slice(position + 1)
        yield Step(
            q=queries[:, place],
            keys=keys[:, seen],
            values=values[:, seen],
            coded=coded,
            softmax_scale=capture.softmax_scale,
        )


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What one policy did, a value per query and head."""

    figures: list[Figures] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)
    variation: list[Tensor] = field(default_factory=list)  # of the selected share, over seeds
    need: list[Tensor] = field(default_factory=list)
    dropped: list[Tensor] = field(default_factory=list)
    dropped_bound: list[Tensor] = field(default_factory=list)
    tiers: list[dict[str, float]] = field(default_factory=list)

    def add(self, one: Policy | Baseline, step: Step, index: SketchIndex) -> None:
        """Attend one step and judge it."""
        if not isinstance(one, Baseline):
            self._add_policy(one, step, index)
            return
        num_keys = step.keys.shape[1]
        if isinstance(one, OracleDrop):
            grouped = step.scores.unflatten(0, (step.keys.shape[0], -1))
            kept, out = one.kept(grouped), one.output(grouped, step.values, step.softmax_scale).flatten(0, 1)
            self.selected.append(kept[..., : num_closed(index)].double().mean(-1).flatten())
            self.need.append(step.need)
            self.dropped.append((step.masses * ~kept.flatten(0, 1)).sum(-1))
            spent = one.bytes_fraction(kept.any(1))
        else:
            k, v = (x[:, :num_keys] for x in step.coded[one.spec])
            out, spent = attention(step.q, k, v, step.softmax_scale)[1], one.bytes_fraction(step.keys.shape[2])
        self.figures.append(Figures.of(out, step.truth, spent))

    def _add_policy(self, one: Policy, step: Step, index: SketchIndex) -> None:
        def attended(policy: Policy) -> AttendResult:
            return attend(
                step.q[None], index, policy=policy, softmax_scale=step.softmax_scale, keep_best=True, record=True
            )

        result = attended(one)
        assert result.exact_mask is not None, "asked for"
        stats, mask, closed = result.stats, result.exact_mask[0], num_closed(index)
        self.figures.append(Figures.of(result.out[0].double(), step.truth, stats.bytes_fraction, result, one))
        self.selected.append(mask[:, :closed].double().mean(-1))
        self.need.append(step.need)
        self.tiers.append({name: stats.fraction(name) for name in ("exact", "coarse", "unread", "scanned")})
        if one.drops:
            self.dropped.append((step.masses * ~mask).sum(-1))
            self.dropped_bound.append(result.dropped_mass_bound[0].double())
        if isinstance(one, Sampled):
            others = [attended(replace(one, seed=one.seed + s)).exact_mask for s in range(1, SEEDS)]
            shares = torch.stack(
                [self.selected[-1], *(x[0, :, :closed].double().mean(-1) for x in others if x is not None)]
            )
            self.variation.append(shares.std(0) / shares.mean(0).clamp_min(1 / closed))

    @classmethod
    def joined(cls, parts: list["Tally"]) -> "Tally":
        """All of them as one."""
        return cls(**{name: [x for part in parts for x in getattr(part, name)] for name in vars(cls())})

    def row(self) -> dict[str, Any]:
        """The fields of a result row."""
        row: dict[str, Any] = Figures.joined(self.figures).row() | _spread(self.selected, "selected_fraction")
        row["selected_cv_over_seeds"] = _mean(self.variation)
        row |= {f"{name}_fraction": _mean([t[name] for t in self.tiers]) for name in ("coarse", "unread", "scanned")}
        row |= {"dropped_mass": _mean(self.dropped), "dropped_mass_bound": _mean(self.dropped_bound)}
        if self.selected:
            pair = torch.stack([torch.cat(self.selected), torch.cat(self.need)])
            row |= {"need_95_fraction": pair[1].mean().item(), "need_95_correlation": _correlation(pair)}
        if self.dropped_bound:
            true, bound = torch.cat(self.dropped), torch.cat(self.dropped_bound)
            row["num_bound_violations"] += int((true > bound * (1 + 1e-9) + 1e-15).sum())
        return row


def num_closed(index: SketchIndex) -> int:
    """Keys of the closed blocks of an index over one row, at least 1."""
    assert index.sketch is not None, "built"
    return max(1, int(index.sketch.num_blocks[0]) * index.sketch.config.frame_len)


def _spread(values: list[Tensor], name: str) -> dict[str, float | None]:
    if not values:
        return {name: None, f"{name}_std": None, "selected_cv": None}
    every = torch.cat(values)
    mean, std = every.mean().item(), every.std().item()
    return {name: mean, f"{name}_std": std, "selected_cv": std / mean if mean else None}


def _mean(values: list[Any]) -> float | None:
    if not values:
        return None
    return torch.cat([torch.as_tensor(x, dtype=torch.float64).flatten() for x in values]).mean().item()


def _correlation(pair: Tensor) -> float | None:
    """Of ranks, so that a few diffuse heads don't decide it; None where one side never varies."""
    ranks = pair.argsort(-1).argsort(-1).double()
    if bool((pair.amax(-1) == pair.amin(-1)).any()):
        return None
    return torch.corrcoef(ranks)[0, 1].item()
