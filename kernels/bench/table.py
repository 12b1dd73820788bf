"""What is printed, and the plot."""

import importlib.util
import io
from collections.abc import Sequence
from typing import Any

from kernels.bench.operations import MODES

Row = dict[str, Any]
HEADER = (
    "provider",
    "forward µs",
    "backward µs",
    "both µs",
    "× compile",
    "roofline",
    "MiB",
    "host µs",
)
LEGEND = """\
times: median (20th-80th percentile); both: forward and backward; × compile, roofline: forward /
backward / both, the speed-up against compile and the share of the least time that the device's
peaks allow; MiB: peak of forward and backward; host µs: what the host takes to issue both"""


def _times(row: Row) -> str:
    middle, low, high = (row[f"microseconds_{key}"] for key in ("median", "p20", "p80"))
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def _share(values: Sequence[float | None], form: str) -> str:
    if any(value is None for value in values):
        return "n/a"
    return " / ".join(format(value, form) for value in values)


def _number(value: float | None, scale: float = 1.0) -> str:
    return "n/a" if value is None else f"{value / scale:.0f}"


def paths_line(paths: Sequence[Row]) -> str:
    """Which kernels Triton computed, and which plain torch did and why."""
    if not paths:
        return "plain matrix products, no Triton kernel"
    parts = []
    for path in ("triton", "reference"):
        for reason in dict.fromkeys(p["reason"] for p in paths if p["path"] == path):
            kernels = [p["kernel"] for p in paths if (p["path"], p["reason"]) == (path, reason)]
            names = ", ".join(dict.fromkeys(kernels))
            parts.append(f"{path}: {names}" + (f" ({reason})" if reason else ""))
    return "; ".join(parts)


def case_table(case: Row) -> str:
    """The case's providers, a line each, in aligned columns."""
    lines, failures = [HEADER], []
    for name in dict.fromkeys(row["provider"] for row in case["results"]):
        rows = {row["mode"]: row for row in case["results"] if row["provider"] == name}
        both = rows["forward_backward"]
        if both["status"] != "ok":
            failures.append(f"  {name}: {both['status'].replace('_', ' ')}: {both['message']}")
            continue
        ordered = [rows[mode] for mode in MODES]
        lines.append(
            (
                name,
                *map(_times, ordered),
                _share([row["speedup_against_compile"] for row in ordered], ".2f"),
                _share([row["share_of_roofline"] for row in ordered], ".0%"),
                _number(both["peak_memory_bytes"], 2**20),
                _number(both["microseconds_host_median"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    title = (
        f"{case['op']}  {case['size']} (d {case['d']}, r {case['r']}, head {case['head_dim']})  "
        f"{case['rows']} rows of {case['seq_len']}  {case['dtype']}"
    )
    body = [
        "  " + "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    noise = case["noise_share"]["forward_backward"]
    notes = [
        f"  {name}: {paths_line(case['paths'].get(name, ()))}"
        for name in ("fused", "fused_compile")
        if any(row["provider"] == name for row in case["results"])
    ]
    spread = "n/a" if noise is None else f"{noise:.1%}"
    repeats = max(row["repeats"] for row in case["results"])
    notes.append(
        f"  {repeats} repeats over {case['input_sets']} input sets; noise floor (eager against "
        f"itself): {spread}"
    )
    return "\n".join([title, *body, *failures, *notes])


def verdict_text(entries: Sequence[Row], on_cuda: bool) -> str:
    """The cases in which fused is not the fastest, forward and backward together."""
    if not on_cuda:
        return "verdict: none, since a CPU runs the plain definitions of the fused operators"
    both = [entry for entry in entries if entry["mode"] == "forward_backward"]
    slower = [entry for entry in both if not entry["fused_is_fastest"]]
    if not both:
        return "verdict: none, since no case has both a fused and another result"
    head = (
        f"verdict: forward and backward, fused is the fastest provider in {len(both) - len(slower)}"
        f" of {len(both)} cases"
    )
    lines = [head, *(["not in:"] if slower else [])]
    for entry in slower:
        within = ", within the noise" if entry["within_noise"] else ""
        lines.append(
            f"  {entry['op']} {entry['size']} {entry['rows']} rows: {entry['best_other']} is the "
            f"fastest, {entry['best_fused']} takes {entry['ratio']:.3f} of its time{within}"
        )
    return "\n".join(lines)


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot(cases: Sequence[Row], suffix: str) -> bytes:
    """Microseconds a row, forward and backward, over the rows: a panel for each operation and size,
    a line for each provider.
    """
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(case["op"] for case in cases))
    sizes = list(dict.fromkeys(case["size"] for case in cases))
    figure = Figure(figsize=(4 * len(sizes), 3 * len(ops)), layout="constrained")
    axes = figure.subplots(len(ops), len(sizes), squeeze=False)
    for i, op in enumerate(ops):
        for j, size in enumerate(sizes):
            panel = axes[i][j]
            panel.set_title(f"{op}, {size}", fontsize="small")
            panel.set_xscale("log", base=2)
            panel.set_xlabel("rows")
            panel.set_ylabel("µs a row")
            for name, points in _lines(cases, op, size).items():
                panel.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
            panel.set_ylim(bottom=0)
            panel.legend(fontsize="x-small")
    file = io.BytesIO()
    figure.savefig(file, format=suffix)
    return file.getvalue()


def _lines(cases: Sequence[Row], op: str, size: str) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    for case in cases:
        for row in case["results"] if (case["op"], case["size"]) == (op, size) else ():
            if row["mode"] == "forward_backward" and row["status"] == "ok":
                point = (case["rows"], row["microseconds_median"] / case["rows"])
                lines.setdefault(row["provider"], []).append(point)
    return lines
