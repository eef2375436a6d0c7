"""Every experiment describes itself well enough for a command, a table, a picture and a section of the report."""

import dataclasses

import pytest

from experiments.captures import tiny_capture
from louver.experiments import precision
from louver.experiments.catalog import experiments
from louver.experiments.chart import Axis, Chart
from louver.experiments.charts import chart_png
from louver.experiments.experiment import Column
from louver.kernels import crossover

ROWS = [
    {"x": 1.0, "y": 0.5, "kind": "a", "guarantee": "exact"},
    {"x": 10.0, "y": 0.1, "kind": "b", "guarantee": "none"},
    {"x": 0.0, "y": 0.2, "kind": "b"},
    {"x": None, "y": 0.2, "kind": "b"},
]


@pytest.mark.parametrize("name", experiments())
def test_descriptions(name):
    described = experiments()[name]
    assert described.name == name and described.claim.endswith(".") and described.summary.endswith(".")
    fields = {f.name: f for f in dataclasses.fields(described.config)}
    assert fields.keys() >= described.quick.keys()
    assert all(f.metadata["help"] for f in fields.values() if f.metadata)


@pytest.mark.parametrize("kind", ["points", "lines"])
def test_charts(kind):
    chart = Chart(
        title="t", x="x", y="y", series="kind", label="kind", kind=kind,
        x_axis=Axis(label="x", log=True), y_axis=Axis(label="y", share=True, zero=True), mark_x=2.0,
    )  # fmt: skip
    points = chart.points(ROWS)
    assert [(p["x"], p["series"], p["proven"]) for p in points] == [(1.0, "a", True), (10.0, "b", False)]
    assert chart_png(chart, ROWS).startswith(b"\x89PNG")
    rows = [row | {"y_low": 0.1, "y_high": 0.9} for row in ROWS]
    barred = dataclasses.replace(chart, interval=True)
    assert [(p["low"], p["high"]) for p in barred.points(rows)] == [(0.1, 0.9)] * 2
    assert chart_png(barred, rows).startswith(b"\x89PNG")
    dots = dataclasses.replace(chart, y=lambda row: f"line {row['kind']}", x_axis=Axis(label="x"), kind="points")
    assert len(dots.points(ROWS)) == 3 and dots.dots(dots.points(ROWS)) and not chart.dots(points)
    assert chart_png(dots, ROWS).startswith(b"\x89PNG") and chart_png(chart, []).startswith(b"\x89PNG")


def test_numbers_are_written_for_people():
    assert Axis(label="", share=True).text(0.0125) == "1.25%" and Axis(label="").text(40000) == "40,000"
    column = Column(heading="y", value="y", spec=".1%")
    assert column.cell(ROWS[0]) == "50.0%" and column.cell({}) == "–"
    assert Column(heading="", value=lambda row: row["x"] + 1, spec=".0f").cell(ROWS[0]) == "2"


def test_a_finding_is_worked_out_from_rows(tmp_path):
    path = tmp_path / "x.safetensors"
    tiny_capture().save(path)
    described = experiments()["precision"]
    rows, more = described.run(precision.Config(capture=path, policies=("exact:0.01", "fp8")))
    said = described.finding(rows)
    assert f"fp8 errs by {rows[1]['output_error']:.2%} at 0.500" in said and "0 certificates" in said
    assert {row["layer"] for row in more["rows_per_layer"]} == {0, 3}
    assert all(len(line) == len(described.columns) for line in described.cells(rows))


def test_policies_are_judged_by_what_they_do_and_times_by_what_users_get(monkeypatch):
    monkeypatch.setattr(crossover, "enabled", True)
    seen = {}

    def watcher(name):
        def run(config, on_progress):
            seen[name] = crossover.enabled
            return [], {}

        return run

    for described in experiments().values():
        dataclasses.replace(described, run=watcher(described.name)).measure(None)
    assert {name for name, dispatch in seen.items() if dispatch} == {"latency", "offload", "disk"}
    assert crossover.enabled
