"""Stored rows beside the figures Louver was designed from (benchmarks/expected.json): one table each, and what misses its figure.

A row may lie above its figure by the share ``within`` (all of these are costs: keys scanned, bytes, errors). A line with a
``why`` says what else differs.
"""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent / "benchmarks"


def expected() -> dict[str, Any]:
    """What benchmarks/expected.json holds."""
    return json.loads((ROOT / "expected.json").read_text(encoding="utf-8"))


def found(section: dict[str, Any], line: dict[str, Any]) -> dict[str, float | None]:
    """The stored figure under each heading of a line; None where no row holds it."""
    document = json.loads((ROOT / "results" / line["file"]).read_text(encoding="utf-8"))
    rows = [row for row in document["rows"] if all(row.get(k) == v for k, v in line["where"].items())]
    if section["by"] is None:
        return {head: rows[0].get(head) if rows else None for head in line["figures"]}
    by = {str(row[section["by"]]): row[section["field"]] for row in rows}
    return {head: by.get(head) for head in line["figures"]}


def misses() -> list[str]:
    """Lines of expected.json whose row is missing, or too far above its figure without a reason given."""
    document, out = expected(), []
    for section in (x for x in document.values() if isinstance(x, dict)):
        for line in section["lines"]:
            for head, value in found(section, line).items():
                figure = line["figures"][head]
                if value is None or (value > figure * (1 + document["within"]) + 5e-4 and "why" not in line):
                    out.append(f"{line['name']}, {section['heads'][head]}: {value} where {figure} was expected")
    return out


def comparison(name: str) -> str:
    """A Markdown table of one section: expected / measured under each heading."""
    section = expected()[name]
    heads = section["heads"]
    lines = ["| | " + " | ".join(heads.values()) + " |", "|" + "---|" * (len(heads) + 1)]
    notes, files = [], {}
    for line in section["lines"]:
        values, cells = found(section, line), []
        for head in heads:
            spec = section["formats"][head] if "formats" in section else section["format"]
            if head in line["figures"]:
                value = values[head]
                measured = "–" if value is None else f"**{value:{spec}}**"
                cells.append(f"{line['figures'][head]:{spec}} / {measured}")
            else:
                cells.append("–")
        mark = ""
        if "why" in line:
            notes += [] if line["why"] in notes else [line["why"]]
            mark = f" ({notes.index(line['why']) + 1})"
        lines.append(f"| {line['name']}{mark} | " + " | ".join(cells) + " |")
        files[line["file"]] = json.loads((ROOT / "results" / line["file"]).read_text(encoding="utf-8"))["machine"]
    lines += [""] + [f"({number}) {why}" for number, why in enumerate(notes, 1)]
    sources = [f"`{machine['command']}`, rows in benchmarks/results/{file}" for file, machine in files.items()]
    device = next(iter(files.values()))["device"]
    return "\n".join([*lines, *([""] if notes else []), f"({device}; {'; '.join(sources)})", ""])
