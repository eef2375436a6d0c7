"""Right answers against bytes read: shown."""

from collections.abc import Sequence

from louver.experiments import quality
from louver.experiments.chart import BYTES_READ, Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """Over all tasks the model can do: each method's accuracy beside dense attention's, and its bytes; what is no verdict is said."""
    pooled = [row for row in rows if row["task"] == quality.ALL and row["kv_len"] is None]
    if not pooled:
        return "The model can do none of these tasks, so they say nothing about methods."
    dense = next(row for row in pooled if row["policy"] == "dense")
    said = [
        f"{row['policy']} {row['accuracy']:.1%} at {row['bytes_fraction']:.2f}"
        + ("" if row["within_dense_interval"] else " (outside dense attention's interval)")
        for row in pooled
        if row["policy"] != "dense"
    ]
    cells = [row for row in rows if row["task"] != quality.ALL]
    weak = sum(not row["is_verdict"] for row in cells)
    return (
        f"Dense attention answers {dense['accuracy']:.1%} right ({dense['num_samples']:,} samples). Beside it, at a share of "
        f"the bytes: {'; '.join(said)}. {weak} of {len(cells)} single rows have intervals wider than ten points either way: no verdict."
    )


def _family(row: Row) -> str:
    return row["policy"].partition(":")[0]


def _verdict(row: Row) -> str:
    return "yes" if row["is_verdict"] else "no"


EXPERIMENT = Experiment(
    name="quality",
    summary="Right answers to long-context tasks against bytes read, for every method after the same prompts.",
    claim="At a budget of 10% Louver answers as well as full attention, other sparse methods do not.",
    config=quality.Config,
    run=quality.run,
    resumes=True,
    columns=(
        Column(heading="task", value="task"),
        Column(heading="tokens", value="kv_len", spec=",d"),
        Column(heading="method", value="policy"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="accuracy", value="accuracy", spec=".1%"),
        Column(heading="from", value="accuracy_low", spec=".1%"),
        Column(heading="to", value="accuracy_high", spec=".1%"),
        Column(heading="against dense", value="accuracy_gain", spec="+.1%"),
        Column(heading="KL, nats", value="kl_nats", spec=".2g"),
        Column(heading="verdict", value=_verdict),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="Right answers over all tasks the model can do",
            x="bytes_fraction",
            y="accuracy",
            series=_family,
            label="policy",
            kind="lines",
            where=lambda row: row["task"] == quality.ALL and row["kv_len"] is None,
            interval=True,
            x_axis=BYTES_READ,
            y_axis=Axis(label="right answers", share=True, zero=True),
        ),
    ),
    quick={
        "num_samples": 8,
        "kv_lens": (512,),
        "tasks": ("single-needle", "quote"),
        "policies": ("dense", "exact:0.01", "budget:0.1", "kivi4", "streaming:0.2", "quest:0.2"),
        "floor": 0.0,
    },
)
