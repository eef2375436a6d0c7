"""The growth experiment: fixed group size against a fixed number of groups, as the cache grows.

With a fixed number of groups their size grows with the cache, the balls widen, and the bounds rule out less and less; with a fixed
size the number grows, and each ball stays as tight as it was. On a capture: the index holds the last kv_len keys before the measured
queries; both settings start out the same at the shortest length. Guarantee: exact (SUM).
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from louver.errors import PolicyError
from louver.experiments.capture import Capture, Layer
from louver.experiments.experiment import Outcome, Progress, no_progress, option
from louver.experiments.pruning_methods import BallMethod, Question

FIXED_SIZE, FIXED_NUMBER = "fixed group size", "fixed number of groups"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to compare: a row per length and setting. Every field changes results."""

    capture: Path = option(help="What `louver capture` wrote.")
    kv_lens: tuple[int, ...] = option(
        (512, 1024, 2048, 4096, 7680), help="Keys, counted back from the measured queries."
    )
    group_len: int = option(4, help="Keys per group, at the shortest length for a fixed number of groups.")
    subspaces: int = option(16, help="Slices of the head dimension.")
    k: int = option(20, help="Keys wanted.")

    def __post_init__(self) -> None:
        if min(self.kv_lens) < max(self.k, self.group_len) or self.group_len < 1 or self.k < 1:
            raise PolicyError(
                f"the shortest of kv_lens={self.kv_lens} must hold k={self.k} keys and a group of {self.group_len}"
            )


def run(config: Config, on_progress: Progress = no_progress) -> Outcome:
    """A row per length and setting; lengths that the capture does not have are left out.

    Raises:
        InputFileError: the capture can't be read.
        PolicyError: the capture is shorter than every length.
    """
    capture = Capture.load(config.capture)
    available = int(capture.query_positions[capture.fitting()][-1]) + 1
    lengths = [n for n in sorted(config.kv_lens) if n <= available]
    if not lengths:
        raise PolicyError(
            f"the capture holds {available} keys before its measured queries; wanted {min(config.kv_lens)}"
        )
    num_groups = lengths[0] / config.group_len
    rows: list[dict[str, Any]] = []
    for done, kv_len in enumerate(lengths):
        on_progress("Growth, length by length", done, len(lengths))
        for setting, group_len in ((FIXED_SIZE, config.group_len), (FIXED_NUMBER, round(kv_len / num_groups))):
            found = [
                _measure(capture, layer, available, kv_len, group_len, config) for layer in capture.layers.values()
            ]
            figures = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
            figures["num_false_negatives"] = sum(one["num_false_negatives"] for one in found)
            sizes = {"kv_len": kv_len, "setting": setting, "group_len": group_len, "num_groups": kv_len // group_len}
            head = {"index": "ball", "rule": "sum", "subspaces": config.subspaces, "k": config.k, "guarantee": "exact"}
            rows.append(capture.shape_fields() | sizes | head | figures)
    on_progress("Growth, length by length", len(lengths), len(lengths))
    return rows, {}


def _measure(capture: Capture, layer: Layer, end: int, kv_len: int, group_len: int, config: Config) -> dict[str, float]:
    shorter = replace(layer, keys=layer.keys[:, end - kv_len : end], values=layer.values[:, end - kv_len : end])
    q = layer.queries[:, capture.measured()].float().unflatten(0, (layer.keys.shape[0], -1)).flatten(1, 2)
    scores = q.double() @ shorter.keys.double().mT
    tau = scores.topk(config.k, -1).values[..., -1]
    question = Question(layer=shorter, fitting=layer.queries[:, capture.fitting()], q=q, scores=scores, tau=tau)
    method = BallMethod(rule="sum", options=(("subspaces", config.subspaces), ("group_len", group_len)))
    started = time.perf_counter()
    index = method.prepare(shorter, question.fitting)
    build_ms = 1e3 * (time.perf_counter() - started)
    candidates = method.answer(index, question).candidates
    return {
        "scanned_fraction": float(candidates.double().mean()),
        "scanned_keys": float(candidates.sum(-1).double().mean()),
        "work_fraction": method.work_per_key + float(candidates.double().mean()),
        "num_false_negatives": int((question.relevant & ~candidates).sum()),
        "build_ms": build_ms,
    }
