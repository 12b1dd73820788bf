"""The plots, as PNG for files and as SVG for the page."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullLocator

Values = Mapping[str, Any]
# Okabe and Ito's colours for all kinds of colour vision, without black and yellow, which one of
# the two backgrounds would swallow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":")
INK, DARK_INK = "#1f2328", "#e6e8eb"  # of text and frames, on a light and on a dark page
FILES = ("loss_by_tokens", "loss_by_training_flops", "loss_by_training_seconds", "sweep")
_AXIS_LABELS = {
    "tokens": "training tokens",
    "training_flops": "training FLOPs (3 × forward × tokens)",
    "training_seconds": "training time in seconds",
}
_SETTINGS: Any = {
    "svg.hashsalt": "lpa", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 9,
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.grid": True, "grid.alpha": 0.25,
}  # fmt: skip
_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Plot:
    """A plot.

    Attributes:
        name: Of its file, without the ending.
        title: Its heading.
        alt: What a reader who cannot see it is told.
        png: The file.
        svg: For a light page, the text in INK.
    """

    name: str
    title: str
    alt: str
    png: bytes
    svg: str

    def uri(self, dark: bool = False) -> str:
        """The SVG as a data URI, so that the page needs no other file."""
        svg = self.svg.replace(INK, DARK_INK) if dark else self.svg
        return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def plots(comparison: Values) -> list[Plot]:
    """The plots of a comparison (results.compare), its arms always in the same colours."""
    with mpl.rc_context():
        mpl.rcdefaults()  # not what a matplotlibrc of this machine says
        mpl.rcParams.update(_SETTINGS)
        axes = [axis for axis in _AXIS_LABELS if axis != "tokens" or not _in_bits(comparison)]
        made = [_losses(comparison, axis) for axis in axes]
        return made + ([_sweeps(comparison)] if comparison["sweeps"] else [])


def _in_bits(comparison: Values) -> bool:
    return bool(comparison["measure"]["unit"] == "bits_per_byte")


def _look(comparison: Values, name: str) -> dict[str, Any]:
    """Colour and line style of an arm."""
    place = [arm["name"] for arm in comparison["arms"]].index(name)
    style = STYLES[(place + place // len(COLOURS)) % len(STYLES)]
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": style}


def _losses(comparison: Values, axis: str) -> Plot:
    """Training and validation loss against x: the whole run, and its last half from near."""
    unit = "bits_per_byte" if _in_bits(comparison) else "loss_nats_per_token"
    kinds = [
        kind
        for kind in ("training", "validation")
        if any(curve[kind] for curve in comparison["curves"].values())
    ]
    figure = Figure(figsize=(10, 0.7 + 3.1 * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 2, squeeze=False)
    for row, kind in zip(panels, kinds, strict=True):
        found = {name: curve[kind] for name, curve in comparison["curves"].items() if curve[kind]}
        label = "bits per byte" if unit == "bits_per_byte" else "loss in nats/token"
        for panel in row:
            _draw(panel, comparison, found, axis, unit)
            panel.set_xlabel(_AXIS_LABELS[axis])
        row[0].set_ylabel(f"{kind} {label}")
        row[0].set_title("whole run", fontsize="medium")
        row[1].set_title("from half of the shortest arm on", fontsize="medium")
        row[0].set_xscale("log")
        row[0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        row[0].xaxis.set_minor_locator(NullLocator())
        _zoom(row[1], found, axis, unit)
        for panel in row:
            panel.xaxis.set_major_formatter(
                FuncFormatter(_seconds) if axis == "training_seconds" else EngFormatter()
            )
    counted = {arm["name"]: arm["runs_counted"] or arm["runs"] for arm in comparison["arms"]}
    _legend(figure, comparison, {name: f"{name} (n = {n})" for name, n in counted.items()})
    words = _AXIS_LABELS[axis].partition(" (")[0]
    names = ", ".join(comparison["curves"])
    what = " and ".join(kinds) + (" bits per byte" if _in_bits(comparison) else " loss")
    alt = f"{what.capitalize()} against {words} for {names}; the numbers are in comparison.json."
    return _finish(figure, f"loss_by_{axis}", f"Loss against {words}", alt)


def _draw(panel: Axes, comparison: Values, found: Values, axis: str, unit: str) -> None:
    """Mean lines with a band from the least to the largest of the seeds."""
    for name, curve in found.items():
        x, look = curve[axis], _look(comparison, name)
        low, mean, high = (_floats(curve[f"{unit}_{key}"]) for key in ("min", "mean", "max"))
        marker = "o" if len(x) < 20 else ""
        panel.plot(x, mean, linewidth=1.4, marker=marker, markersize=2.5, **look)
        panel.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)


def _floats(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _zoom(panel: Axes, found: Values, axis: str, unit: str) -> None:
    """Limits around what lies behind half of the arm that ends first."""
    begin = min(curve[axis][-1] for curve in found.values()) / 2
    end = max(curve[axis][-1] for curve in found.values())
    seen = [
        value
        for curve in found.values()
        for key in ("min", "max")
        for x, value in zip(curve[axis], curve[f"{unit}_{key}"], strict=True)
        if x >= begin and value is not None
    ]
    panel.set_xlim(begin, end + 0.02 * (end - begin))
    if seen:
        margin = 0.05 * (max(seen) - min(seen)) or 0.01
        panel.set_ylim(min(seen) - margin, max(seen) + margin)


def _seconds(value: float, _: int) -> str:
    return f"{value:,g}"


def _legend(figure: Figure, comparison: Values, labels: Mapping[str, str]) -> None:
    """labels: what is said of each arm that is drawn."""
    lines = [Line2D([], [], linewidth=1.8, **_look(comparison, name)) for name in labels]
    # A label that begins with an underscore would be left out.
    texts = [f" {text}" for text in labels.values()]
    columns = max(1, min(len(texts), 110 // (max(map(len, texts)) + 6)))
    legend = figure.legend(
        lines, texts, loc="outside upper left", ncols=columns, frameon=False, handlelength=3
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # a $ is a $


def _sweeps(comparison: Values) -> Plot:
    """Loss by learning rate, single trials as points, the best rate with a ring around it."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    for place, (name, sweep) in enumerate(comparison["sweeps"].items()):
        look = _look(comparison, name)
        panel.plot(*_points(sweep["means"]), linewidth=1.4, **look)
        panel.plot(*_points(sweep["trials"]), "o", markersize=3.5, color=look["color"])
        best = sweep["best"]
        panel.plot(
            best["learning_rate"], best["loss_nats_per_token"], "o", markersize=12,
            markerfacecolor="none", markeredgewidth=1.8, color=look["color"],
        )  # fmt: skip
        diverged = [t["learning_rate"] for t in sweep["means"] if t["loss_nats_per_token"] is None]
        # y in shares of the panel's height, not all in one place
        panel.plot(
            diverged, [0.97 - 0.05 * place] * len(diverged), "x", markersize=8, markeredgewidth=2,
            color=look["color"], transform=panel.get_xaxis_transform(), clip_on=False,
        )  # fmt: skip
    rates = sorted({t["learning_rate"] for s in comparison["sweeps"].values() for t in s["means"]})
    panel.set_xscale("log")
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates], rotation=45 if len(rates) > 6 else 0)
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("peak learning rate")
    panel.set_ylabel("loss in nats/token")
    panel.set_title("○ best rate   × diverged", fontsize="medium")
    _legend(figure, comparison, {name: name for name in comparison["sweeps"]})
    best = "; ".join(
        f"{name}: {sweep['best']['learning_rate']:g}"
        for name, sweep in comparison["sweeps"].items()
    )
    alt = f"Loss by learning rate. Best: {best}. The numbers are in the table."
    return _finish(figure, "sweep", "Sweep of the learning rate", alt)


def _points(trials: list[Values]) -> tuple[list[float], list[float]]:
    finite = [t for t in trials if t["loss_nats_per_token"] is not None]
    return [t["learning_rate"] for t in finite], [t["loss_nats_per_token"] for t in finite]


def _finish(figure: Figure, name: str, title: str, alt: str) -> Plot:
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata=_NO_METADATA)
    figure.set_layout_engine("none")  # it has been laid out
    figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return Plot(name, title, alt, png.getvalue(), svg.getvalue().decode())
