"""What the command prints and writes."""

from typing import Any

from tabulate import tabulate

from eval.convert.build import Converted
from eval.convert.source import Dense

COLUMNS = {
    "layer": "layer",
    "projection": "projection",
    "rank": "rank",
    "relative_error": "error",
    "weighted_relative_error": "weighted error",
    "kept_energy": "kept energy",
    "parameters_before": "parameters",
    "parameters_after": "after",
    "flops_per_token_before": "FLOPs/token",
    "flops_per_token_after": "after",
}


def summarise(dense: Dense, converted: Converted) -> dict[str, Any]:
    """Counts of the whole model and of its attention, before and after."""
    names = converted.config.attention_projections()
    rows = [row for row in converted.projections if row["projection"] in names]
    result: dict[str, Any] = {}
    for when, config in (("before", dense.config), ("after", converted.config)):
        result |= {
            f"parameters_{when}": config.num_parameters(),
            f"parameters_attention_{when}": sum(row[f"parameters_{when}"] for row in rows),
            f"flops_per_token_forward_{when}": config.flops_per_token(dense.seq_len),
        }
    return result


def describe(result: dict[str, Any]) -> str:
    """The tables that the command prints."""
    rows = [[row[key] for key in COLUMNS] for row in result["projections"]]
    formats = ("", "", "", ".4f", ".4f", ".4f", ",", ",", ",", ",")
    lines = [tabulate(rows, list(COLUMNS.values()), floatfmt=formats, intfmt=",", missingval="-")]
    totals = [
        [label, result[f"{key}_before"], result[f"{key}_after"]]
        for label, key in (
            ("parameters", "parameters"),
            ("of attention's projections", "parameters_attention"),
            (f"FLOPs/token at {result['seq_len']}", "flops_per_token_forward"),
        )
    ]
    lines += ["", tabulate(totals, ["", "before", "after"], floatfmt=",.0f", intfmt=",")]
    if result["scores"]:
        before, after = result["scores"]["before"], result["scores"]["after"]
        scores = [
            [label, before[key], after[key]]
            for label, key in (
                ("nats/token", "loss_nats_per_token"),
                ("perplexity", "perplexity"),
                ("bits/byte", "bits_per_byte"),
            )
        ]
        title = f"{result['scores']['split']}, {before['tokens']:,} tokens"
        lines += ["", tabulate(scores, [title, "before", "after"], floatfmt=".4f")]
    return "\n".join(lines)
