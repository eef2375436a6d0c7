"""The profile as a page: layers, heads, and the time of a step on this device, by the report's own means."""

from collections.abc import Sequence

from louver.experiments import profile
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment, Outcome, Progress, no_progress
from louver.experiments.rows import Row

_LAYER = Axis(label="layer")


def finding(rows: Sequence[Row]) -> str:
    """What the policy shown reads and takes, predicted and measured."""
    row = next((row for row in rows if "step_ms" in row), None)
    cheapest = min(rows, key=lambda row: row["bytes_fraction"])
    said = f"{cheapest['policy']} reads {cheapest['bytes_fraction']:.1%} of dense bytes, mean output error {cheapest['output_error']:.2%}."
    if row is None:
        return f"{said} No step was timed."
    return (
        f"{said} At {row['kv_len']:,} tokens a step under {row['policy']} was predicted to take {row['step_ms']:.1f} ms and took "
        f"{row['step_ms_measured']:.1f} ms (error {row['step_ms_error']:+.0%}); with dense attention {row['step_ms_dense']:.1f} and "
        f"{row['step_ms_dense_measured']:.1f} ms ({row['step_ms_dense_error']:+.0%}). Louver's step is {row['speedup_vs_dense']:.2f} times as fast "
        f"by prediction, {row['speedup_vs_dense_measured']:.2f} times as measured."
    )


def measured(config: profile.Config, on_progress: Progress = no_progress) -> Outcome:
    """A profile as experiments give theirs: rows, and the rest by name."""
    found = vars(profile.run(config, on_progress))
    return found["rows"], {name: value for name, value in found.items() if name != "rows"}


PROFILE = Experiment(
    name="profile",
    summary="Would Louver help this model at this length? Every layer and head looked at, and the time of a step on this device.",
    claim="",
    caveat=(
        "Times are predicted from kernel figures of synthetic keys in the model's shape, and from the profiled shares of exact keys, which "
        "are taken to stay as they are at other lengths. They were measured at the profiled length only: the error there is the one known. "
        "The column attention, from bytes says what a machine limited by memory alone would gain."
    ),
    config=profile.Config,
    run=measured,
    columns=(
        Column(heading="policy", value="policy"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="measured", value="bytes_fraction_measured", spec=".3f"),
        Column(heading="mean error", value="output_error", spec=".2%"),
        Column(heading="attention, from bytes", value="speedup_attention_predicted", spec=".1f"),
        Column(heading="step, ms", value="step_ms", spec=".1f"),
        Column(heading="measured", value="step_ms_measured", spec=".1f"),
        Column(heading="dense, ms", value="step_ms_dense", spec=".1f"),
        Column(heading="measured", value="step_ms_dense_measured", spec=".1f"),
        Column(heading="index / cache", value="index_memory_fraction", spec=".2f"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="Time of a step, predicted",
            of="rows_by_length",
            x="kv_len",
            y="step_ms",
            series="policy",
            x_axis=Axis(label="tokens", log=True),
            y_axis=Axis(label="milliseconds", zero=True),
            kind="lines",
        ),
        Chart(
            title="Keys that hold 99% of each head's attention",
            of="rows_per_head",
            x="layer",
            y="keys_for_99_fraction",
            x_axis=_LAYER,
            y_axis=Axis(label="share of the keys", share=True, log=True),
        ),
        Chart(
            title="Bytes each layer reads",
            of="rows_per_layer",
            x="layer",
            y="bytes_fraction",
            series=lambda row: f"{row['recommended_policy']} is enough",
            x_axis=_LAYER,
            y_axis=Axis(label="bytes / dense", zero=True),
        ),
        Chart(
            title="Output error of each head",
            of="rows_per_head",
            x="layer",
            y="output_error",
            x_axis=_LAYER,
            y_axis=Axis(label="relative output error", share=True, log=True),
        ),
    ),
)
