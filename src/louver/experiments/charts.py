"""Pictures of the experiments. They read result rows and nothing else; each returns a PNG."""

import importlib.util
import io
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

from louver.experiments.chart import Axis, Chart
from louver.experiments.plots import ACCENT, INK, QUIET, RULE
from louver.experiments.rows import Row

_COLORS = (
    "#1f5f92", ACCENT, "#3f7d4e", "#8a5fa8", "#a67c00", "#66727f", "#0b2e55", "#4d92bd", "#b5527b", "#7fae3c", "#2f9c95", "#c98f6b",
)  # fmt: skip
_BLUES = ("#9cc4dc", "#4d92bd", "#1f5f92", "#0b2e55")


def can_draw() -> bool:
    """Whether matplotlib is here."""
    return importlib.util.find_spec("matplotlib") is not None


def chart_png(chart: Chart, rows: Sequence[Row]) -> bytes:
    """Draw a chart; marks of rows without a guarantee are hollow."""
    points = chart.points(rows)
    series = list(dict.fromkeys(point["series"] for point in points))
    lines = list(dict.fromkeys(point["y"] for point in points)) if chart.dots(points) else []
    with _figure(9.5, 1.6 + 0.26 * len(lines) if lines else 5.4) as (figure, buffer):
        axes, labels = figure.subplots(), []
        for number, name in enumerate(series):
            mine, color = [point for point in points if point["series"] == name], _COLORS[number % len(_COLORS)]
            shape = "o" if number < len(_COLORS) else "s"
            place = [(p["x"], len(lines) - lines.index(p["y"]) if lines else p["y"]) for p in mine]
            if chart.kind == "lines":
                axes.plot(*zip(*place, strict=True), color=color, lw=1.4)
            for (x, y), point in zip(place, mine, strict=True):
                axes.plot(x, y, shape, color=color, mfc=color if point["proven"] else "white", ms=5.5)
                if chart.interval:
                    axes.vlines(x, point["low"], point["high"], color=color, lw=0.8, alpha=0.6)
                if point["label"]:
                    labels.append((point["label"].removeprefix(f"{name}:"), float(x), float(y)))
            axes.plot([], [], shape, color=color, label=name)
        _scale(axes.xaxis, chart.x_axis)
        if lines:
            axes.set_yticks(range(len(lines), 0, -1), lines, fontsize=8)
        else:
            _scale(axes.yaxis, chart.y_axis)
        if chart.mark_x is not None:
            axes.axvline(chart.mark_x, color=ACCENT, lw=1)
        axes.grid(axis="x" if lines else "both", color=RULE, lw=0.6)
        axes.set_xlabel(f"{chart.x_axis.label}   (hollow: no guarantee)")
        axes.set_ylabel(chart.y_axis.label)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
        shared = (
            {name: value for name, value in rows[0].items() if all(row.get(name) == value for row in rows)}
            if rows
            else {}
        )
        _finish(axes, f"{chart.title}   ({facts(shared)})" if facts(shared) else chart.title)
        _write(axes, labels)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _write(axes: Any, labels: Sequence[tuple[str, float, float]]) -> None:
    """Write a label beside each point, on the first side where it covers no other label and no other point."""
    figure = axes.figure
    figure.draw_without_rendering()  # so that limits and layout are what they will be
    points = [tuple(axes.transData.transform((x, y))) for _, x, y in labels]
    taken = []
    for (text, x, y), own in zip(labels, points, strict=True):
        others = [point for point in points if point != own]
        for side, xytext in (
            ("left", (6, 4)),
            ("left", (6, -10)),
            ("right", (-6, 4)),
            ("right", (-6, -10)),
            ("center", (0, 14)),
        ):
            label = axes.annotate(text, (x, y), xytext=xytext, textcoords="offset points", ha=side, fontsize=8)
            box = label.get_window_extent(figure.canvas.get_renderer())
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*point) for point in others):
                taken.append(box)
                break
            label.remove()
        else:  # crowded everywhere: where a reader looks for it
            axes.annotate(text, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8)


def _scale(axis: Any, described: Axis) -> None:
    if described.log:
        getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_formatter(lambda value, _: described.text(value))
    axis.set_minor_formatter(lambda value, _: "")
    if described.zero:
        getattr(axis.axes, f"set_{axis.axis_name}lim")(0)


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
        if "bytes_fraction_measured" in row:
            measured = [one["bytes_fraction_measured"] for one in per_layer]
            middle.plot(layers, measured, "o", color=ACCENT, ms=4, label="measured in a decode")
            middle.legend(frameon=False, fontsize=8)
        middle.set_ylabel("bytes / dense")
        bottom.plot([h["layer"] for h in per_head], [h["output_error"] for h in per_head], ".", color=_BLUES[1], mew=0)
        bottom.plot(layers, [one["output_error"] for one in per_layer], color=_BLUES[3])
        _log_percent(bottom)
        bottom.set_ylabel("output error")
        bottom.set_xlabel("layer")
        _finish(top, f"Keys that hold the attention   ({facts(row)})")
        _finish(middle, f"Bytes that {row['policy']} reads: predicted, the line their mean")
        _finish(bottom, f"Relative output error of {row['policy']}")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def facts(row: Row) -> str:
    """Which model, how long."""
    said = [str(row["data"]).rsplit("/", 1)[-1]] if "data" in row else []
    said += [f"{row['kv_len']:,} tokens"] if "kv_len" in row else []
    return ", ".join([*said, f"{row['num_layers']} layers"] if "num_layers" in row else said)


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
