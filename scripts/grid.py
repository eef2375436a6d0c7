"""Tables with one setting down and another across, a figure per combination: several rules side by side in a cell."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Rows of one result file, ``down`` against ``across`` (a field, and how its values are written)."""

    file: str
    down: tuple[str, str]
    across: tuple[str, str]
    value: str
    spec: str
    side_by_side: tuple[str, tuple[str, ...]]  # a field, and its values in the order of a cell
    where: dict[str, object] = field(default_factory=dict)


def _paper(value: str, spec: str, target: str) -> Grid:
    """The paper's ablation: subspaces against keys per group."""
    return Grid(
        file="pruning_grid.json",
        down=("subspaces", "{} subspaces"),
        across=("group_len", "groups of {}"),
        value=value,
        spec=spec,
        side_by_side=("rule", ("oracle-and", "sum")),
        where={"target": target, "index": "ball"},
    )


GRIDS = {
    "grid-20": _paper("scanned_fraction", ".1%", "20"),
    "grid-1": _paper("scanned_fraction", ".1%", "0.01"),
    "gpu-batch": Grid(
        file="crossover_h100.json",
        down=("batch", "{} rows"),
        across=("kv_len", "of {:,} tokens"),
        value="speedup_vs_best_dense",
        spec=".2f",
        side_by_side=("policy", ("budget:0.01", "topk:20", "exact:0.01")),
        where={"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "index": "sketch"},
    ),
    "grid-bytes": _paper("bytes_fraction", ".3f", "0.01"),
}


def grid(name: str) -> str:
    """The table in Markdown, with the device and the command its rows came from."""
    shown = GRIDS[name]
    document = json.loads((RESULTS / shown.file).read_text(encoding="utf-8"))
    rows = [row for row in document["rows"] if all(row.get(key) == value for key, value in shown.where.items())]
    (down, down_text), (across, across_text) = shown.down, shown.across
    heads = list(dict.fromkeys(row[across] for row in rows))
    lines = ["| | " + " | ".join(across_text.format(head) for head in heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for line in dict.fromkeys(row[down] for row in rows):
        cells = [_cell(shown, [r for r in rows if r[down] == line and r[across] == head]) for head in heads]
        lines.append(f"| {down_text.format(line)} | " + " | ".join(cells) + " |")
    machine = document["machine"]
    source = f"{machine['device']}; `{machine['command']}`; rows in benchmarks/results/{shown.file}"
    return "\n".join([*lines, "", f"({source})", ""])


def _cell(shown: Grid, rows: list[dict[str, Any]]) -> str:
    name, order = shown.side_by_side
    if not rows:
        return "–"
    by = {row[name]: row[shown.value] for row in rows}
    return " / ".join(format(by[key], shown.spec) if key in by else "–" for key in order)
