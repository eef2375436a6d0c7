"""How the demo looks in a terminal."""

import math
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from louver.experiments.demo import Demo

Lines = list[tuple[str, Text | str, str]]

_SPARKS = "▁▂▃▄▅▆▇█"
_STEPS_PER_LINE = 40


def report(demo: Demo) -> RenderableType:
    """Everything the demo found, on one screen."""
    dense, shipped, louver = demo.rows[0], demo.rows[1], demo.rows[-1]
    parts = [
        _headline(louver),
        _answers(demo.texts, louver),
        _table("Did the answer change?", _agreement(demo, louver)),
        _table("What a decode step read", _reading(louver)),
        _table("How far off it was, and how far it could have been", _errors(louver)),
        _table("What it costs", _cost(dense, shipped, louver)),
    ]
    return Group(*(Padding(part, (1, 0, 0, 0)) for part in parts))


def _headline(row: dict[str, Any]) -> Text:
    read, error = f"{row['bytes_fraction']:.0%}", _percent(row["output_error"])
    return Text.assemble(
        ("Louver ", "bold"),
        (row["policy"], "bold cyan"),
        f" over {row['kv_len']:,} tokens: read ",
        (read, "bold green"),
        " of what dense attention reads, with ",
        (error, "bold green"),
        " mean output error and ",
        _verdict(row["num_false_negatives"] == 0, f"recall {row['recall']:.1f}" if row["recall"] == 1 else "keys lost"),
    )


def _answers(texts: dict[str, str], row: dict[str, Any]) -> Panel:
    lines = [Text(texts["question"], style="italic")]
    if texts["dense"] == texts["louver"]:
        lines += [Text.assemble(("dense = Louver  ", "green"), _one_line(texts["dense"]))]
    else:
        lines += [
            Text.assemble(("dense   ", "dim"), _one_line(texts["dense"])),
            Text.assemble(("Louver  ", "cyan"), _one_line(texts["louver"])),
        ]
    return Panel(Group(*lines), border_style="dim", title=f"{row['num_tokens']} tokens, greedy", title_align="left")


def _agreement(demo: Demo, row: dict[str, Any]) -> Lines:
    ticks = Text()
    for i, step in enumerate(demo.rows_per_step):
        if i and i % _STEPS_PER_LINE == 0:
            ticks.append("\n")
        same = step["dense_token"] == step["louver_token"]
        ticks.append("■" if same else "□", style="green" if same else "red")
    kl = [step["kl_nats"] for step in demo.rows_per_step]
    lines: Lines = [
        ("tokens equal", f"{row['num_equal_tokens']} of {row['num_tokens']}", ""),
        ("token by token", ticks, ""),
        (
            "KL per step",
            _sparkline(kl),
            f"mean {row['kl_nats']:.1e}, worst {row['kl_nats_max']:.1e} nats; a bar per decade",
        ),
    ]
    if "num_equal_tokens_flat" in row:
        flat = f"{row['num_equal_tokens_flat']} of {row['num_tokens']}"
        lines.insert(
            1, ("equal to a search", flat, "that reads every key: what differs from dense is the policy's doing")
        )
    first = row["first_divergence"]
    if first is not None:
        step = demo.rows_per_step[first]
        why = (
            f"{step['dense_text']!r} became {step['louver_text']!r}; KL {step['kl_nats']:.1e} nats, and dense attention's own "
            f"best token led by {step['dense_margin']:.3f}"
        )
        lines.append(("parted at", f"token {first + 1}", why))
    return lines


def _reading(row: dict[str, Any]) -> Lines:
    lines: Lines = [
        ("bytes", f"{row['bytes_fraction']:.1%}", "of what dense attention reads from a 16-bit cache"),
        (
            "keys exact",
            f"{row['exact_fraction']:.1%}",
            "read in full, key and value; counts the newest, unsketched tokens",
        ),
    ]
    if row["coarse_fraction"] or row["unread_fraction"]:
        lines += [
            ("keys sketched", f"{row['coarse_fraction']:.1%}", "4-bit key and 4-bit value"),
            ("values unread", f"{row['unread_fraction']:.1%}", "4-bit key; their mass is provably small"),
        ]
    elif row["exact_fraction"] < 1:
        dropped = f"true mass {_percent(row['dropped_mass'])}, certified {_percent(row['dropped_mass_bound'])}"
        lines.append(("keys dropped", f"{1 - row['exact_fraction']:.1%}", dropped))
    return lines


def _errors(row: dict[str, Any]) -> Lines:
    checked = f"{row['num_checked']:,} outputs (layer × head × step) against float64"
    found = f"{row['num_relevant'] - row['num_false_negatives']:,} of {row['num_relevant']:,} keys at or above tau were exact"
    return [
        ("recall", _verdict(row["num_false_negatives"] == 0, f"{row['recall']:.4f}"), found),
        (
            "output error",
            _percent(row["output_error"]),
            f"mean; 99th percentile {_percent(row['output_error_p99'])}; {checked}",
        ),
        (
            "certified error",
            _percent(row["output_error_bound_p50"]),
            f"median; sound and loose (arithmetic alone {_percent(row['arithmetic_bound'])})",
        ),
        ("bound violations", _verdict(row["num_bound_violations"] == 0, str(row["num_bound_violations"])), ""),
    ]


def _cost(dense: dict[str, Any], shipped: dict[str, Any], row: dict[str, Any]) -> Lines:
    slower = row["latency_vs_dense"]
    lines: Lines = [
        (
            f"{row['index']} memory",
            f"{row['index_memory_fraction_16bit']:.0%}",
            f"of a 16-bit cache; here {row['index_bytes'] / 2**20:.0f} MiB beside {row['keys_values_bytes'] / 2**20:.0f} MiB "
            f"of {row['dtype']}",
        ),
        (
            "time per token",
            f"{row['latency_us_p50'] / 1e3:,.0f} ms",
            f"dense {dense['latency_us_p50'] / 1e3:,.0f} ms on the same buffers, {shipped['latency_us_p50'] / 1e3:,.0f} ms as "
            "transformers ships it (medians, in turn)",
        ),
    ]
    if row["index"] != "sketch":
        lines.append(
            ("", "", f"{slower:.1f}× dense: only the sketch has compiled kernels, this index runs in plain PyTorch")
        )
    elif row["backend"] == "reference" and slower > 1:
        why = (
            f"{slower:.1f}× dense: the reference backend is the specification in plain PyTorch; it unpacks every 4-bit code "
            "into floats, so it moves more memory than it saves"
        )
        lines.append(("", "", why))
    return lines


def _table(title: str, lines: Lines) -> Table:
    table = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    table.add_column(style="dim", min_width=16, no_wrap=True)
    table.add_column(min_width=8, no_wrap=True)
    table.add_column(style="dim")
    for name, value, note in lines:
        table.add_row(name, value, note)
    return table


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _verdict(good: bool, text: str) -> Text:
    return Text(text, style="bold green" if good else "bold red")


def _sparkline(values: list[float]) -> Text:
    """One bar per value and decade: the lowest is 1e-7 or less, the highest 1 or more."""
    levels = [min(7, max(0, int(8 + math.log10(max(value, 1e-9))))) for value in values]
    lines = [levels[i : i + _STEPS_PER_LINE] for i in range(0, len(levels), _STEPS_PER_LINE)]
    return Text("\n".join("".join(_SPARKS[level] for level in line) for line in lines), style="cyan")


def _percent(share: float) -> str:
    return f"{share:.2%}" if share >= 0.0005 else f"{share:.0e}".replace("e-0", "e-")
