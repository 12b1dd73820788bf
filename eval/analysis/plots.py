"""The plots: attention in the left column, the FFN in the right one, a line a run."""

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    EngFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    StrMethodFormatter,
)

from eval.analysis.activations import SITES
from eval.compare.plots import COLOURS, INK, STYLES, Plot

Values = dict[str, Any]
LABELS = {
    "attention": "attention, mean",
    "ffn": "FFN, mean",
    **{name: site.label for name, site in SITES.items()},
}
GROUP_ROW = ("attention", "ffn")
ROWS = {
    "weights": (
        ("q_proj", "gate_proj"), ("k_proj", "up_proj"), ("v_proj", "down_proj"), ("o_proj", ""),
    ),
    "activations": (
        ("attention_input", "ffn_input"), ("q", "ffn_hidden"), ("k", "ffn_output"),
        ("v", "residual"), ("heads", ""), ("attention_output", ""),
    ),
}  # fmt: skip
FILES = tuple(f"{what}_{how}" for what in ROWS for how in ("spectra", "by_layer", "by_tokens"))
# Of drawn spectra. What float32 leaves of a zero is near 1e-7.
FLOOR = {"weights": 1e-3, "activations": 1e-4}
_SETTINGS: Any = {
    "svg.hashsalt": "lpa", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.grid": True, "grid.alpha": 0.25,
}  # fmt: skip
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


def plots(runs: Sequence[Values]) -> list[Plot]:
    """Three plots of weights and three of (centred) activations; those of weights only where a run
    has any.
    """
    made = []
    with mpl.rc_context({**mpl.rcParamsDefault, **_SETTINGS}):
        for what, kind in (("weights", "weights"), ("activations", "centred")):
            if not any(run["ranks"][kind] for run in runs):
                continue
            about = "weights" if what == "weights" else "centred activations"
            made += [
                _spectra(runs, what, kind, about),
                _by_layer(runs, what, kind, about),
                _by_tokens(runs, what, kind, about),
            ]
    return made


def _look(place: int) -> dict[str, Any]:
    """Colour and line style of a run."""
    style = STYLES[(place + place // len(COLOURS)) % len(STYLES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": style, "linewidth": 1.4}


def _marked(place: int) -> dict[str, Any]:
    """With a point at each value."""
    return {**_look(place), "marker": "o", "markersize": 3}


def _faint(place: int) -> dict[str, Any]:
    """That of the same run at the start."""
    return {**_look(place), "linewidth": 0.8, "alpha": 0.5}


def _grid(
    runs: Sequence[Values],
    rows: Sequence[tuple[str, str]],
    kind: str,
    draw: Callable[[Axes, Values, int, str], None],
    *,
    axis: str,
    value: str,
) -> Figure:
    """A panel for each name, in which `draw` draws a run (by its place) where it has that name."""
    there = {name for run in runs for name in run["ranks"][kind]}
    rows = [row for row in rows if there.intersection(row)]
    figure = Figure()
    panels = figure.subplots(len(rows), 2, sharex=True, sharey=True, squeeze=False)
    for line, names in zip(panels, rows, strict=True):
        for panel, name in zip(line, names, strict=True):
            if name not in there:
                panel.set_axis_off()
                continue
            panel.set_title(LABELS.get(name, name), fontsize="medium")
            panel.tick_params(labelbottom=True, labelleft=True)
            for place, run in enumerate(runs):
                if name in run["ranks"][kind]:
                    draw(panel, run, place, name)
    lines_of_legend = _legend(figure, runs)
    _place(figure, len(rows), lines_of_legend, axis, value)
    return figure


def _place(figure: Figure, rows: int, lines_of_legend: int, axis: str, value: str) -> None:
    """Sizes and margins in inches: the grid is regular, and a layout that is searched for takes
    most of the time of a plot.
    """
    width, panel, gap, bottom, top = 5.8, 1.15, 0.5, 0.5, 0.45 + 0.2 * lines_of_legend
    height = bottom + rows * (panel + gap) - gap + top
    figure.set_size_inches(width, height)
    figure.subplots_adjust(
        left=0.8 / width,
        right=1 - 0.15 / width,
        bottom=bottom / height,
        top=1 - top / height,
        hspace=gap / panel,
        wspace=0.25,
    )
    figure.supxlabel(axis, fontsize="medium", y=0.05 / height, va="bottom")
    figure.supylabel(value, fontsize="medium", x=0.05 / width, va="center", ha="left")


def _legend(figure: Figure, runs: Sequence[Values]) -> int:
    """Draws it; the number of its lines."""
    lines = [Line2D([], [], **_look(place)) for place in range(len(runs))]
    # A label that begins with an underscore would be left out.
    labels = [f" {run['name']}" for run in runs]
    columns = max(1, min(len(labels), 66 // (max(map(len, labels)) + 6)))
    legend = figure.legend(
        lines, labels, loc="upper left", ncols=columns, frameon=False, handlelength=3
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return math.ceil(len(labels) / columns)


def _spectra(runs: Sequence[Values], what: str, kind: str, about: str) -> Plot:
    """σ_i / σ_1 against i / dimension: mean and range over the layers."""

    def draw(panel: Axes, run: Values, place: int, name: str) -> None:
        start = run["spectra"]["first"][kind].get(name)
        if start:
            panel.plot(start["position"], start["mean"], **_faint(place))
        last = run["spectra"]["last"][kind].get(name)
        if last:
            panel.plot(last["position"], last["mean"], **_look(place))
            band = {"color": _look(place)["color"], "alpha": 0.18, "linewidth": 0}
            panel.fill_between(last["position"], last["min"], last["max"], **band)
        panel.set(yscale="log", ylim=(FLOOR[what], 1.5), xlim=(0, 1))

    figure = _grid(
        runs, ROWS[what], kind, draw, axis="i / dimension", value="$\\sigma_i\\ /\\ \\sigma_1$"
    )
    return _finish(figure, f"{what}_spectra", f"Spectra of {about}", runs)


def _by_layer(runs: Sequence[Values], what: str, kind: str, about: str) -> Plot:
    """Effective rank as a share of the dimension, by layer."""

    def draw(panel: Axes, run: Values, place: int, name: str) -> None:
        points = run["checkpoints"]
        for point, look in ((points[0], _faint(place)), (points[-1], _marked(place))):
            layers = point[kind]["by_layer"]
            shares = [_percent(layer[name]["effective_rank_share"]) for layer in layers]
            panel.plot(range(1, len(layers) + 1), shares, **look)
        _bound(panel, run, kind, place, name)

    figure = _grid(
        runs, ROWS[what], kind, draw, axis="layer", value="effective rank in % of the dimension"
    )
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finish(figure, f"{what}_by_layer", f"Effective rank of {about} by layer", runs)


def _by_tokens(runs: Sequence[Values], what: str, kind: str, about: str) -> Plot:
    """Effective rank as a share of the dimension, over training: mean and range over layers."""

    def draw(panel: Axes, run: Values, place: int, name: str) -> None:
        points = run["checkpoints"]
        tokens = [point["training_tokens"] for point in points]
        found = [point[kind]["over_layers"][name]["effective_rank_share"] or {} for point in points]
        low, mean, high = (
            [_percent(one.get(key)) for one in found] for key in ("min", "mean", "max")
        )
        panel.plot(tokens, mean, **_marked(place))
        band = {"color": _look(place)["color"], "alpha": 0.18, "linewidth": 0}
        panel.fill_between(tokens, low, high, **band)
        _bound(panel, run, kind, place, name)

    figure = _grid(
        runs, (GROUP_ROW, *ROWS[what]), kind, draw, axis="training tokens",
        value="effective rank in % of the dimension",
    )  # fmt: skip
    figure.axes[0].xaxis.set_major_formatter(EngFormatter())
    return _finish(figure, f"{what}_by_tokens", f"Effective rank of {about} over training", runs)


def _bound(panel: Axes, run: Values, kind: str, place: int, name: str) -> None:
    """The rank that a product can have, where that is less than the dimension."""
    share = run["ranks"][kind][name]["bound_share"]
    if share < 1:
        panel.axhline(100 * share, color=_look(place)["color"], linestyle=":", linewidth=1)
    if kind == "weights":
        panel.set_ylim(0, 100)
    else:  # from near one dimension to all of them
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())


def _percent(share: float | None) -> float:
    return float("nan") if share is None else 100 * share


def _finish(figure: Figure, name: str, title: str, runs: Sequence[Values]) -> Plot:
    names = ", ".join(run["name"] for run in runs)
    alt = f"{title} for {names}: attention left, FFN right; the numbers are in analysis.json."
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata=_NO_METADATA)
    figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Plot(name, title, alt, png.getvalue(), svg.getvalue().decode())
