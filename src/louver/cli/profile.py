"""``louver profile``: would Louver help my model at my length?"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from louver.cli.console import Stages, console, errors, reports_errors
from louver.experiments.charts import can_draw, facts, profile_png
from louver.experiments.profile import Config, Profile, run
from louver.experiments.report import PROFILE, build_one
from louver.experiments.rows import machine, write_bytes, write_rows, write_text
from louver.files import check_writable


@reports_errors
def profile(
    model: Annotated[str | None, typer.Argument(help="A folder or hub name. Default: a 135M model, offline.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file. Default: Python's own help topics.")] = None,
    tokens: Annotated[int, typer.Option(min=128, help="Cut the text here: profile at the length you serve.")] = 4096,
    wanted_error: Annotated[float, typer.Option(help="Mean relative output error that is good enough.")] = 0.01,
    backend: Annotated[str, typer.Option(help="Which kernels; auto is the fastest here.")] = "auto",
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: Annotated[Path, typer.Option(help="The picture to write.")] = Path("louver-profile.png"),
    page: Annotated[Path, typer.Option("--html", help="The page to write.")] = Path("louver-profile.html"),
) -> None:
    """Look at every layer and head of a model reading a text, and say what Louver would read and miss."""
    check_writable(json, plot, page)
    config = Config(model=model, prompt_file=prompt_file, max_tokens=tokens, wanted_error=wanted_error, backend=backend)
    with Stages() as stages:
        found = run(config, stages, say=lambda line: errors.print(line, style="dim"))
    more = {name: value for name, value in vars(found).items() if name != "rows"}
    if json is not None:
        write_rows(json, found.rows, seed=0, **more)
    console.print(report(found, config.shown))
    if can_draw():
        shown = next(row for row in found.rows if row["policy"] == config.shown)
        write_bytes(plot, profile_png(shown, found.rows_per_layer, found.rows_per_head))
        console.print(f"\nWrote {plot}", style="dim")
    document = {"machine": machine(0), "rows": found.rows, **more}
    write_text(page, build_one(PROFILE, json.name if json else "no file (see --json)", document))
    console.print(f"Wrote {page}", style="dim")


def report(found: Profile, shown: str) -> Group:
    """A line per layer, a line per policy, and what to do. Heads are in the picture and the JSON file."""
    measured = "bytes_fraction_measured" in found.rows_per_layer[0]
    layers = Table(title=f"{facts(found.rows[0])}: layers under {shown}", title_justify="left", box=None)
    figures = ("for 90%", "for 99%", "bytes", *(["measured"] if measured else []))
    for name in ("layer", *figures, "speed", "error", "worst", "use"):
        layers.add_column(name, justify="right", no_wrap=True)
    for row in found.rows_per_layer:
        worst = max(h["output_error"] for h in found.rows_per_head if h["layer"] == row["layer"])
        layers.add_row(
            str(row["layer"]),
            f"{row['keys_for_90_fraction']:.1%}",
            f"{row['keys_for_99_fraction']:.1%}",
            f"{row['bytes_fraction']:.3f}",
            *([f"{row['bytes_fraction_measured']:.3f}"] if measured else []),
            f"{row['speedup_attention_predicted']:.1f}x",
            f"{row['output_error']:.2%}",
            f"{worst:.2%}",
            row["recommended_policy"],
        )
    said = "Keys that hold 90 and 99% of the mass; bytes over dense, predicted and measured; the worst head's error"
    layers.caption, layers.caption_justify = said, "left"
    policies = Table(title="\nPredicted from bytes", title_justify="left", box=None)
    policies.add_column("policy")
    for name in ("bytes / dense", "mean error", "attention", "whole step", "index memory"):
        policies.add_column(name, justify="right")
    for row in found.rows:
        policies.add_row(
            row["policy"],
            f"{row['bytes_fraction']:.3f}",
            f"{row['output_error']:.2%}",
            f"{row['speedup_attention_predicted']:.1f}x",
            f"{row['speedup_step_predicted']:.2f}x",
            f"{row['index_memory_fraction']:.0%} of the cache",
        )
    advice = found.recommendation
    seen = next(row for row in found.rows if row["policy"] == shown)
    check = ""
    if measured:
        check = (
            f"\nDecoding the text's end through a LouverCache read {seen['bytes_fraction_measured']:.3f} of dense bytes: the "
            f"prediction of {seen['bytes_fraction']:.3f} is off by {seen['prediction_error']:+.1%}."
        )
    return Group(
        layers,
        policies,
        Text(check),
        Text(timing(found)),
        Text.assemble("\nUse ", (advice["policy"], "bold"), f": {advice['why']}."),
    )


def timing(found: Profile) -> str:
    """The time of a step on this device, predicted and measured, and from which length on the sketch is faster."""
    if not found.rows_by_length:
        return ""
    (here, dense, *further), figures = found.rows_by_length, found.kernel_times
    crossover = figures["crossover_tokens"]
    where = f"from {crossover:,} tokens on" if crossover is not None else "at no length"
    lines = [
        f"\nA step here: {here['step_ms']:.1f} ms predicted from kernel figures, {here['step_ms_measured']:.1f} measured "
        f"({here['step_ms_error']:+.0%}); dense {dense['step_ms']:.1f}, {dense['step_ms_measured']:.1f} measured "
        f"({dense['step_ms_error']:+.0%}). {figures['beside_attention_ms']:.1f} ms are not attention. The sketch pays {where}."
    ]
    for row in further[::2]:
        lines.append(
            f"At {row['kv_len']:,} tokens: {row['step_ms']:.1f} ms, {row['speedup_vs_dense']:.2f} times as fast as dense, predicted."
        )
    return "\n".join(lines)
