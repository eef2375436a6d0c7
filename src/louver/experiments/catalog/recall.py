"""Of the keys with the largest scores, how many each method finds: shown."""

from collections.abc import Sequence

from louver.experiments import recall
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def name(row: Row) -> str:
    """Method and setting."""
    return f"{row['index']}, {row['setting']}"


def finding(rows: Sequence[Row]) -> str:
    """Louver's recall, the span of the nearest-neighbour indexes, and what selections of k tokens find."""
    exact = [row for row in rows if row["guarantee"] == "exact"]
    lost, queries = (sum(row[n] for row in exact) for n in ("num_false_negatives", "num_queries"))
    said = (
        [f"Louver lost {lost:,} keys in {queries:,} queries (recall {min(row['recall'] for row in exact):.4g})."]
        if exact
        else []
    )
    near = [row for row in rows if row["index"] in ("hnsw", "ivf", "pq", "lsh")]
    if near:
        low, high = (f(near, key=lambda row: row["recall"]) for f in (min, max))
        said.append(
            f"Nearest-neighbour indexes found from {low['recall']:.1%} ({name(low)}, k = {low['k']}) "
            f"to {high['recall']:.1%} ({name(high)}, k = {high['k']}, {high['bytes_fraction']:.2f} of the bytes)."
        )
    equal = [row for row in rows if row["setting"] == "1 k tokens"]
    if equal:
        low, high = (f(equal, key=lambda row: row["recall"]) for f in (min, max))
        said.append(
            f"Selections of k tokens found from {low['recall']:.1%} ({low['index']}) to {high['recall']:.1%} ({high['index']})."
        )
    return " ".join(said)


EXPERIMENT = Experiment(
    name="recall",
    summary="Of the k keys with the largest scores, how many each method finds, and what that costs.",
    claim="Louver finds more than 99.9% of the relevant keys where approximate nearest-neighbour indexes find 60 to 93%.",
    caveat=(
        "Louver's recall is 1 by proof, whatever the model. Others' recalls depend on the setting, so each stands beside what it reads; given "
        "enough bytes (the same-time rows) some find nearly everything, without knowing it. H2O and SnapKV see the last window of the "
        "prompt only, so they stand for themselves in the quality experiments, not here. Trees find all and visit everything."
    ),
    config=recall.Config,
    run=recall.run,
    quick={"k": (20, 100), "stride": 32},
    columns=(
        Column(heading="method", value=name),
        Column(heading="k", value="k", spec="d"),
        Column(heading="recall", value="recall", spec=".4f"),
        Column(heading="lost per query", value="false_negatives_per_query", spec=".2f"),
        Column(heading="scanned", value="scanned_fraction", spec=".2%"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="index / cache", value="index_memory_fraction", spec=".2f"),
        Column(heading="search, µs", value="search_us", spec=",.0f"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="Recall against the bytes it costs",
            x="bytes_fraction",
            y="recall",
            series="index",
            x_axis=Axis(label="bytes read / bytes of dense attention", log=True),
            y_axis=Axis(label="recall", share=True, zero=True),
        ),
    ),
)
