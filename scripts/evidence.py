"""What the stored rows say of Louver's promises: no bound violated, nothing that was asked for missed, no key lost.

A row speaks for a bound where it has ``num_bound_violations``, for a request (``error:``, ``mass:``) where it has
``num_asked_violations``, and for a search where it has ``num_false_negatives``; to have the name and no number is to keep silent. A method whose guarantee is "none" may lose keys and
have no bound to violate; a bound that it has must hold all the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
ASKING = ("error:", "mass:")


def rows(folder: Path = RESULTS) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every stored row, those per layer and per step too, with the file it is in."""
    for path in sorted(folder.glob("*.json")):
        for part in json.loads(path.read_text(encoding="utf-8")).values():
            if isinstance(part, list):
                yield from ((path.name, row) for row in part if isinstance(row, dict))


def faults(row: dict[str, Any]) -> list[str]:
    """What a row says that no row may say."""
    promised = row.get("guarantee") in ("exact", "certified")
    found = [f"{n} is {row[n]}" for n in ("num_bound_violations", "num_asked_violations") if row.get(n)]
    if promised and row.get("num_false_negatives"):
        found.append(f"num_false_negatives is {row['num_false_negatives']} though the guarantee is {row['guarantee']}")
    if promised and "num_bound_violations" in row:
        if row["num_bound_violations"] is None:
            found.append(f"the guarantee is {row['guarantee']}, but the row counts no violations")
        asking = any(name in str(row.get("policy")) for name in ASKING) and "num_asked_violations" in row
        if asking and row["num_asked_violations"] is None:
            found.append("the row does not say whether what was asked was met")
    return found


def violations(folder: Path = RESULTS) -> list[str]:
    """One line per fault of a stored row."""
    return [f"{name}, {row.get('policy')}: {fault}" for name, row in rows(folder) for fault in faults(row)]
