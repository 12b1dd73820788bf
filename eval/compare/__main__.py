"""The command: python -m eval.compare RUN RUN ... --output DIR"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from data.errors import InputError, run_cli
from eval.compare.page import write_page
from eval.compare.runs import Run, group, read_run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; InputError where they do not fit."""
    parser = _Parser(
        prog="python -m eval.compare",
        description="Compares runs of train.py: one HTML page, PNG plots and a JSON file.",
        epilog="docs/comparison.md says how every number is computed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run directory, or NAME=RUN to say which arm it belongs to; without a name, runs "
        "that differ in the seed alone are one arm",
    )
    parser.add_argument("--output", required=True, help="a folder for the page and its files")
    parser.add_argument(
        "--baseline",
        help="the arm that the others are compared with; by default the one vanilla arm, else the "
        "first",
    )
    parser.add_argument("--title", default="Comparison of runs", help="the title of the page")
    return parser.parse_args(argv)


def read_arms(arguments: Sequence[str]) -> dict[str, list[Run]]:
    """The runs of a command line by arm: those with a name, then the others by their settings."""
    named: dict[str, list[Run]] = {}
    others: list[Run] = []
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if Path(argument).exists() or not equals:  # a folder may have an = in its name
            name, path = "", argument
        elif not name:
            raise InputError(f"{argument}: the name before = is missing; NAME=RUN is expected")
        run = read_run(Path(path))
        if name:
            named.setdefault(name, []).append(run)
        else:
            others.append(run)
    found = group(others)
    for name in found:
        if name in named:
            raise InputError(f"{name}: runs without a name make up an arm of this name too")
    return named | found


def main(argv: Sequence[str] | None = None) -> int:
    """Reads, compares and writes; the exit code."""
    options = parse(sys.argv[1:] if argv is None else argv)
    output = Path(options.output)
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output}: is a file; a folder is expected")
    arms = read_arms(options.runs)
    page = write_page(output, arms, baseline=options.baseline, title=options.title)
    print(f"{page}: {sum(map(len, arms.values()))} runs of {len(arms)} arms ({', '.join(arms)})")
    return 0


if __name__ == "__main__":
    run_cli(main)
