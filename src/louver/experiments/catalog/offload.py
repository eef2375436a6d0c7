"""A decode step whose exact keys and values are not on the GPU: shown."""

from collections.abc import Sequence

from louver.experiments import offload
from louver.experiments.chart import Axis, Chart
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def name(row: Row) -> str:
    """What finds the keys, and where they are."""
    found = row["policy"] if row["index"] in ("sketch", "none") else f"{row['index']}, {row['policy']}"
    return f"{found} ({row['store']})"


def finding(rows: Sequence[Row]) -> str:
    """Per policy with its tokens off the device: the gain on streaming, what moves, and what is lost."""
    said = []
    for row in rows:
        if row["index"] == "sketch" and row["store"] == "host":
            said.append(
                f"At {row['kv_len']:,} keys {row['policy']} takes {row['latency_us'] / 1e3:.2f} ms, "
                f"{row['speedup_vs_streamed']:.1f} times faster than streaming the cache, moves {row['moved_fraction']:.1%} "
                f"of it and has recall {row['recall']:.4g} (output error {row['output_error']:.2%})."
            )
    near = [row for row in rows if row["guarantee"] == "none"]
    if near:
        low, high = (f(near, key=lambda row: row["recall"]) for f in (min, max))
        said.append(
            f"Indexes on the CPU look up in {min(r['lookup_us'] for r in near) / 1e3:.1f} to "
            f"{max(r['lookup_us'] for r in near) / 1e3:.1f} ms and find {low['recall']:.1%} ({low['index']}) to "
            f"{high['recall']:.1%} ({high['index']})."
        )
    return " ".join(said)


EXPERIMENT = Experiment(
    name="offload",
    summary="A decode step whose exact keys and values are off the GPU: lookup, fetch, bytes moved, recall.",
    claim="With the cache in CPU memory, Louver looks up in 0.07 ms on the GPU where approximate indexes take 5 to 54 ms on the CPU.",
    config=offload.Config,
    run=offload.run,
    timed=True,
    quick={"kv_lens": (16384,), "ann_kv_lens": (16384,), "shape": (8, 2, 64), "repetitions": 5},
    columns=(
        Column(heading="keys", value="kv_len", spec=","),
        Column(heading="policy (where the tokens are)", value=name),
        Column(heading="step, µs", value="latency_us", spec=",.0f"),
        Column(heading="lookup, µs", value="lookup_us", spec=",.0f"),
        Column(heading="fetch, µs", value="fetch_us", spec=",.0f"),
        Column(heading="moved", value="moved_fraction", spec=".2%"),
        Column(heading="on the GPU", value="gpu_fraction", spec=".1%"),
        Column(heading="vs streaming", value="speedup_vs_streamed", spec=".1f"),
        Column(heading="vs resident", value="speedup_vs_resident", spec=".2f"),
        Column(heading="recall", value="recall", spec=".4f"),
        Column(heading="error", value="output_error", spec=".2%"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
    charts=(
        Chart(
            title="Recall against the time to look up",
            x="lookup_us",
            y="recall",
            series="index",
            label=name,
            x_axis=Axis(label="lookup, microseconds", log=True),
            y_axis=Axis(label="recall", share=True, zero=True),
        ),
    ),
)
