"""Write the tables of README.md and docs/ from stored rows, so that no figure in them is typed by hand.

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``; shown/ says which rows and columns it shows.
A table named in benchmarks/expected.json puts rows beside the figures expected of them (scripts/expected.py).
Usage: python scripts/tables.py [--check]   (--check changes nothing and fails where a table is out of date, or where a stored
row says that a promise was broken: scripts/evidence.py)
"""

import json
import re
import sys
from pathlib import Path

from expected import comparison
from grid import GRIDS, grid
from shown import TABLES, Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def render(table: Table) -> str:
    """The table in Markdown, with the device and the command its rows came from."""
    document = json.loads((RESULTS / table.file).read_text(encoding="utf-8"))
    rows = [r for r in document["rows"] if all(_is(r.get(key), value) for key, value in table.where.items())]
    lines = ["| " + " | ".join(heading for heading, _, _ in table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(cell(row.get(name), spec) for _, name, spec in table.columns) + " |" for row in rows]
    machine = document["machine"]
    source = f"{machine['device']}; `{machine['command']}`; rows in benchmarks/results/{table.file}"
    return "\n".join([*lines, "", f"({source})", ""])


def _is(value: object, wanted: object) -> bool:
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def written(name: str) -> str:
    """The table of that name."""
    return render(TABLES[name]) if name in TABLES else grid(name) if name in GRIDS else comparison(name)


def cell(value: object, spec: str) -> str:
    """One cell; a figure that a row does not have is a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " / ".join(cell(one, spec) for one in value)
    return "–" if value is None else format(value, spec).replace("|", "\\|")  # a bar would end the cell


def main() -> int:
    """Write (or check) every table; the number of stale files and broken promises is the exit code."""
    from evidence import violations
    from reproduce import PAGE, is_fresh

    stale = [] if is_fresh("--check" in sys.argv) else [f"claims of {PAGE.name}"]
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        fresh = BLOCK.sub(lambda found: found[1] + written(found[2]) + found[4], text)
        if fresh != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(fresh, encoding="utf-8")
    if stale:
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: {', '.join(stale)}")
    broken = violations()
    for line in broken:
        print(f"a row breaks a promise: {line}")
    return len(stale) + len(broken) if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
