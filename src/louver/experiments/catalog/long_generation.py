"""A thousand tokens and more: shown."""

from collections.abc import Sequence

from louver.experiments import long_generation
from louver.experiments.chart import BYTES_READ, Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """KL in the first and the last quarter, and how long each method stays on dense attention's own text."""
    said = []
    for row in rows:
        first, last = row["kl_nats_quarters"][0], row["kl_nats_quarters"][-1]
        own = f", {row['num_equal_tokens']:.0f} tokens equal when it goes on alone" if "num_equal_tokens" in row else ""
        said.append(f"{row['policy']}: KL {first:.2g} in the first quarter, {last:.2g} in the last{own}")
    return f"Over {rows[0]['num_tokens']:,} tokens: {'; '.join(said)}."


EXPERIMENT = Experiment(
    name="long-generation",
    summary="Agreement and KL over a thousand decoded tokens, fed dense attention's text and going on alone.",
    claim="Errors of sparse attention accumulate over long reasoning traces.",
    config=long_generation.Config,
    run=long_generation.run,
    resumes=True,
    columns=(
        Column(heading="method", value="policy"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="tokens", value="num_tokens", spec=",d"),
        Column(heading="KL, nats", value="kl_nats", spec=".2g"),
        Column(heading="first quarter", value=lambda row: row["kl_nats_quarters"][0], spec=".2g"),
        Column(heading="last quarter", value=lambda row: row["kl_nats_quarters"][-1], spec=".2g"),
        Column(heading="same token", value="top1_agreement", spec=".2%"),
        Column(heading="equal alone", value="num_equal_tokens", spec=",.0f"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="KL over a long generation, fed dense attention's tokens",
            x="bytes_fraction",
            y="kl_nats",
            label="policy",
            x_axis=BYTES_READ,
            y_axis=Axis(label="KL(dense || method), nats", log=True),
        ),
    ),
    quick={"kv_len": 300, "num_steps": 64},
)
