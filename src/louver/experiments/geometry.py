"""The geometry experiment: why nearest-neighbour search does not fit attention, measured on a capture.

Three reasons. Lengths: keys differ in norm, and a cosine search forgets it. Distributions: queries do not lie where keys do (means, covariances,
principal axes), so an index that links keys to near keys answers a key better than a query. Sizes: the number of keys above a fixed
bar changes from query to query, so no k is right. A row per layer, figures averaged over its heads.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from louver.errors import InputFileError
from louver.experiments.baselines import AnnIndex, AnnOptions
from louver.experiments.capture import Capture, Layer
from louver.experiments.experiment import Outcome, Progress, no_progress, option

AXES = 8  # principal axes compared
BAR_SHARE = 0.01  # the bar: the score that this share of the keys reaches for the median fitting query


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to look at. Every field changes results."""

    capture: Path = option(help="What `louver capture` wrote.")
    k: int = option(20, help="Keys wanted of the searches.")
    kinds: tuple[str, ...] = option(("hnsw", "ivf"), help="Indexes to ask: hnsw, ivf, pq, lsh.")
    stride: int = option(4, help="Ask every so manieth query of the capture's second half.")

    def __post_init__(self) -> None:
        for kind in self.kinds:
            AnnOptions(kind=kind)
        if self.k < 1 or self.stride < 1:
            raise InputFileError(f"k={self.k} and stride={self.stride}; wanted 1 or more of each")


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """A row per layer; ``rows_per_head`` beside them.

    Raises:
        InputFileError: the capture can't be read.
    """
    capture = Capture.load(config.capture)
    rows, per_head = [], []
    for done, (i, layer) in enumerate(capture.layers.items()):
        on_progress("Geometry, layer by layer", done, len(capture.layers))
        heads = [
            {"layer": i, "head": head} | _head(capture, layer, head, config) for head in range(layer.keys.shape[0])
        ]
        names = [name for name in heads[0] if name not in ("layer", "head")]
        mean = {name: sum(head[name] for head in heads) / len(heads) for name in names}
        widest = max(head["norm_ratio"] for head in heads)
        rows.append(capture.shape_fields() | {"layer": i, "k": config.k} | mean | {"norm_ratio_max": widest})
        per_head += heads
    on_progress("Geometry, layer by layer", len(capture.layers), len(capture.layers))
    return [row | {"guarantee": "none"} for row in rows], {"rows_per_head": per_head}


def _head(capture: Capture, layer: Layer, head: int, config: Config) -> dict[str, float]:
    """One KV head. Indexes hold the keys before the measured tokens, whose own keys are the queries that look like keys."""
    n = int(capture.query_positions[capture.fitting()][-1]) + 1
    group = slice(head * layer.group_size, (head + 1) * layer.group_size)
    keys = layer.keys[head, :n].float()
    measured = capture.measured(config.stride)
    q = layer.queries[group, measured].float().flatten(0, 1)
    unseen = layer.keys[head, capture.query_positions[measured]].float()
    fitting = layer.queries[group, capture.fitting()].float().flatten(0, 1)
    norm = keys.norm(dim=-1)
    figures = {
        "norm_ratio": float(norm.max() / norm.min()),
        "norm_p99_p1": float(norm.quantile(0.99) / norm.quantile(0.01)),
        "first_norm": float(norm[0] / norm.median()),
        "cosine_recall": _overlap(q @ keys.T, q @ (keys / norm[:, None]).T, config.k),
        **_distributions(torch.cat([fitting, q]), keys),
        **_sizes(fitting @ keys.T, q @ keys.T),
    }
    for kind in config.kinds:
        index = AnnIndex(keys, AnnOptions(kind=kind))
        figures[f"{kind}_recall_queries"] = _recall(index, q, keys, config.k)
        figures[f"{kind}_recall_keys"] = _recall(index, unseen, keys, config.k)
    return figures


def _overlap(truth: Tensor, other: Tensor, k: int) -> float:
    """Share of the k best columns by truth that are among the k best by other, mean over lines."""
    best, found = (torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(k).indices, True) for x in (truth, other))
    return float((best & found).sum(1).double().mean() / k)


def _recall(index: AnnIndex, q: Tensor, keys: Tensor, k: int) -> float:
    best = (q @ keys.T).topk(k).indices
    found = index.search(q, k)
    return float((best[:, :, None] == found[:, None]).any(2).double().mean())


def _distributions(q: Tensor, keys: Tensor) -> dict[str, float]:
    """How far apart two clouds lie: their means, their covariances, and their first principal axes."""
    (q_mean, q_cov), (k_mean, k_cov) = (_moments(x.double()) for x in (q, keys))
    spread = (q_cov.trace() + k_cov.trace()).sqrt()
    overlap = (q_cov * k_cov).sum() / (q_cov.norm() * k_cov.norm())
    axes = [torch.linalg.eigh(cov).eigenvectors[:, -AXES:] for cov in (q_cov, k_cov)]
    cosines = torch.linalg.svdvals(axes[0].T @ axes[1]).clamp(max=1)
    return {
        "mean_distance": float((q_mean - k_mean).norm() / spread),
        "mean_cosine": float(torch.nn.functional.cosine_similarity(q_mean, k_mean, dim=0)),
        "covariance_overlap": float(overlap),
        "principal_angle": math.degrees(float(cosines.acos().mean())),
    }


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / x.shape[0]


def _sizes(fitting: Tensor, scores: Tensor) -> dict[str, float]:
    """Keys above a bar that is set once, by the median fitting query."""
    wanted = max(1, round(BAR_SHARE * scores.shape[1]))
    bar = fitting.topk(wanted).values[:, -1].median()
    counts = (scores >= bar).sum(1).double()
    return {f"above_bar_p{p}": float(counts.quantile(p / 100)) for p in (5, 50, 95)}
