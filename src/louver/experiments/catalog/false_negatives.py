"""What a lost key costs: shown."""

from collections.abc import Sequence

from louver.experiments import false_negatives
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """Per task: accuracy with nothing hidden, with the key it needs hidden, and with one it does not need hidden."""
    said = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = {row["hidden"]: row for row in reversed(rows) if row["task"] == task}
        parts = [
            f"{mine[kind]['accuracy']:.0%} with {words}"
            for kind, words in (
                ("nothing", "nothing hidden"),
                ("relevant", "the key it needs hidden"),
                ("separator", "a separator hidden"),
                ("other item", "a token of another item hidden"),
            )
            if kind in mine
        ]
        said.append(f"{task}: {', '.join(parts)}")
    return "; ".join(said) + "."


def _kind(row: Row) -> str:
    return f"{row['task']}, {row['hidden']}"


EXPERIMENT = Experiment(
    name="false-negatives",
    summary="Hide keys from the decode steps of a model and see whether its answers survive.",
    claim="Hiding one token changes nothing if it was a comma, and makes the answer wrong if it was a number to be added.",
    config=false_negatives.Config,
    run=false_negatives.run,
    columns=(
        Column(heading="task", value="task"),
        Column(heading="hidden", value="hidden"),
        Column(heading="keys", value="num_hidden", spec="d"),
        Column(heading="share", value="hidden_fraction", spec=".1%"),
        Column(heading="accuracy", value="accuracy", spec=".1%"),
        Column(heading="from", value="accuracy_low", spec=".1%"),
        Column(heading="to", value="accuracy_high", spec=".1%"),
        Column(heading="same tokens", value="top1_agreement", spec=".1%"),
        Column(heading="KL, nats", value="kl_nats", spec=".2g"),
        Column(heading="samples", value="num_samples", spec="d"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="One key hidden",
            x="accuracy",
            y=_kind,
            series="hidden",
            where=lambda row: row["hidden"] in ("nothing", "relevant", "separator", "other item", "first token"),
            x_axis=Axis(label="right answers", share=True, zero=True),
            y_axis=Axis(label=""),
        ),
        Chart(
            title="The cliff: keys hidden at every step, with and without the one that is needed",
            x="num_hidden",
            y="accuracy",
            interval=True,
            series=_kind,
            kind="lines",
            where=lambda row: row["hidden"] in ("irrelevant", "relevant", "relevant and irrelevant"),
            x_axis=Axis(label="keys hidden"),
            y_axis=Axis(label="right answers", share=True, zero=True),
        ),
        Chart(
            title="A random share of all keys hidden",
            x="hidden_fraction",
            y="accuracy",
            interval=True,
            series="task",
            kind="lines",
            where=lambda row: row["hidden"] in ("nothing", "random"),
            x_axis=Axis(label="share of the keys hidden", share=True, zero=True),
            y_axis=Axis(label="right answers", share=True, zero=True),
        ),
    ),
    quick={"num_samples": 12, "tasks": ("recall",), "counts": (1, 4), "fractions": (0.1,)},
)
