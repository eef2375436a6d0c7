"""How many keys hold the attention, step by step: shown."""

from collections.abc import Sequence

from louver.experiments import coverage
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """The spread of the widest share, and what the model was writing there."""
    said = [
        f"{row['share']:.0%} of the mass took {row['keys']:,.0f} keys on average ({row['keys_fraction']:.1%})"
        for row in rows
    ]
    last = rows[-1]
    return (
        f"{'; '.join(said)}. For {last['share']:.0%}, the mean over heads went from {last['narrowest_keys']:,.0f} keys "
        f"(at “{last['narrowest_text']}”) to {last['widest_keys']:,.0f} (at “{last['widest_text']}”)."
    )


def _line(share: str) -> Chart:
    return Chart(
        title=f"Keys that hold {share}% of the attention, mean over layers and heads",
        of="rows_per_step",
        x="step",
        y=f"keys_for_{share}",
        kind="lines",
        x_axis=Axis(label="decode step"),
        y_axis=Axis(label="keys", zero=True),
    )


EXPERIMENT = Experiment(
    name="coverage",
    summary="Over a long greedy generation, how many keys hold 50, 90 and 99% of the attention at each step.",
    claim="How many keys a step needs changes from step to step, so a fixed top k is either too many or too few.",
    caveat="These are one small model's heads and one text; `--model` and `--prompt-file` take others.",
    config=coverage.Config,
    run=coverage.run,
    quick={"tokens": 2048, "max_new_tokens": 96},
    columns=(
        Column(heading="share of the mass", value="share", spec=".0%"),
        Column(heading="keys, mean", value="keys", spec=",.0f"),
        Column(heading="p20", value="keys_p20", spec=",.0f"),
        Column(heading="p50", value="keys_p50", spec=",.0f"),
        Column(heading="p80", value="keys_p80", spec=",.0f"),
        Column(heading="most", value="keys_max", spec=",.0f"),
        Column(heading="of the cache", value="keys_fraction", spec=".1%"),
        Column(heading="widest at", value="widest_text"),
        Column(heading="narrowest at", value="narrowest_text"),
    ),
    finding=finding,
    charts=(_line("50"), _line("90"), _line("99")),
)
