"""Pictures of the experiments. They read result rows and nothing else; each returns a PNG."""

import importlib.util
import io
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from louver.experiments.plots import ACCENT, INK, QUIET, RULE
from louver.experiments.rows import Row

_BLUES = ("#9cc4dc", "#4d92bd", "#1f5f92", "#0b2e55")


def can_draw() -> bool:
    """Whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


def pruning_png(rows: Sequence[Row]) -> bytes:
    """Bytes read by each bound, a line per combination and a dot per target; hollow where nothing is guaranteed."""
    names = list(dict.fromkeys(combination(row) for row in rows))
    targets = list(dict.fromkeys(row["target"] for row in rows))
    with _figure(9.5, 1.6 + 0.26 * len(names)) as (figure, buffer):
        axes = figure.subplots()
        for row in rows:
            color = _BLUES[min(targets.index(row["target"]), 3)]
            hollow = row["guarantee"] == "none"
            place = (row["bytes_fraction"], len(names) - names.index(combination(row)))
            axes.plot(*place, "o", color=color, mfc="white" if hollow else color, ms=6.5)
        for target in targets:
            axes.plot([], [], "o", color=_BLUES[min(targets.index(target), 3)], label=f"k = {label(target)}")
        axes.set_yticks(range(len(names), 0, -1), names, fontsize=8)
        axes.axvline(1, color=ACCENT, lw=1)
        axes.set_xlim(0, max(1.02, *(row["bytes_fraction"] for row in rows)))
        axes.grid(axis="x", color=RULE, lw=0.6)
        axes.set_xlabel("bytes read / bytes of dense attention (hollow: no guarantee)")
        axes.legend(frameon=False, fontsize=8, ncol=len(targets), loc="lower right", bbox_to_anchor=(1, 1))
        _finish(axes, f"What each bound leaves to read   ({facts(rows[0])})")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def precision_png(rows: Sequence[Row]) -> bytes:
    """Output error against bytes; certified policies filled, the rest hollow."""
    with _figure(8.5, 5.4) as (figure, buffer):
        axes = figure.subplots()
        for row in rows:
            certified = row["guarantee"] != "none"
            color = _BLUES[2] if certified else ACCENT
            axes.plot(row["bytes_fraction"], row["output_error"], "o", color=color, mfc=color if certified else "white")
            axes.annotate(
                row["policy"],
                (row["bytes_fraction"], row["output_error"]),
                xytext=(6, 4),
                textcoords="offset points",
                fontsize=8,
            )
        _log_percent(axes)
        axes.set_xlim(0, 1.2 * max(row["bytes_fraction"] for row in rows))
        axes.grid(color=RULE, lw=0.6)
        axes.set_xlabel("bytes read / bytes of dense attention from a 16-bit cache   (hollow: no guarantee)")
        axes.set_ylabel("mean relative error of the attention output")
        _finish(axes, f"Error against bytes   ({facts(rows[0])})")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def profile_png(row: Row, per_layer: Sequence[Row], per_head: Sequence[Row]) -> bytes:
    """Keys needed, bytes and error, layer by layer, a dot per head."""
    with _figure(9.5, 8.0) as (figure, buffer):
        top, middle, bottom = figure.subplots(3, 1, sharex=True)
        layers = [one["layer"] for one in per_layer]
        for name, color in (("keys_for_90_fraction", _BLUES[1]), ("keys_for_99_fraction", _BLUES[3])):
            top.plot([h["layer"] for h in per_head], [h[name] for h in per_head], ".", color=color, alpha=0.4, mew=0)
            top.plot(layers, [one[name] for one in per_layer], color=color, label=name[9:11] + "% of the mass")
        _log_percent(top)
        top.legend(frameon=False, fontsize=8)
        top.set_ylabel("share of the keys")
        middle.bar(layers, [one["bytes_fraction"] for one in per_layer], color=_BLUES[1])
        middle.axhline(row["bytes_fraction"], color=INK, lw=0.8)
        middle.set_ylabel("bytes / dense")
        bottom.plot([h["layer"] for h in per_head], [h["output_error"] for h in per_head], ".", color=_BLUES[1], mew=0)
        bottom.plot(layers, [one["output_error"] for one in per_layer], color=_BLUES[3])
        _log_percent(bottom)
        bottom.set_ylabel("output error")
        bottom.set_xlabel("layer")
        _finish(top, f"Keys that hold the attention   ({facts(row)})")
        _finish(middle, f"Bytes that {row['policy']} reads")
        _finish(bottom, f"Relative output error of {row['policy']}")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def combination(row: Row) -> str:
    """What a pruning row was measured with, in a few words."""
    if row["index"] != "sketch":
        settings = [f"{row['subspaces']} x groups of {row['group_len']}"]
        settings += [str(row[n]) for n in ("grouping", "center", "slicing") if row.get(n) not in (None, *_USUAL)]
        return f"{row['index']} {row['rule']}  {', '.join(settings)}"
    planes = f", {row['planes']} planes" if row["planes"] > 1 else ""
    return f"{row['codec']}  {row['metric']} metric{planes}"


_USUAL = ("kcenter", "mean", "contiguous")


def label(target: str) -> str:
    """A target as people write it."""
    return f"{float(target):g}" if float(target) >= 1 else f"{100 * float(target):g}%"


def facts(row: Row) -> str:
    """Which model, how long."""
    return f"{str(row['data']).rsplit('/', 1)[-1]}, {row['kv_len']:,} tokens, {row['num_layers']} layers"


@contextmanager
def _figure(width: float, height: float):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"font.size": 9, "text.color": INK, "axes.edgecolor": RULE, "axes.labelcolor": QUIET}
    style |= {"xtick.color": QUIET, "ytick.color": QUIET, "text.parse_math": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), dpi=140, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, io.BytesIO()


def _log_percent(axes: Any) -> None:
    """A log axis of shares. With parse_math off, matplotlib's own labels would show their markup."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:g}%")
    axes.yaxis.set_minor_formatter(lambda y, _: "")


def _finish(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, weight="bold")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
