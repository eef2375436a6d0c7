"""attention.png: where Louver spent exact attention. Reads rows and picture data only, as demo.json holds them."""

import io
from typing import Any

ACCENT = "#c2410c"  # the answer
INK, QUIET, RULE = "#1f2933", "#66727f", "#d9dee3"
_COLORS = ["#ffffff", "#dbe9f2", "#9cc4dc", "#4d92bd", "#1f5f92", "#0b2e55"]
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": QUIET,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.parse_math": False,
}


def attention_png(
    row: dict[str, Any], texts: dict[str, str], picture: dict[str, Any], steps: list[dict[str, Any]]
) -> bytes:
    """Draw the picture of a demo run: positions by layer, tokens by layer and step, and the passage with the answer."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.5, 9.4), dpi=150, facecolor="white")
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(
            3,
            2,
            left=0.06,
            right=0.975,
            top=0.8,
            bottom=0.015,
            width_ratios=[2.35, 1],
            height_ratios=[0.55, 3.2, 1.3],
            hspace=0.1,
            wspace=0.1,
        )
        _headline(figure, row, texts)
        where = figure.add_subplot(grid[1, 0])
        _profile(figure.add_subplot(grid[0, 0], sharex=where), picture)
        _positions(where, picture)
        _steps(figure.add_subplot(grid[1, 1]), picture, steps)
        _passage(figure.add_subplot(grid[2, :]), picture)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _headline(figure: Any, row: dict[str, Any], texts: dict[str, str]) -> None:
    figure.text(0.06, 0.955, "Where Louver looked exactly", fontsize=19, weight="bold", va="center")
    facts = (
        f"{row['policy']}   ·   {row['kv_len']:,} tokens, {row['num_layers_served']} layers   ·   "
        f"{row['bytes_fraction']:.0%} of the bytes dense attention reads   ·   {row['exact_fraction']:.1%} of the keys exact   ·   "
        f"{row['output_error']:.2%} mean output error   ·   recall {row['recall']:.4g}"
    )
    figure.text(0.06, 0.922, facts, color=QUIET, va="center", fontsize=10.5)
    figure.text(0.06, 0.888, "Q  " + texts["question"], va="center", style="italic", fontsize=10.5)
    answer = " ".join(texts["louver"].split())
    figure.text(
        0.06, 0.864, "A  " + (answer if len(answer) < 150 else answer[:147] + "..."), va="center", fontsize=10.5
    )


def _profile(axes: Any, picture: dict[str, Any]) -> None:
    """The mean over layers, above the map."""
    density = picture["density"]
    mean = [sum(column) / len(density) for column in zip(*density, strict=True)]
    edges = [i * picture["bin_tokens"] for i in range(len(mean) + 1)]
    axes.stairs([max(x, 1e-4) for x in mean], edges, baseline=1e-4, fill=True, color="#4d92bd", lw=0)
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.2)
    axes.set_yticks([1e-3, 1e-1], ["0.1%", "10%"], fontsize=8)
    axes.tick_params(labelbottom=False)
    axes.set_title("Where in the text: share of heads and steps that took a token exactly", pad=7)
    _bare(axes)
    if picture["answer"]:
        start, end = picture["answer"]
        left = (start + end) / 2 > 0.25 * picture["num_tokens"]  # where the label has room
        axes.axvspan(start, end, color=ACCENT, lw=0, alpha=0.85)
        axes.annotate(
            "the answer is here", ((start + end) / 2, 0.6), xytext=(-7 if left else 7, 0), textcoords="offset points",
            color=ACCENT, weight="bold", ha="right" if left else "left", va="center", fontsize=9.5,
        )  # fmt: skip


def _positions(axes: Any, picture: dict[str, Any]) -> None:
    from matplotlib.colors import LogNorm

    density = [[max(x, 1e-4) for x in row] for row in picture["density"]]
    width = picture["bin_tokens"] * len(density[0])
    image = axes.imshow(
        density, aspect="auto", interpolation="nearest", cmap=_colormap(), norm=LogNorm(1e-3, 1.0),
        extent=(0, width, len(density) - 0.5, -0.5),
    )  # fmt: skip
    axes.set_xlim(0, picture["num_tokens"])
    axes.set_ylabel("layer")
    _layer_ticks(axes, picture)
    _bare(axes)
    if picture["answer"]:
        for x in picture["answer"]:
            axes.axvline(x, color=ACCENT, lw=0.8, alpha=0.8)
    _section_ticks(axes, picture)
    scale = axes.inset_axes((0.79, 1.255, 0.21, 0.022))
    axes.figure.colorbar(image, cax=scale, orientation="horizontal", ticks=[1e-3, 1e-2, 1e-1, 1.0])
    scale.set_xticklabels(["0.1%", "1%", "10%", "100%"], fontsize=8)
    scale.tick_params(pad=2)
    scale.minorticks_off()
    scale.spines[:].set_visible(False)


def _steps(axes: Any, picture: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    image = axes.imshow(picture["exact_tokens"], aspect="auto", interpolation="nearest", cmap=_colormap(), vmin=0)
    axes.set_title("How many tokens each layer took exactly", pad=7)
    _layer_ticks(axes, picture)
    labels = [_label(step["louver_text"]) for step in steps]
    every = -(-len(labels) // 40)
    axes.set_xticks(range(0, len(labels), every), labels[::every], rotation=90, fontsize=8, color=INK)
    _bare(axes)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.035, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8)


def _label(token: str) -> str:
    text = token.replace("\n", "⏎").strip() or "␣"
    return text if len(text) <= 10 else text[:9] + "…"


def _passage(axes: Any, picture: dict[str, Any]) -> None:
    """The passage's tokens, each on a ground as dark as it was read exactly."""
    from matplotlib.colors import LogNorm

    passage, norm, colors = picture["passage"], LogNorm(1e-3, 1.0, clip=True), _colormap()
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(1, 0)
    known = "the passage with the answer" if picture["answer"] else "the passage that was read exactly most"
    axes.text(0, 0.16, f"Token by token: {known}", weight="bold", fontsize=10.5)
    lines = _wrapped(passage["tokens"], width=118)
    x_unit, y_unit = 1 / 118, min(0.17, 0.78 / max(1, len(lines)))
    for row, line in enumerate(lines):
        column = 0
        for index, text in line:
            share = max(passage["density"][index], 1e-4)
            ground = colors(norm(share))
            y = 0.33 + row * y_unit
            axes.add_patch(_box(column * x_unit, y - y_unit * 0.44, len(text) * x_unit, y_unit * 0.88, ground))
            position = passage["start"] + index
            inside = picture["answer"] and picture["answer"][0] <= position < picture["answer"][1]
            if inside:
                edge = y + y_unit * 0.46
                axes.plot([column * x_unit, (column + len(text)) * x_unit], [edge, edge], color=ACCENT, lw=1.6)
            dark = sum(ground[:3]) < 1.5
            axes.text(
                column * x_unit, y, text, family="DejaVu Sans Mono", fontsize=11.2, va="center_baseline",
                color="white" if dark else INK,
            )  # fmt: skip
            column += len(text)


def _wrapped(tokens: list[str], width: int) -> list[list[tuple[int, str]]]:
    """Tokens as lines of (index, text) no wider than width characters; a line break in the text stays one."""
    lines: list[list[tuple[int, str]]] = [[]]
    for index, token in enumerate(tokens):
        text = token.replace("\n", "⏎")
        if sum(len(t) for _, t in lines[-1]) + len(text) > width:
            lines.append([])
        lines[-1].append((index, text))
    return lines


def _box(x: float, y: float, width: float, height: float, color: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=color, lw=0)


def _section_ticks(axes: Any, picture: dict[str, Any]) -> None:
    """Names of the document's sections under the map, as far as there is room, and the question's place at the end."""
    sections = [*picture["sections"], ["question", picture["document"][1]]] if picture["sections"] else []
    ends = [at for _, at in sections[1:]] + [picture["num_tokens"]]
    labels = [
        ((start + end) / 2, title)
        for (title, start), end in zip(sections, ends, strict=True)
        if end - start > 0.007 * len(title) * picture["num_tokens"]
    ]
    for _, at in sections:
        axes.axvline(at, color=RULE, lw=0.8, zorder=0.5)
        axes.plot([at, at], [0, -0.03], transform=axes.get_xaxis_transform(), color=QUIET, lw=0.6, clip_on=False)
    if labels:
        axes.set_xticks([x for x, _ in labels], [title for _, title in labels], fontsize=8.5)
    else:
        axes.set_xlabel("token")


def _layer_ticks(axes: Any, picture: dict[str, Any]) -> None:
    layers = picture["layers"]
    every = max(1, len(layers) // 6)
    axes.set_yticks(range(0, len(layers), every), [str(i) for i in layers[::every]])


def _bare(axes: Any) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)


def _colormap() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("louver", _COLORS)
