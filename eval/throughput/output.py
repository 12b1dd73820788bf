"""What is printed, and the CSV and the plot."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from eval.throughput.comparison import LEAST_ROUNDS, PHASES
from eval.throughput.options import Cell
from training.bench.measure import Row

STEPS = {
    "train": "optimizer step",
    "evaluate": "pass over all sequences",
    "prefill": "prompt, to its first token",
    "decode": "token, of each sequence",
}
_SIDE_KEYS = (
    "name", "tokens_per_second", "tokens_per_second_p10", "tokens_per_second_p90",
    "seconds_per_step_median", "seconds_per_step_p10", "seconds_per_step_p90",
    "forward_seconds_median", "backward_seconds_median", "optimizer_seconds_median",
    "tokens_per_step", "flops_per_token", "mfu", "peak_memory_bytes", "memory_is", "parameters",
    "micro_batch_size", "seq_len", "precision", "loss_nats_per_token",
    "cache", "cache_bytes_per_token", "longest_context_tokens",
)  # fmt: skip
_RATIOS = ("time_ratio", "tokens_per_second_ratio", "saved_time_share", "share_reached")


def _milliseconds(row: Row, key: str) -> str:
    if f"{key}_median" not in row:
        return "n/a"
    median, low, high = (row[f"{key}_{q}"] * 1e3 for q in ("median", "p10", "p90"))
    return f"{median:,.4g} ({low:,.4g} to {high:,.4g})"


def _shown(value: Any, form: str, scale: float = 1.0) -> str:
    return "n/a" if value is None else format(value / scale, form)


def _words(value: Any) -> str:
    return "null" if value is None else str(value)


def _interval(found: Row | None, form: str) -> str:
    if found is None:
        return "n/a"
    return f"{found['ratio']:{form}} ({found['low']:{form}} to {found['high']:{form}})"


def _too_few(rounds: int) -> list[str]:
    """A line where the intervals are no 95 % intervals."""
    if rounds >= LEAST_ROUNDS:
        return []
    return [f"{rounds} rounds are too few for 95 % intervals: give --rounds {LEAST_ROUNDS} or more"]


def _saved(found: Row) -> str:
    """What is saved of the time and of the FLOPs."""
    limit, reached = found["saved_flops_share"], found["share_reached"]
    return (
        f"time saved {_interval(found['saved_time_share'], '.1%')}; FLOPs saved {limit:.1%}"
        f"{', the limit' if limit > 0 else ''}; share reached {_interval(reached, '.2f')}"
    )


def _lines(mode: str, row: Row) -> dict[str, str]:
    """One side's column of the table of a cell."""
    low, high = row["tokens_per_second_p10"], row["tokens_per_second_p90"]
    lines = {
        "tokens/s": f"{row['tokens_per_second']:,.0f} ({low:,.0f} to {high:,.0f})",
        f"ms per {STEPS[mode]}": _milliseconds(row, "seconds_per_step"),
    }
    if mode == "train":
        lines |= {f"  {p}, ms": _milliseconds(row, f"{p}_seconds") for p in PHASES}
    if "cache" in row:
        lines |= {
            "cache": row["cache"],
            "  bytes a token": f"{row['cache_bytes_per_token']:,}",
            "  longest context, computed": f"{row['longest_context_tokens']:,}",
        }
    return lines | {
        "MFU": _shown(row["mfu"], ".1%"),
        "peak memory, MiB": _shown(row["peak_memory_bytes"], ",.0f", 2**20),
        "FLOPs a token": f"{row['flops_per_token']:,.0f}",
        "parameters": f"{row['parameters']:,}",
        "loss, nats/token": _shown(row["loss_nats_per_token"], ".4f"),
    }


def cell_text(mode: str, cell: Row) -> str:
    """One comparison: both sides, what is saved, and what ran where."""
    title = Cell(**cell["cell"]).name()
    if cell["status"] != "ok":
        return ": ".join(filter(None, (title, cell["status"], cell["message"])))
    sides, found = list(cell["sides"].values()), cell["comparison"]
    first, second = (_lines(mode, side) for side in sides)
    table = [[what, first[what], second[what]] for what in first]
    heads, aligned = ["", *(side["name"] for side in sides)], ("left", "right", "right")
    text = [title] if title else []
    text.append(tabulate(table, heads, disable_numparse=True, colalign=aligned))
    rounds, own = found["time_ratio"]["rounds"], sides[0]
    trained = f"{own['steps_before_loss']} steps, {own['tokens_before_loss']:,} tokens"
    loss = "" if own["loss_nats_per_token"] is None else f"; loss after {trained}"
    text += [
        f"median of {rounds} rounds, both sides in turn (p10 to p90); models in memory: "
        f"{cell['resident']}; memory: {own['memory_is'] or 'not measured'}{loss}",
        f"tokens/s, ratio {_interval(found['tokens_per_second_ratio'], '.3f')}; "
        f"{'95 % ' if rounds >= LEAST_ROUNDS else ''}intervals",
        *_too_few(rounds),
        _saved(found),
        *(f"{side['name']}: {line}" for side in sides for line in side["plan"]),
    ]
    for label, key in (("NOT EQUAL", "unequal"), ("models differ", "model_differences")):
        text += [f"{label}: {k}: {_words(a)} and {_words(b)}" for k, (a, b) in cell[key].items()]
    return "\n".join(text)


def sweep_text(cells: Sequence[Row]) -> str:
    """A line a cell."""
    rows = []
    for cell in cells:
        title = Cell(**cell["cell"]).name()
        if cell["status"] != "ok":
            rows.append([title, cell["status"], *[""] * 6])
            continue
        found, sides = cell["comparison"], cell["sides"].values()
        speeds = [f"{side['tokens_per_second']:,.0f}" for side in sides]
        memory = " / ".join(_shown(s["peak_memory_bytes"], ",.0f", 2**20) for s in sides)
        unequal = " (NOT EQUAL)" if cell["unequal"] else ""
        rows.append([
            title + unequal, *speeds, _interval(found["tokens_per_second_ratio"], ".3f"),
            _interval(found["saved_time_share"], ".1%"), f"{found['saved_flops_share']:.1%}",
            _interval(found["share_reached"], ".2f"), memory,
        ])  # fmt: skip
    done = next((cell["sides"] for cell in cells if cell["status"] == "ok"), None)
    names = [f"{side['name']}, tokens/s" for side in done.values()] if done else ["", ""]
    heads = ["cell", *names, "ratio", "time saved", "FLOP limit", "share reached", "MiB"]
    table = tabulate(rows, heads, disable_numparse=True, colalign=("left", *["right"] * 7))
    rounds = [c["comparison"]["time_ratio"]["rounds"] for c in cells if c["status"] == "ok"]
    return "\n".join([table, *(_too_few(min(rounds)) if rounds else [])])


def as_csv(cells: Sequence[Row]) -> str:
    """A line for each side of each cell; an empty field is JSON's null."""
    file = io.StringIO()
    ratios = [f"{name}{end}" for name in _RATIOS for end in ("", "_low", "_high")]
    coordinates = [f"cell_{key}" for key in Cell.__dataclass_fields__]
    heads = [
        *coordinates,
        "status",
        "side",
        *_SIDE_KEYS,
        "saved_flops_share",
        *ratios,
        "rounds",
        "unequal",
    ]
    writer = csv.DictWriter(file, heads, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        common = {f"cell_{k}": v for k, v in cell["cell"].items()} | {"status": cell["status"]}
        if cell["status"] != "ok":
            writer.writerow(common)
            continue
        found = cell["comparison"]
        common |= {"saved_flops_share": found["saved_flops_share"]}
        common["rounds"] = found["time_ratio"]["rounds"]
        common["unequal"] = " ".join(cell["unequal"])
        for name in _RATIOS:
            if found[name] is not None:
                for end, key in (("", "ratio"), ("_low", "low"), ("_high", "high")):
                    common[f"{name}{end}"] = found[name][key]
        for side, row in cell["sides"].items():
            writer.writerow(common | {"side": side} | {k: row.get(k) for k in _SIDE_KEYS})
    return file.getvalue()


def as_png(cells: Sequence[Row]) -> bytes:
    """Tokens per second of both sides in every cell, with p10 to p90; under each what is saved."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.0, 1.6 * len(cells) + 1.5), 4.5), layout="constrained")
    axes = figure.subplots()
    done = [(at, cell["sides"]) for at, cell in enumerate(cells) if cell["status"] == "ok"]
    for offset, (key, colour) in enumerate((("config", "#0072B2"), ("baseline", "#E69F00"))):
        rows = [sides[key] for _, sides in done]
        speeds = [row["tokens_per_second"] for row in rows]
        low = [row["tokens_per_second"] - row["tokens_per_second_p10"] for row in rows]
        high = [row["tokens_per_second_p90"] - row["tokens_per_second"] for row in rows]
        places = [at + 0.4 * offset - 0.2 for at, _ in done]
        name = rows[0]["name"] if rows else key
        axes.bar(places, speeds, 0.38, yerr=(low, high), capsize=3, color=colour, label=name)
    axes.set_xticks(range(len(cells)), [_label(cell) for cell in cells], fontsize="small")
    axes.set_ylabel("tokens/s, median (p10 to p90)")
    axes.set_ylim(bottom=0)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _label(cell: Row) -> str:
    """Under the bars of a cell."""
    name, says = Cell(**cell["cell"]).name().replace(", ", "\n"), cell["status"]
    if says == "ok":
        says = f"time saved {cell['comparison']['saved_time_share']['ratio']:.1%}"
    return "\n".join(filter(None, (name, says)))


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    aside.replace(path)
