"""A picture of result rows, described once and drawn twice: by matplotlib for a file, by the report's page for a reader.

A chart knows which fields of the rows it shows and nothing about pixels. Values of ``y`` that are text make a line each
(a dot chart); numbers make an axis.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from louver.experiments.rows import Row

Pick = str | Callable[[Row], Any]  # a field's name, or a function of a row


def pick(what: Pick, row: Row) -> Any:
    """The value a Pick names; None where the row has no such field."""
    return row.get(what) if isinstance(what, str) else what(row)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What an axis says and how its numbers are written."""

    label: str
    share: bool = False  # of one: written in percent
    log: bool = False
    zero: bool = False  # starts at 0

    def text(self, value: float | int) -> str:
        """A number as this axis writes it."""
        return f"{100 * value:.4g}%" if self.share else f"{value:,.6g}"


# The two axes that most experiments share.
BYTES_READ = Axis(label="bytes read / bytes of dense attention from a 16-bit cache", zero=True)
OUTPUT_ERROR = Axis(label="mean relative error of the attention output", share=True, log=True)


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Points, or lines through points of one series. Rows where x or y is missing are left out."""

    title: str
    x: Pick
    y: Pick
    x_axis: Axis
    y_axis: Axis
    series: Pick | None = None  # colour and legend
    label: Pick | None = None  # written beside each point
    kind: Literal["points", "lines"] = "points"
    where: Callable[[Row], bool] = lambda row: True
    interval: bool = False  # a bar from y_low to y_high, two fields of the rows
    mark_x: float | None = None  # a reference line at this x
    of: str = "rows"  # the entry of the file whose rows are drawn

    def points(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """What is to be drawn: x, y, series, label, and whether the row has a guarantee (hollow marks have none), and the row's place."""
        found = []
        for place, row in enumerate(rows):
            if not self.where(row):
                continue
            x, y = pick(self.x, row), pick(self.y, row)
            if x is None or y is None or (self.x_axis.log and x <= 0) or (self.y_axis.log and y <= 0):
                continue
            series = "" if self.series is None else pick(self.series, row)
            label = "" if self.label is None else pick(self.label, row)
            proven = row.get("guarantee", "exact") != "none"
            point = {"x": x, "y": y, "series": str(series), "label": str(label), "proven": proven, "row": place}
            found.append(point | ({end: row[f"{self.y}_{end}"] for end in ("low", "high")} if self.interval else {}))
        return found

    def dots(self, points: Sequence[dict[str, Any]]) -> bool:
        """Whether y names lines instead of measuring."""
        return bool(points) and isinstance(points[0]["y"], str)
