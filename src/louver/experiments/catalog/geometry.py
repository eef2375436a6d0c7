"""Why nearest-neighbour search does not fit attention: shown."""

from collections.abc import Sequence

from louver.experiments import geometry
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """The widest span of norms, what cosine search finds, and indexes asked by keys and by queries."""

    def mean(name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    kinds = [name.removesuffix("_recall_keys") for name in rows[0] if name.endswith("_recall_keys")]
    asked = [
        f"{kind} finds {mean(kind + '_recall_keys'):.1%} for keys and {mean(kind + '_recall_queries'):.1%} for queries"
        for kind in kinds
    ]
    said = [
        f"Key norms differ {max(row['norm_ratio_max'] for row in rows):,.1f} times at most within a head; a cosine search finds "
        f"{mean('cosine_recall'):.1%} of the top {rows[0]['k']}.",
        f"Principal axes of queries and keys lie {mean('principal_angle'):.0f}° apart on average.",
        f"The set above one bar holds from {mean('above_bar_p5'):,.0f} to {mean('above_bar_p95'):,.0f} keys (5th to 95th percentile).",
    ]
    return " ".join([*said, *([f"Of indexes, {'; '.join(asked)}."] if asked else [])])


EXPERIMENT = Experiment(
    name="geometry",
    summary="Why nearest-neighbour search does not fit attention: norms, distributions, and sets that change their size.",
    claim=(
        "Key norms span 2,500 times on Qwen2.5-7B, queries lie outside the distribution of the keys, and the number of relevant keys "
        "varies, so a nearest-neighbour index loses keys."
    ),
    caveat=(
        "The span of norms is a property of the model, and small ones may show little of it. `louver capture Qwen/Qwen2.5-7B` and this experiment on its capture check the paper's figure where the model is at hand."
    ),
    config=geometry.Config,
    run=geometry.run,
    columns=(
        Column(heading="layer", value="layer", spec="d"),
        Column(heading="norms, max / min", value="norm_ratio", spec=",.1f"),
        Column(heading="first key / median", value="first_norm", spec=".2f"),
        Column(heading="recall by cosine", value="cosine_recall", spec=".1%"),
        Column(heading="means apart, spreads", value="mean_distance", spec=".2f"),
        Column(heading="covariance overlap", value="covariance_overlap", spec=".2f"),
        Column(heading="principal angle, °", value="principal_angle", spec=".0f"),
        Column(heading="HNSW, key asks", value="hnsw_recall_keys", spec=".1%"),
        Column(heading="HNSW, query asks", value="hnsw_recall_queries", spec=".1%"),
        Column(heading="IVF, key asks", value="ivf_recall_keys", spec=".1%"),
        Column(heading="IVF, query asks", value="ivf_recall_queries", spec=".1%"),
        Column(heading="above the bar, p5", value="above_bar_p5", spec=",.0f"),
        Column(heading="p50", value="above_bar_p50", spec=",.0f"),
        Column(heading="p95", value="above_bar_p95", spec=",.0f"),
    ),
    finding=finding,
    charts=tuple(
        Chart(
            title=title,
            x="layer",
            y=field,
            kind="lines",
            x_axis=Axis(label="layer"),
            y_axis=Axis(label=label, share=True, zero=True),
        )
        for title, field, label in (
            ("What a cosine search finds of the keys with the largest scores", "cosine_recall", "recall"),
            ("What HNSW finds for real queries", "hnsw_recall_queries", "recall"),
        )
    ),
)
