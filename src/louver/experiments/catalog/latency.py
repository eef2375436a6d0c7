"""What a decode step's attention takes as the cache grows: shown."""

from collections.abc import Sequence

from louver.experiments import latency
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def name(row: Row) -> str:
    """Policy, and the backend where Louver serves it."""
    return row["policy"] if row["backend"] == "torch" else f"{row['policy']} ({row['backend']})"


def finding(rows: Sequence[Row]) -> str:
    """At the longest cache, each policy against what it could be replaced with."""
    last = max(row["kv_len"] for row in rows)
    mine = [row for row in rows if row["kv_len"] == last and row["backend"] != "torch" and row["policy"] != "dense"]
    said = [
        f"{name(row)} takes {row['amortized_us'] / 1e3:.2f} ms, {row['speedup_vs_dense']:.2f} times as fast as our dense kernel on the same buffers, "
        f"{row['speedup_vs_sdpa']:.2f} as SDPA and {row['speedup_vs_eager']:.2f} as eager attention on a concatenated cache"
        for row in mine
    ]
    return f"At {last:,} tokens, building and appending included: {'; '.join(said)}."


EXPERIMENT = Experiment(
    name="latency",
    summary="What a decode step's attention takes as the cache grows, building and appending included.",
    claim="Louver decodes faster than dense attention, FlashAttention included, and its index is cheap to build and to append to.",
    caveat=(
        "On a CPU the opponent is torch's attention there; the GPU's figures, beside FlashAttention and cuDNN through SDPA, are rows of "
        "`louver bench --device cuda`. Below the length where a sketch pays, Louver runs dense."
    ),
    config=latency.Config,
    run=latency.run,
    timed=True,
    quick={"kv_lens": (2048, 8192), "shape": (9, 3, 64)},
    columns=(
        Column(heading="keys", value="kv_len", spec=",d"),
        Column(heading="way", value=name),
        Column(heading="step, µs", value="latency_us", spec=",.0f"),
        Column(heading="p20", value="latency_us_p20", spec=",.0f"),
        Column(heading="p80", value="latency_us_p80", spec=",.0f"),
        Column(heading="build, ms", value="build_ms", spec=",.1f"),
        Column(heading="with upkeep, µs", value="amortized_us", spec=",.0f"),
        Column(heading="vs our dense", value="speedup_vs_dense", spec=".2f"),
        Column(heading="vs SDPA in place", value="speedup_vs_sdpa_in_place", spec=".2f"),
        Column(heading="vs SDPA", value="speedup_vs_sdpa", spec=".2f"),
        Column(heading="vs eager", value="speedup_vs_eager", spec=".2f"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="A decode step's attention, building and appending included",
            x="kv_len",
            y="amortized_us",
            series=name,
            kind="lines",
            x_axis=Axis(label="keys in the cache", log=True),
            y_axis=Axis(label="µs", log=True),
        ),
    ),
)
