"""How far the attention output is off, against the bytes a step reads: shown."""

from collections.abc import Sequence

from louver.experiments import precision
from louver.experiments.chart import BYTES_READ, OUTPUT_ERROR, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """Error and bytes of the cheapest certified policy, beside each baseline; and whether a certificate failed."""
    certified = [row for row in rows if row["guarantee"] == "certified"]
    violations = sum(row["num_bound_violations"] or 0 for row in rows)
    named = sorted(certified, key=lambda row: row["bytes_fraction"])[:1] + [
        row for row in rows if row["guarantee"] == "none"
    ]
    said = [f"{row['policy']} errs by {row['output_error']:.2%} at {row['bytes_fraction']:.3f}" for row in named]
    return f"{'; '.join(said)} of the bytes. {violations} certificates were violated."


ERROR_AGAINST_BYTES = Chart(
    title="Error against bytes",
    x="bytes_fraction",
    y="output_error",
    series="guarantee",
    label="policy",
    x_axis=BYTES_READ,
    y_axis=OUTPUT_ERROR,
)

EXPERIMENT = Experiment(
    name="precision",
    summary="How far the attention output is off, against the bytes a step reads: a row per policy.",
    claim="The paper drops keys below its threshold and gives no bound on the output; Louver's certificates are its own.",
    caveat="`drop:F` is an oracle: no selector can do better at that share, and none knows the true scores without reading every key.",
    config=precision.Config,
    run=precision.run,
    columns=(
        Column(heading="policy", value="policy"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="mean error", value="output_error", spec=".2%"),
        Column(heading="p99", value="output_error_p99", spec=".2%"),
        Column(heading="median bound", value="output_error_bound_median", spec=".2g"),
        Column(heading="violations", value="num_bound_violations", spec="d"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(ERROR_AGAINST_BYTES,),
)
