"""Print what kernels/triton/crossover.py holds: both times of a step as sums of terms, fitted to rows of `bench_gpu --crossover`.

Usage: python scripts/crossover.py [ROWS]     default: benchmarks/results/crossover_h100.json
Relative errors are least squared; a term that would be negative is left out.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from louver.kernels.triton.crossover import Costs

ROWS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "crossover_h100.json"
KINDS = {"drop": ("budget:0.01", "topk:20"), "keep": ("exact:0.01",), "looks": ("relative:4",)}
SHAPE = ("batch", "num_kv_heads", "kv_len", "num_q_heads", "head_dim")


def times(path: Path = ROWS) -> dict[tuple[int, ...], dict[str, float]]:
    """Per shape (rows, tokens, group, head_dim) the microseconds of ``dense``, ``best`` (of all dense ways) and each kind's slowest."""
    found: dict[tuple[int, ...], dict[str, float]] = {}
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        batch, num_kv_heads, tokens, num_q_heads, head_dim = (row[name] for name in SHAPE)
        shape = (batch * num_kv_heads, tokens, num_q_heads // num_kv_heads, head_dim)
        at, took = found.setdefault(shape, {}), row["latency_us"]
        if row["backend"] in ("dense", "sdpa_flash", "sdpa_cudnn"):
            at["best"] = min(took, at.get("best", took))
        for kind in (
            ("dense",) if row["backend"] == "dense" else (k for k, specs in KINDS.items() if row["policy"] in specs)
        ):
            at[kind] = max(took, at.get(kind, 0.0))
    return found


def fitted(kind: str, measured: dict[tuple[int, ...], dict[str, float]]) -> Costs:
    """The costs of ``dense`` or of a kind of step."""
    shapes = [shape for shape, by in measured.items() if kind in by]
    took = np.array([measured[shape][kind] for shape in shapes])
    terms: Any = np.array([[1, g, rows * g, rows * n * d, rows * n * g] for rows, n, g, d in shapes]) / took[:, None]
    kept = list(range(terms.shape[1]))
    while True:
        scale = np.abs(terms[:, kept]).max(0)
        costs = np.linalg.lstsq(terms[:, kept] / scale, np.ones(len(took)), rcond=None)[0] / scale
        if (costs >= 0).all():
            break
        kept.pop(int(np.argmin(costs * scale)))
    whole = np.zeros(terms.shape[1])
    whole[kept] = costs
    return Costs(*(float(f"{cost:.3g}") for cost in whole))


if __name__ == "__main__":
    measured = times(*(Path(path) for path in sys.argv[1:2]))
    for kind in ("dense", *KINDS):
        print(kind, fitted(kind, measured))
