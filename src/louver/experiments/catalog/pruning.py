"""How many keys each bound leaves to be read: shown."""

from collections.abc import Sequence

from louver.experiments import pruning
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row

_SETTINGS = ("grouping", "enclosure", "center", "slicing")
_USUAL = ("kcenter", "ball", "mean", "contiguous")


def combination(row: Row) -> str:
    """What a row was measured with, in a few words."""
    if row["index"] != "sketch":
        settings = [f"{row['subspaces']} x groups of {row['group_len']}"]
        settings += [str(row[n]) for n in _SETTINGS if row.get(n) not in (None, *_USUAL)]
        return f"{row['index']} {row['rule']}  {', '.join(settings)}"
    planes = f", {row['planes']} planes" if row["planes"] > 1 else ""
    return f"{row['codec']}  {row['metric']} metric{planes}"


def target(row: Row) -> str:
    """The number of keys asked for, as people write it."""
    k = float(row["target"])
    return f"k = {k:g}" if k >= 1 else f"k = {100 * k:g}%"


def finding(rows: Sequence[Row]) -> str:
    """The best sound bound of each family at the first target."""
    mine = [row for row in rows if row["target"] == rows[0]["target"] and row["guarantee"] == "exact"]
    lost = sum(row["num_false_negatives"] for row in rows if row["guarantee"] == "exact")
    parts = []
    for family in dict.fromkeys(row["index"] for row in mine):
        best = min((row for row in mine if row["index"] == family), key=lambda row: row["bytes_fraction"])
        parts.append(
            f"{combination(best)}: {best['scanned_fraction']:.1%} scanned, {best['bytes_fraction']:.3f} of the bytes"
        )
    said = [f"At {target(rows[0])}, the cheapest of each family: {'; '.join(parts)}."] if parts else []
    return " ".join([*said, *_beside_the_oracle(rows), f"Sound rules lost {lost:,} keys."])


def _beside_the_oracle(rows: Sequence[Row]) -> list[str]:
    """The paper's AND with an oracle's thresholds, and what SUM leaves on the same balls."""
    said = []
    for row in rows:
        if row["rule"] != "oracle-and" or row["subspaces"] != 16:
            continue
        same = ("target", "group_len", "grouping", "enclosure", "center", "slicing")
        mine = (
            r
            for r in rows
            if r["rule"] == "sum" and r.get("subspaces") == 16 and all(r.get(n) == row.get(n) for n in same)
        )
        beside = "".join(f" and SUM {r['scanned_fraction']:.1%}" for r in mine)
        said.append(
            f"{combination(row)}, {target(row)}: the oracle's AND leaves {row['scanned_fraction']:.1%}{beside}."
        )
    return said[:4]


EXPERIMENT = Experiment(
    name="pruning",
    summary="How many keys each bound leaves to be read, and what that costs: a row per combination of the lists given.",
    claim="Balls of 4 keys in 16 subspaces with an AND over the subspaces leave 16.3% of the keys to be scanned.",
    caveat=(
        "The AND needs a threshold per subspace, and only an oracle that knows the true top has one that loses nothing: its rows stand here "
        "with guarantee none. Derived soundly from a score threshold, the AND rules out nothing; SUM is sound and stands beside it. "
        "The paper's figure is for larger models; ours is for the model of the rows."
    ),
    config=pruning.Config,
    run=pruning.run,
    columns=(
        Column(heading="bound", value=combination),
        Column(heading="keys wanted", value=target),
        Column(heading="scanned", value="scanned_fraction", spec=".1%"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="index / cache", value="index_bytes_fraction", spec=".3f"),
        Column(heading="work / dense", value="work_fraction", spec=".2f"),
        Column(heading="build, ms", value="build_ms", spec=",.0f"),
        Column(heading="query, µs", value="query_us", spec=",.0f"),
        Column(heading="lost", value="num_false_negatives", spec=",d"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="What each bound leaves to read",
            x="bytes_fraction",
            y=combination,
            series=target,
            x_axis=Axis(label="bytes read / bytes of dense attention", zero=True),
            y_axis=Axis(label=""),
            mark_x=1.0,
        ),
    ),
)
