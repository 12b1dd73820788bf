"""The final table in Markdown, for pages that quote a comparison."""

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate


def markdown(comparison: Mapping[str, Any]) -> str:
    """Title, warnings, notes and the final table; numbers are those of comparison.json."""
    arms, baseline = comparison["arms"], comparison["baseline"]
    bits_only = comparison["measure"]["unit"] == "bits_per_byte"
    rows = [_row(arm, baseline, bits_only) for arm in arms]
    aligned = ("left", *["right"] * (len(rows[0]) - 1))
    table = tabulate(rows, "keys", tablefmt="pipe", disable_numparse=True, colalign=aligned)
    lines = [f"# {comparison['title']}", ""]
    lines += [f"- Warning: {one['text']}" for one in comparison["warnings"]]
    lines += [f"- {note}" for note in comparison["notes"]]
    difference = f"Differences: from {baseline}, by seed, with " if len(arms) > 1 else ""
    interval = f"the {comparison['confidence']:.0%} interval of Student's t. " if difference else ""
    lines += [
        "",
        table,
        "",
        f"Mean ± standard deviation over seeds. {difference}{interval}".strip(),
    ]
    return "\n".join(lines) + "\n"


def _row(arm: Mapping[str, Any], baseline: str, bits_only: bool) -> dict[str, str]:
    unit = "bits_per_byte" if bits_only else "nats_per_token"
    row = {
        "arm": arm["name"].replace("|", "\\|"),
        "seeds": f"{arm['runs_counted']}",
        "learning rate": _shown(arm["learning_rate"], ".3g"),
        "parameters": _shown(arm["parameters"], ",d"),
        "FLOPs/token, forward": _shown(arm["flops_per_token_forward"], ",.0f"),
        "tokens": _shown(arm["tokens"], ",d"),
    }
    if not bits_only:
        mean, sd = arm["loss_nats_per_token_mean"], arm["loss_nats_per_token_sd"]
        row["loss, nats/token"] = _shown(mean, ".4f") + (f" ± {sd:.4f}" if sd is not None else "")
        row["perplexity"] = _shown(arm["perplexity"], ",.2f")
    row["bits/byte"] = _shown(arm["bits_per_byte_mean"], ".4f")
    found, low, high = (arm[f"difference{end}_{unit}"] for end in ("", "_low", "_high"))
    own = arm["name"] == baseline or found is None
    row["difference"] = "–" if own else f"{found:+.4f}"
    if not own and low is not None:
        row["difference"] += f" ({low:+.4f} to {high:+.4f})"
    row["p (Holm)"] = "–" if own else _shown(arm["difference_p"], ".2g")
    if not own and arm["difference_p_holm"] is not None:
        row["p (Holm)"] += f" ({arm['difference_p_holm']:.2g})"
    return row


def _shown(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)
