"""The command: python -m eval.analysis RUN [RUN ...] --data DATA --output DIR"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from data.errors import InputError, run_cli
from eval.analysis.measure import measure, warnings
from eval.analysis.page import check_output, write_page
from eval.analysis.runs import open_sources, read_tokens
from eval.perplexity import DTYPES
from training import distributed


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; InputError where they do not fit."""
    parser = _Parser(
        prog="python -m eval.analysis",
        description="Spectra and ranks of attention and FFN, weights and activations, over the "
        "training of runs: one HTML page, PNG plots and a JSON file.",
        epilog="docs/analysis.md defines every number.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run directory (all its whole checkpoints) or one checkpoint; NAME=RUN names it",
    )
    parser.add_argument(
        "--data", required=True, help="a prepared folder, or a file that data.prepare reads"
    )
    parser.add_argument("--output", required=True, help="a folder for the page and its files")
    parser.add_argument("--split", default="valid", help="of a prepared folder (default: valid)")
    parser.add_argument(
        "--max_tokens",
        type=int,
        default=16384,
        help="analyse so many tokens from the start of the data (default: 16384)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--precision", choices=tuple(DTYPES), default="fp32", help="of the forward passes"
    )
    options = parser.parse_args(argv)
    if options.max_tokens < 1:
        raise InputError(f"--max_tokens: {options.max_tokens}; it must be at least 1")
    return options


def analyse(options: argparse.Namespace) -> dict[str, Any]:
    """What the page shows."""
    if distributed.world_size() > 1:
        raise InputError("eval.analysis runs in one process: start it with python, no launcher")
    sources = open_sources(options.runs)
    device = distributed.evaluation_device(options.device)
    # Read before anything is measured, so that a wrong text is found at once.
    tokens: list[Tensor] = [
        read_tokens(source, options.data, options.split, options.max_tokens) for source in sources
    ]
    runs = []
    for source, text in zip(sources, tokens, strict=True):
        print(f"{source.name}: {len(source.checkpoints)} checkpoints", file=sys.stderr)
        runs.append(measure(source, text, device, DTYPES[options.precision]))
    return {
        "data": Path(options.data).name,
        "split": options.split if Path(options.data).is_dir() else None,
        "precision": options.precision,
        "warnings": warnings(sources, runs),
        "runs": runs,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, measures and writes; the exit code."""
    options = parse(sys.argv[1:] if argv is None else argv)
    check_output(Path(options.output))
    analysis = analyse(options)
    page = write_page(Path(options.output), analysis)
    print(f"{page}: {', '.join(run['name'] for run in analysis['runs'])}")
    return 0


if __name__ == "__main__":
    run_cli(main)
