"""What every policy keeps, how much that varies, and whether it delivers what it says: shown."""

from collections.abc import Sequence

from louver.experiments import policies
from louver.experiments.catalog.precision import ERROR_AGAINST_BYTES
from louver.experiments.chart import OUTPUT_ERROR, Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row

SHOWN_BY_STEP = ("mass:0.05", "budget:0.1", "error:0.2", "sample-mean-max", "sample-gap", "sample-budget:0.1")


def finding(rows: Sequence[Row]) -> str:
    """Violations, and how much the estimators' selections depend on their seed."""
    violations, asked = (sum(row.get(n) or 0 for row in rows) for n in ("num_bound_violations", "num_asked_violations"))
    said = [f"{violations} certificates were violated, and {asked} steps missed what was asked of them"]
    drawn = {r["policy"]: r["selected_cv_over_seeds"] for r in rows if r.get("selected_cv_over_seeds") is not None}
    if drawn:
        worst = max(drawn, key=lambda policy: drawn[policy])
        said.append(
            f"what a sampled threshold selects varies with the seed by {min(drawn.values()):.0%} to {drawn[worst]:.0%} ({worst}), "
            "what bounds select not at all"
        )
    return ". ".join(s[0].upper() + s[1:] for s in said) + "."


EXPERIMENT = Experiment(
    name="policies",
    summary="What every policy keeps, how much that varies, and whether it delivers what it says: a row per policy.",
    claim="The paper's guarantee is only as good as its threshold, and its estimators from a sample vary by up to 25%.",
    config=policies.Config,
    run=policies.run,
    columns=(
        Column(heading="policy", value="policy"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="selected", value="selected_fraction", spec=".2%"),
        Column(heading="CV", value="selected_cv", spec=".2f"),
        Column(heading="CV, seeds", value="selected_cv_over_seeds", spec=".2f"),
        Column(heading="error", value="output_error", spec=".2%"),
        Column(heading="median bound", value="output_error_bound_median", spec=".2g"),
        Column(heading="dropped", value="dropped_mass", spec=".2%"),
        Column(heading="bound", value="dropped_mass_bound", spec=".2%"),
        Column(heading="violated", value="num_bound_violations", spec="d"),
        Column(heading="missed", value="num_asked_violations", spec="d"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        ERROR_AGAINST_BYTES,
        Chart(
            title="Certificate against truth",
            x="output_error",
            y="output_error_bound_median",
            series="guarantee",
            label="policy",
            x_axis=OUTPUT_ERROR,
            y_axis=Axis(label="median certificate, relative", share=True, log=True),
        ),
        Chart(
            title="Does a policy spend where attention is diffuse?",
            x="selected_fraction",
            y="need_95_correlation",
            series="guarantee",
            label="policy",
            x_axis=Axis(label="share of the keys selected, mean", share=True, log=True),
            y_axis=Axis(label="rank correlation with the keys that hold 95% of the mass"),
        ),
        Chart(
            title="What was selected, step by step",
            of="rows_per_step",
            kind="lines",
            x="position",
            y="selected_fraction",
            series="policy",
            where=lambda row: row["policy"] in SHOWN_BY_STEP,
            x_axis=Axis(label="position of the query"),
            y_axis=Axis(label="share of the keys selected, mean over layers and heads", share=True, log=True),
        ),
        Chart(
            title="What 95% of the mass needed, step by step",
            of="rows_per_step",
            kind="lines",
            x="position",
            y="need_95_fraction",
            x_axis=Axis(label="position of the query"),
            y_axis=Axis(label="share of the keys, mean over layers and heads", share=True),
            where=lambda row: row["policy"] == "exact:0.01",
        ),
    ),
    quick={"stride": 64},
)
