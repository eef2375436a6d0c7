"""Fixed group size against a fixed number of groups: shown."""

from collections.abc import Sequence

from louver.experiments import growth
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """Both settings at the longest cache."""
    first, last = (f(row["kv_len"] for row in rows) for f in (min, max))
    said = [
        f"with a {row['setting']} {row['scanned_fraction']:.1%} of {last:,} keys ({row['scanned_keys']:,.0f}) are scanned"
        for row in rows
        if row["kv_len"] == last
    ]
    start = next(row for row in rows if row["kv_len"] == first)
    return f"From {start['scanned_fraction']:.1%} ({start['scanned_keys']:,.0f}) at {first:,} keys: {'; '.join(said)}."


EXPERIMENT = Experiment(
    name="growth",
    summary="Groups of a fixed size against a fixed number of groups, as the cache grows.",
    claim="The size of the groups, not their number, must stay fixed as the cache grows: bounds of wide groups rule nothing out.",
    caveat="Frames of the default sketch are blocks of fixed length, so they too keep their tightness as the cache grows.",
    config=growth.Config,
    run=growth.run,
    quick={"kv_lens": (512, 1024, 2048, 3584)},
    columns=(
        Column(heading="keys", value="kv_len", spec=",d"),
        Column(heading="setting", value="setting"),
        Column(heading="groups", value="num_groups", spec=",d"),
        Column(heading="keys per group", value="group_len", spec="d"),
        Column(heading="scanned", value="scanned_fraction", spec=".1%"),
        Column(heading="keys scanned", value="scanned_keys", spec=",.0f"),
        Column(heading="work / dense", value="work_fraction", spec=".2f"),
        Column(heading="build, ms", value="build_ms", spec=",.0f"),
        Column(heading="lost", value="num_false_negatives", spec="d"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="Keys scanned as the cache grows",
            x="kv_len",
            y="scanned_fraction",
            series="setting",
            kind="lines",
            x_axis=Axis(label="keys in the cache", log=True),
            y_axis=Axis(label="scanned", share=True, zero=True),
        ),
    ),
)
