"""Results as Markdown tables: on the console, and between two marks of docs/performance.md."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.errors import InputError
from training.bench.measure import Row

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; columns after the first two are numbers."""
    rule = ["---", "---", *["--:"] * (len(heads) - 2)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def milliseconds(seconds: float) -> str:
    """Three significant digits, at least."""
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratios(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        goal = "-" if row["goal"] is None else f"{row['goal']:g}"
        reached = {None: "-", True: "yes", False: "no"}[row["reached"]]
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append([row["case"], row["quantity"], f"{row['ratio']:.3f}", interval, goal, reached])
    return table(["case", "quantity", "ratio", "95 % interval", "goal", "reached"], lines)


def _measurements(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        low, high = milliseconds(row["seconds_p10"]), milliseconds(row["seconds_p90"])
        speed = row.get("tokens_per_second")
        lines.append(
            [
                row["case"],
                row["side"],
                milliseconds(row["seconds_median"]),
                f"{low} to {high}",
                "-" if speed is None else f"{speed:,.0f}",
                str(row["repeats"]),
            ]
        )
    return table(["case", "side", "ms, median", "p10 to p90", "tokens/s", "repeats"], lines)


def _losses(rows: Sequence[Row]) -> str:
    worst = max(row["largest_relative_difference"] for row in rows)
    allowed = max(row["allowed_relative_difference"] for row in rows)
    return (
        f"Losses of the two sides differ by at most {worst:.1e} relative; allowed are {allowed:g}."
    )


def _profiles(rows: Sequence[Row]) -> str:
    groups = list(dict.fromkeys(group for row in rows for group in row["seconds"]))
    lines = [
        [row["case"], row["side"], *(milliseconds(row["seconds"].get(g, 0.0)) for g in groups)]
        for row in rows
    ]
    return "Milliseconds of a call by group of operators, under the profiler:\n\n" + table(
        ["case", "side", *groups], lines
    )


def _imports(seconds: dict[str, float]) -> str:
    parts = [f"{name} {value:.2f}" for name, value in seconds.items()]
    return "Seconds of importing by package, under -X importtime: " + ", ".join(parts) + "."


PARTS: dict[str, Callable[[Any], str]] = {
    "ratios": _ratios,
    "measurements": _measurements,
    "losses": _losses,
    "profiles": _profiles,
    "import_seconds": _imports,
}


def section(name: str, result: Row) -> str:
    """One benchmark: its heading and its tables."""
    parts = [show(result[key]) for key, show in PARTS.items() if result.get(key)]
    return "\n\n".join([f"### {name}", *parts])


def where(result: Row) -> str:
    """What the numbers were measured on."""
    at = result["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in at["packages"].items())
    quick = " Quick mode: shapes for tests, no results." if result["quick"] else ""
    return (
        f"{at['device']}, {at['cpu_count']} cores, {at['threads']} threads, load average "
        f"{at['load_average_1min']:.1f} before; Python {at['python']}, {packages}; commit "
        f"{at['git_commit']}{' with changes' if at['git_dirty'] else ''}; MKL_CBWR "
        f"{at['mkl_cbwr']}; {result['seconds']:.0f} s in all: `{at['command']}`.{quick}"
    )


def markdown(result: Row) -> str:
    """All of a result."""
    sections = [section(name, found) for name, found in result["benchmarks"].items()]
    return "\n\n".join([where(result), *sections])


def update(page: Path, results: list[Row]) -> None:
    """Replaces what stands between the marks of a page by the tables of results, each after what it
    was measured on. InputError where the page has no marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{page}: has no lines {BEGIN} and {END} to put the results between")
    tables = "\n\n".join(markdown(result) for result in results)
    page.write_text(f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}", encoding="utf-8")
