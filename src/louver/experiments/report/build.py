"""Put the page together: every experiment's claim, finding, pictures and table, from the row files of a folder.

A file belongs to the experiment its name begins with: ``pruning.json``, ``pruning_codecs.json``, ``false_negatives.json`` for
false-negatives. What is shown is what the files hold; the page's script draws, and computes nothing.
"""

import html
import json
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from louver.errors import InputFileError
from louver.experiments.catalog import experiments
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Experiment
from louver.experiments.rows import read_rows

Document = Mapping[str, Any]


def build(folder: Path) -> str:
    """The page for the row files in a folder.

    Raises:
        InputFileError: there is no such folder, no experiment's rows in it, or a file that can't be read.
    """
    if not folder.is_dir():
        raise InputFileError(f"{folder}: no such folder; `louver experiment all --out {folder}` makes one")
    found = [(described, list(_files(folder, described))) for described in experiments().values()]
    found = [(described, files) for described, files in found if files]
    if not found:
        raise InputFileError(
            f"{folder}: no experiment's rows in it (wanted NAME.json, as `louver experiment NAME` writes)"
        )
    recording = next((d["recording"] for _, files in found for _, d in files if "recording" in d), None)
    charts: list[dict[str, Any]] = []
    rows = "".join(_summary(described, files) for described, files in found)
    sections = _asset("summary.html").replace("<!--ROWS-->", rows)
    sections += "".join(_section(described, files, charts) for described, files in found)
    contents = "".join(f'<a href="#{d.name}">{html.escape(d.name)}</a>' for d, _ in found)
    return _page("Louver, measured", f"{_asset('intro.html')}<nav>{contents}</nav>", sections, charts, recording)


def build_one(described: Experiment, name: str, document: Document) -> str:
    """A page with one section: the rows of one file, of something that need not be in the catalog."""
    charts: list[dict[str, Any]] = []
    section = _section(described, [(name, document)], charts)
    return _page(f"Louver: {described.name}", "", section, charts, None)


def _page(title: str, intro: str, sections: str, charts: list[dict[str, Any]], recording: Any) -> str:
    parts = {
        "TITLE": html.escape(title),
        "INTRO": intro,
        "STYLE": _asset("page.css"),
        "SCRIPT": _asset("page.js"),
        "PLAYER": _asset("player.html") if recording else "",
        "SECTIONS": sections,
        "DATA": json.dumps({"charts": charts, "recording": recording}).replace("</", "<\\/"),
    }
    page = _asset("page.html")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def _files(folder: Path, described: Experiment) -> Iterator[tuple[str, Document]]:
    stem = described.name.replace("-", "_")
    for path in sorted(folder.glob("*.json")):
        name = path.stem.replace("-", "_")
        if name == stem or name.startswith(stem + "_"):
            document = read_rows(path)
            if document["rows"]:
                yield path.name, document


def _summary(described: Experiment, files: list[tuple[str, Document]]) -> str:
    finding = described.finding(files[0][1]["rows"])
    cells = (
        f'<a href="#{described.name}">{html.escape(described.name)}</a>',
        _prose(described.claim),
        _prose(finding),
    )
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _section(described: Experiment, files: list[tuple[str, Document]], charts: list[dict[str, Any]]) -> str:
    parts = [
        f'<section id="{described.name}"><h2>{html.escape(described.name.replace("-", " ").capitalize())}</h2>',
        f"<p>{html.escape(described.summary)}</p>",
    ]
    if described.claim:
        parts.append(f'<p class="claim"><b>The paper.</b> {_prose(described.claim)}</p>')
    for name, document in files:
        parts += [*_run(described, name, document, charts)]
    if described.caveat:
        parts.append(f'<p class="claim"><b>Mind.</b> {_prose(described.caveat)}</p>')
    return "".join([*parts, "</section>"])


def _run(described: Experiment, name: str, document: Document, charts: list[dict[str, Any]]) -> Iterator[str]:
    """One file of rows: finding, pictures, table, and where they come from."""
    rows, machine = document["rows"], document["machine"]
    yield f'<p class="finding"><b>Here.</b> {_prose(described.finding(rows))}</p>'
    table = {"columns": [c.heading for c in described.columns], "cells": described.cells(rows)}
    for chart in described.charts:
        drawn = document.get(chart.of, [])
        if not chart.points(drawn):
            continue
        yield f'<figure><div class="chart" data-chart="{len(charts)}"></div></figure>'
        notes = table if chart.of == "rows" else _plain_table(drawn)
        charts.append(_chart(chart, drawn) | {"notes": notes})
    yield f"<details><summary>{len(rows)} rows</summary>{_table(described, table)}</details>"
    command, device = (html.escape(str(machine.get(key, "unknown"))) for key in ("command", "device"))
    versions = machine.get("versions") or {}
    said = ", ".join(
        f"{key} {value}" for key, value in versions.items() if value and key in ("louver", "torch", "python")
    )
    yield f'<p class="source"><code>{command}</code><br>{device}; {html.escape(said)}; rows in {html.escape(name)}</p>'


def _chart(chart: Chart, rows: Any) -> dict[str, Any]:
    points = chart.points(rows)

    def axis(described: Axis) -> dict[str, Any]:
        return {"label": described.label, "share": described.share, "log": described.log, "zero": described.zero}

    return {
        "title": chart.title,
        "kind": chart.kind,
        "dots": chart.dots(points),
        "x": axis(chart.x_axis),
        "y": axis(chart.y_axis),
        "mark": chart.mark_x,
        "points": points,
    }


def _plain_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows that have no columns of their own (those of a step, say), field by field."""
    columns = [name for name, value in rows[0].items() if isinstance(value, str | int | float)]
    return {"columns": columns, "cells": [[_short(row.get(name)) for name in columns] for row in rows]}


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _table(described: Experiment, table: dict[str, Any]) -> str:
    kinds = ['class="number"' if column.is_number else "" for column in described.columns]
    head = "".join(f"<th {kind}>{html.escape(h)}</th>" for h, kind in zip(table["columns"], kinds, strict=True))
    lines = [
        "<tr>" + "".join(f"<td {k}>{html.escape(cell)}</td>" for cell, k in zip(cells, kinds, strict=True)) + "</tr>"
        for cells in table["cells"]
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _prose(text: str) -> str:
    """Escaped text, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def _asset(name: str) -> str:
    return resources.files("louver.experiments.report").joinpath(name).read_text(encoding="utf-8")
