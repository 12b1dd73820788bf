"""Writes the page: one HTML file with its plots in it, the plots as files, and the numbers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from data.errors import InputError
from eval.analysis.plots import FILES, LABELS, plots
from eval.compare.page import TEMPLATES as COMPARE_TEMPLATES
from eval.compare.plots import Plot

TEMPLATES = Path(__file__).resolve().parent / "template"
WEIGHTS = {
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "ffn": ["gate_proj", "up_proj", "down_proj"],
}
SITE_ROWS = {
    "attention": ["attention_input", "q", "k", "v", "heads", "attention_output"],
    "ffn": ["ffn_input", "ffn_hidden", "ffn_output"],
    "": ["residual"],
}


def check_output(output: Path) -> None:
    """InputError where no folder of this name can be."""
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"--output {output}: {there} is a file; a folder is expected")


def write_page(output: Path, analysis: Mapping[str, Any]) -> Path:
    """Writes OUTPUT/index.html, OUTPUT/*.png and OUTPUT/analysis.json; the path of index.html.

    Every file is written aside first, so that an error leaves what was there before. Equal input
    gives equal bytes.
    """
    check_output(output)
    drawn = plots(analysis["runs"])
    files = {f"{plot.name}.png": plot.png for plot in drawn}
    text = json.dumps(analysis, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    files["analysis.json"] = text.encode()
    files["index.html"] = render(analysis, drawn).encode()
    output.mkdir(parents=True, exist_ok=True)
    aside = {name: output / f"{name}.partial" for name in files}
    try:
        for name, content in files.items():
            aside[name].write_bytes(content)
        for name, path in aside.items():
            path.replace(output / name)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    for name in FILES:  # of a page that was here before
        if f"{name}.png" not in files:
            (output / f"{name}.png").unlink(missing_ok=True)
    return output / "index.html"


def render(analysis: Mapping[str, Any], drawn: Sequence[Plot]) -> str:
    """The HTML of an analysis."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "rank": _rank}
    style = (COMPARE_TEMPLATES / "style.css").read_text(encoding="utf-8")
    return environment.get_template("page.html").render(
        **analysis,
        plots=drawn,
        labels=LABELS,
        weight_groups=list(WEIGHTS.items()),
        site_groups=list(SITE_ROWS.items()),
        style=Markup(style),
    )


def _percent(share: float | None) -> Markup:
    """A share in percent; <data> has the value of analysis.json."""
    return _number(share, "n/a" if share is None else f"{100 * share:.1f} %")


def _rank(rank: float | None) -> Markup:
    """A rank, which is no whole number where it is a mean."""
    return _number(rank, "n/a" if rank is None else f"{rank:,.1f}")


def _number(value: float | None, shown: str) -> Markup:
    if value is None:
        return Markup('<span class="none">n/a</span>')
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), shown)
