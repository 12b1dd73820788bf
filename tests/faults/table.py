"""Writes what the fault tests saw into docs/reliability.md, between its two markers:

python -m pytest tests/faults --fault-results results.json
python -m tests.faults.table results.json --output docs/reliability.md
"""

import argparse
import json
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from data.errors import InputError, run_cli
from tests.faults.catalogue import FAULTS

BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
HEAD = """\
| fault | what holds afterwards | launcher; ZeRO stages; saves | times | exit code: launcher (rank)\
 | s until all gone | steps to redo |
|---|---|---|--:|---|--:|--:|
"""


def table(results: list[dict[str, Any]]) -> str:
    """The text between the markers, of one session or several. InputError where a fault was not
    done.
    """
    rows = [row for one in results for row in one["rows"]]
    missing = [fault for fault in FAULTS if fault not in {row["fault"] for row in rows}]
    if missing:
        raise InputError(f"no result for {', '.join(missing)}; run all of tests/faults")
    order = list(FAULTS)
    rows = sorted(rows, key=lambda row: (order.index(row["fault"]), row["launcher"] != "torchrun"))
    lines = [
        _line(fault, list(group))
        for (fault, _), group in groupby(rows, lambda row: (row["fault"], row["launcher"]))
    ]
    return f"{_origin(results)}\n\n{HEAD}{''.join(lines)}\n{_messages(rows)}"


def _origin(results: list[dict[str, Any]]) -> str:
    last = results[-1]
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    sessions = f"{len(results)} session{'s' if len(results) > 1 else ''}"
    return f"{last['date']}; {sessions}; {last['hardware']}; {versions}."


def _line(fault: str, rows: list[dict[str, Any]]) -> str:
    stages = _listed(row["zero_stage"] for row in rows)
    saving = _listed(row["saving"] for row in rows)
    codes = sorted({_codes(row) for row in rows})
    cells = [
        f"`{fault}`: {FAULTS[fault].done}",
        FAULTS[fault].holds,
        f"{rows[0]['launcher']}; {stages}; {saving}",
        str(len(rows)),
        ", ".join(codes),
        _spread([row["seconds_until_gone"] for row in rows], ".1f"),
        _spread([row["steps_lost"] for row in rows], "d"),
    ]
    return f"| {' | '.join(cells)} |\n"


def _codes(row: dict[str, Any]) -> str:
    if row["exit_code"] is None:
        return "goes on"
    rank = row["rank_exit_code"]
    return str(row["exit_code"]) if rank is None else f"{row['exit_code']} ({rank})"


def _spread(values: list[Any], form: str) -> str:
    known = sorted(value for value in values if value is not None)
    if not known:
        return "-"
    low, high = format(known[0], form), format(known[-1], form)
    return low if low == high else f"{low} to {high}"


def _messages(rows: list[dict[str, Any]]) -> str:
    said = {row["fault"]: row["message"] for row in rows if row["message"]}
    lines = "".join(f"- `{fault}`: `{message}`\n" for fault, message in said.items())
    return f"What the user reads (paths shortened):\n\n{lines}"


def _listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, sorted(set(values))))


def faults_of(page: str) -> list[str]:
    """The faults in the table of a page."""
    return sorted({found[1] for found in re.finditer(r"^\| `([\w-]+)`:", page, re.M)})


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.table", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="what --fault-results wrote")
    parser.add_argument("--output", type=Path, required=True, help="the page to write into")
    options = parser.parse_args()
    results = [json.loads(path.read_text()) for path in options.results]
    before, begun, rest = options.output.read_text().partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (begun and ended):
        raise InputError(f"{options.output}: has not the lines {BEGIN} and {END}")
    options.output.write_text(f"{before}{BEGIN}\n{table(results)}{END}{after}")
    return 0


if __name__ == "__main__":
    run_cli(main)
