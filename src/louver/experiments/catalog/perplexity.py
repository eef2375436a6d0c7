"""Perplexity and KL on long text: shown."""

from collections.abc import Sequence

from louver.experiments import perplexity
from louver.experiments.chart import BYTES_READ, Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """Each method's change in perplexity with its interval, and its KL."""
    dense = next(row for row in rows if row["policy"] == "dense")
    said = [
        f"{row['policy']} {row['perplexity_change']:+.2%} ({row['perplexity_change_low']:+.2%} to "
        f"{row['perplexity_change_high']:+.2%}) and {row['kl_nats']:.2g} nats at {row['bytes_fraction']:.2f} of the bytes"
        for row in rows
        if row["policy"] != "dense"
    ]
    return f"Dense: {dense['perplexity']:.3f} over {dense['num_tokens']:,} tokens. {'; '.join(said)}."


def _family(row: Row) -> str:
    return row["policy"].partition(":")[0]


EXPERIMENT = Experiment(
    name="perplexity",
    summary="Perplexity, KL and agreement on long text, token by token, for every method after the same reading.",
    claim="Louver decodes as full attention does while it reads a fraction of the cache.",
    config=perplexity.Config,
    run=perplexity.run,
    resumes=True,
    columns=(
        Column(heading="method", value="policy"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="perplexity", value="perplexity", spec=".3f"),
        Column(heading="change", value="perplexity_change", spec="+.2%"),
        Column(heading="from", value="perplexity_change_low", spec="+.2%"),
        Column(heading="to", value="perplexity_change_high", spec="+.2%"),
        Column(heading="KL, nats", value="kl_nats", spec=".2g"),
        Column(heading="p99", value="kl_nats_p99", spec=".2g"),
        Column(heading="same token", value="top1_agreement", spec=".1%"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=tuple(
        Chart(
            title=title,
            x="bytes_fraction",
            y=y,
            series=_family,
            label="policy",
            kind="lines",
            where=lambda row: row["policy"] != "dense",
            x_axis=BYTES_READ,
            y_axis=axis,
        )
        for title, y, axis in (
            ("KL against bytes", "kl_nats", Axis(label="KL(dense || method), nats", log=True)),
            ("Perplexity against bytes", "perplexity", Axis(label="perplexity", log=True)),
        )
    ),
    quick={
        "kv_len": 480,
        "num_steps": 16,
        "num_samples": 4,
        "policies": ("dense", "exact:0.01", "budget:0.1", "fp8", "kivi4", "streaming:0.2", "quest:0.2"),
    },
)
