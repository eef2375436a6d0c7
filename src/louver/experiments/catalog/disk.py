"""A cache of gigabytes in memory-mapped files: shown."""

from collections.abc import Sequence

from louver.experiments import disk
from louver.experiments.experiment import Column, Experiment
from louver.experiments.rows import Row


def finding(rows: Sequence[Row]) -> str:
    """How small the process stays beside its cache."""
    return " ".join(
        f"With {row['disk_bytes'] / 1e9:.1f} GB of {row['dtype']} cache on disk and {row['policy']}, the process's own memory is "
        f"{row['rss_anon_bytes'] / 1e9:.2f} GB, {row['rss_anon_fraction']:.1%} of it: the sketch's "
        f"{row['index_memory_fraction'] * row['disk_bytes'] / 1e9:.2f} GB, and torch."
        for row in rows
    )


EXPERIMENT = Experiment(
    name="disk",
    summary="A cache of gigabytes in memory-mapped files decodes: how much of the process's own memory that takes.",
    claim="The paper keeps its cache in CPU memory; files are Louver's own.",
    config=disk.Config,
    run=disk.run,
    timed=True,
    quick={"gigabytes": 0.1, "layers": 1, "steps": 2},
    columns=(
        Column(heading="policy", value="policy"),
        Column(heading="dtype", value="dtype"),
        Column(heading="layers", value="num_layers", spec="d"),
        Column(heading="keys per layer", value="kv_len", spec=","),
        Column(heading="on disk, GB", value=lambda row: row["disk_bytes"] / 1e9, spec=".2f"),
        Column(heading="RssAnon, GB", value=lambda row: row["rss_anon_bytes"] / 1e9, spec=".2f"),
        Column(heading="RssAnon / disk", value="rss_anon_fraction", spec=".1%"),
        Column(heading="index / cache", value="index_memory_fraction", spec=".1%"),
        Column(heading="step per layer, ms", value=lambda row: row["latency_us"] / 1e3, spec=".1f"),
        Column(heading="guarantee", value="guarantee"),
    ),
    finding=finding,
)
