"""Writes the page: one HTML file with its plots in it, the plots as files, and the numbers."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from data.errors import InputError
from eval.compare import plots
from eval.compare.curves import POINTS
from eval.compare.fairness import CHECKS
from eval.compare.markdown import markdown
from eval.compare.results import compare
from eval.compare.runs import Run
from eval.compare.sweep import Trial

TEMPLATES = Path(__file__).resolve().parent / "template"


def write_page(
    output: Path,
    arms: Mapping[str, Sequence[Run]],
    *,
    baseline: str | None = None,
    title: str,
    sweeps: Mapping[str, Sequence[Trial]] | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Writes OUTPUT/index.html, its plots, comparison.json and .md; the path of index.html.

    arms: the runs of each, which differ in their seeds alone. baseline: the arm that the others are
    compared with; None: the one vanilla arm, else the first. sweeps: the trials from which the
    learning rate of an arm was chosen. notes: sentences for the reader. InputError on what cannot
    be compared. Equal input gives equal bytes. Every file is whole, the page comes last.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; a folder is expected")
    if (output / "index.html").is_dir():
        raise InputError(f"{output / 'index.html'}: is a folder; give another --output")
    comparison = compare(arms, baseline=baseline, title=title, sweeps=sweeps or {}, notes=notes)
    drawn = plots.plots(comparison)
    files = {f"{plot.name}.png": plot.png for plot in drawn}
    files["comparison.json"] = (
        json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    ).encode()
    files["comparison.md"] = markdown(comparison).encode()
    files["index.html"] = render(comparison, drawn).encode()
    output.mkdir(parents=True, exist_ok=True)
    aside = {name: output / f"{name}.{os.getpid()}.partial" for name in files}
    try:
        for name, content in files.items():
            aside[name].write_bytes(content)
        for name, path in aside.items():
            path.replace(output / name)
    finally:
        for path in aside.values():
            if path.is_file():
                path.unlink()
    for name in plots.FILES:  # of a page that was here before
        if f"{name}.png" not in files:
            (output / f"{name}.png").unlink(missing_ok=True)
    return output / "index.html"


def render(comparison: Mapping[str, Any], drawn: Sequence[plots.Plot]) -> str:
    """The HTML of a comparison."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["setting"] = _setting
    return environment.get_template("page.html").render(
        **comparison,
        comparison=comparison,
        plots=drawn,
        checks=CHECKS,
        points=POINTS,
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
    )


def _number(value: float | None, form: str = ",d", scale: float = 1) -> Markup:
    """A number in <data>, whose value is that of comparison.json; n/a for None."""
    if value is None:
        return Markup('<span class="none">n/a</span>')
    shown = format(value if scale == 1 else value / scale, form)
    # A minus sign has the width of a plus; a hyphen has not.
    shown = shown.replace("-", "\N{MINUS SIGN}") if shown.startswith("-") else shown
    return Markup('<data value="{}">{}</data>').format(json.dumps(value), shown)


def _setting(value: Any) -> Markup:
    """A value of a configuration as YAML has it."""
    return escape(json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value)
