"""Compiles every launch that the project ships for each architecture, without a GPU, and checks
the compiled code.

    python -m kernels.aot --check docs/kernels.md
    python -m kernels.aot --arch 90 --output readings.json

The interpreter shows that a kernel computes the right numbers, not that it compiles well: it knows
no registers, no shared memory and no asynchronous dots. Those are read here, from the compiler's
log, its intermediate code (TTGIR), its PTX and the disassembled machine code, and held against
rules.

launch.py     a launch as the compiler sees it
variants.py   which launches are shipped
compile.py    compiles them
readings.py   what is read, and from the log and TTGIR;  ptx.py, machine.py  from PTX, machine code
rules.py      what compiled code must keep
occupancy.py  how many programs share a multiprocessor
table.py      the page docs/kernels.md, and the JSON

Exit codes: 0 no rule is violated, 1 one is (or the table differs), 2 wrong input.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NoReturn

from kernels.aot import table
from kernels.aot.compile import Results, compile_all
from kernels.aot.rules import violations
from kernels.aot.variants import shipped
from kernels.triton import configs


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m kernels.aot", description=(__doc__ or "").partition("\n\n")[0])
    allowed = configs.ARCHITECTURES
    parser.add_argument("--arch", type=int, nargs="+", choices=allowed, help="default: all")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="writes all readings")
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="writes the table")
    parser.add_argument("--check", type=Path, metavar="FILE.md", help="compares with this table")
    options = parser.parse_args(arguments)
    if options.arch and (options.table or options.check):
        parser.error("the table has every architecture: leave out --arch, or --table and --check")
    for name in ("output", "table"):
        path = getattr(options, name)
        if path is not None and (problem := _unwritable(path)):
            parser.error(f"--{name} {path}: {problem}")
    try:
        options.written = None if options.check is None else options.check.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is no text"
        parser.error(f"--check {options.check}: {reason}")
    if importlib.util.find_spec("triton") is None:
        parser.error("triton is not installed")
    from triton import knobs

    if knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, so nothing compiles: unset it")
    return options


def _unwritable(path: Path) -> str | None:
    folder = path.absolute().parent
    if path.is_dir():
        return "is a folder"
    if not folder.is_dir():
        return f"the folder {path.parent} does not exist"
    where = path if path.exists() else folder
    return None if os.access(where, os.W_OK) else f"{where} cannot be written"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles, prints, writes and compares; the exit code."""
    options = _parse(arguments)
    start = time.perf_counter()
    wanted = shipped(sorted(set(options.arch or configs.ARCHITECTURES)))
    try:
        results = compile_all(wanted)
    except BrokenProcessPool:
        print("a compiling process died: out of memory, or the compiler aborted", file=sys.stderr)
        return 1
    fresh = table.page(results)
    print(fresh, end="")
    if options.table is not None:
        options.table.write_text(fresh, encoding="utf-8")
    if options.output is not None:
        text = json.dumps(table.to_json(results), indent=1) + "\n"
        options.output.write_text(text, encoding="utf-8")
    compilations = len({(v.architecture, v.launch) for v in wanted})
    seconds = time.perf_counter() - start
    print(f"\n{len(wanted)} variants, {compilations} compilations, {seconds:.0f} s", flush=True)
    problems = _problems(results, fresh, options)
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


def _problems(results: Results, fresh: str, options: argparse.Namespace) -> list[str]:
    """The violations, and where the page to compare with differs."""
    found = [
        f"violated: {variant.name}: {message}"
        for variant, read in results
        for message in violations(variant, read)
    ]
    if options.written is not None and options.written != fresh:
        found.append(f"{options.check} differs from what was compiled (-), which is (+):")
        found += table.difference(options.written, fresh)
    return found


if __name__ == "__main__":
    sys.exit(main())
