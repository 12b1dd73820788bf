"""The results as Markdown."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]
SIDES = ("frozen", "lora", "sora", "peft lora")


def table(measurements: Sequence[Row], ratios: Sequence[Row], mode: str) -> str:
    """A line for each case: µs a layer by side, median (p10 to p90), and ratios to peft's."""
    names = list(dict.fromkeys(row["case"] for row in measurements))
    header = ["case", *(f"{side}, µs" for side in SIDES), "lora / peft", "sora / peft's lora"]
    body = [
        [
            name,
            *(_time(measurements, name, side, mode) for side in SIDES),
            *(_ratio(ratios, name, f"{side} / peft lora", mode) for side in ("lora", "sora")),
        ]
        for name in names
    ]
    aligned = ("left", *["right"] * (len(header) - 1))
    return str(tabulate(body, header, tablefmt="pipe", colalign=aligned, disable_numparse=True))


def _time(rows: Sequence[Row], case: str, side: str, mode: str) -> str:
    for row in rows:
        if (row["case"], row["side"], row["mode"]) == (case, side, mode):
            a, b, c = (row[f"microseconds_a_layer_{name}"] for name in ("median", "p10", "p90"))
            return f"{a:,.1f} ({b:,.1f} to {c:,.1f})"
    return "–"


def _ratio(rows: Sequence[Row], case: str, quantity: str, mode: str) -> str:
    for row in rows:
        if (row["case"], row["quantity"], row["mode"]) == (case, quantity, mode):
            return f"{row['ratio']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
    return "–"
