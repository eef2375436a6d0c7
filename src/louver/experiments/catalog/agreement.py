"""Whether a model that decodes through a policy says what it would have said: shown."""

from collections.abc import Sequence

from louver.experiments import agreement
from louver.experiments.chart import BYTES_READ, Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """The least bytes at which every prompt was continued with the same tokens, and what the baselines did."""
    same = [row for row in rows if row["num_equal_prompts"] == row["num_prompts"]]
    said = []
    if same:
        best = min(same, key=lambda row: row["bytes_fraction"])
        said.append(
            f"{best['policy']} continued all {best['num_prompts']} prompts with dense attention's tokens at "
            f"{best['bytes_fraction']:.3f} of its bytes"
        )
    said += [
        f"{row['policy']}: {row['num_equal_prompts']} of {row['num_prompts']} at {row['bytes_fraction']:.3f}, "
        f"KL {row['kl_nats']:.1e}"
        for row in rows
        if row["guarantee"] == "none"
    ]
    violations = sum((row["num_bound_violations"] or 0) + (row["num_asked_violations"] or 0) for row in rows)
    return "; ".join([*said, f"{violations} certificates were violated or missed"]) + "."


EXPERIMENT = Experiment(
    name="agreement",
    summary="Does a model that decodes through a policy say what it would have said? A row per policy.",
    claim="The paper reports tasks; here every next-token distribution is compared with dense attention's.",
    config=agreement.Config,
    run=agreement.run,
    resumes=True,
    columns=(
        Column(heading="policy", value="policy"),
        Column(heading="bytes / dense", value="bytes_fraction", spec=".3f"),
        Column(heading="same text", value=lambda row: f"{row['num_equal_prompts']} of {row['num_prompts']}"),
        Column(heading="same token", value="top1_agreement", spec=".1%"),
        Column(heading="KL, nats", value="kl_nats", spec=".1e"),
        Column(heading="p99", value="kl_nats_p99", spec=".1e"),
        Column(heading="violated", value="num_bound_violations", spec="d"),
        Column(heading="missed", value="num_asked_violations", spec="d"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="Divergence against bytes",
            x="bytes_fraction",
            y="kl_nats",
            series="guarantee",
            label="policy",
            x_axis=BYTES_READ,
            y_axis=Axis(label="mean KL from dense attention, nats", log=True),
        ),
    ),
    quick={"prompts": (0,), "prompt_tokens": 1000, "steps": 16},
)
