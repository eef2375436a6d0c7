"""The pictures of ``louver bench --plot``: time against length, and against the share of keys selected."""

from collections.abc import Sequence

from louver.experiments.chart import Axis, Chart
from louver.experiments.rows import Row

_MS = Axis(label="ms per step", log=True)


def _milliseconds(row: Row) -> float:
    return row["latency_us"] / 1e3


def charts(rows: Sequence[Row]) -> dict[str, Chart]:
    """By file name: "length" where several lengths were measured, "selected" where several shares were."""
    found: dict[str, Chart] = {}
    if len({row["kv_len"] for row in rows}) > 1:
        found["length"] = Chart(
            title="A decode step's attention as the cache grows",
            x="kv_len",
            y=_milliseconds,
            series="policy",
            kind="lines",
            x_axis=Axis(label="keys in the cache", log=True),
            y_axis=_MS,
        )
    if len({row["policy"] for row in rows if "selected_fraction" in row}) > 1:
        found["selected"] = Chart(
            title="A decode step's attention as more keys are selected",
            x="selected_fraction",
            y=_milliseconds,
            series=lambda row: f"{row['policy'].partition(':')[0]}, {row['kv_len']:,} keys",
            kind="lines",
            x_axis=Axis(label="keys attended exactly", share=True, log=True),
            y_axis=_MS,
        )
    return found
