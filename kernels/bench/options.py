"""The command line. What does not fit is a UsageError with one line."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from kernels.bench.operations import BENCH_SIZES, OPERATIONS, PROVIDERS

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PLOT_SUFFIXES = (".png", ".pdf", ".svg")
# The middle first, then the ends: if the time runs out, every operation has been seen.
ROWS = {"cuda": (16384, 4096, 65536, 8192, 32768), "cpu": (2048,)}
SIZES = {"cuda": ("130m", "370m", "3b"), "cpu": ("tiny",)}


class UsageError(Exception):
    """A command line that cannot be run; the message says what is allowed."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.removeprefix("argument "))


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in names:
            raise argparse.ArgumentTypeError(f"{value!r}; allowed are {', '.join(names)}")
        return value

    return parse


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(value: str) -> Any:
        try:
            number = kind(value)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            name = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"{value!r}; allowed are {name} over 0")
        return number

    return parse


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m kernels.bench",
        description="Times the operations of the attention layer against plain torch.",
        epilog="Exit codes: 0; 1 where a provider is wrong or raises (out of memory is no error); "
        "2 for a command line that cannot be run.",
        allow_abbrev=False,
    )

    def add(name: str, text: str, **rest: Any) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, help=text, dest=name, **rest)

    add("device", "auto, cuda or cpu", type=_one_of(("auto", "cuda", "cpu")), default="auto")
    add(
        "sizes",
        f"any of {', '.join(BENCH_SIZES)} (default: all but tiny; on a CPU, tiny)",
        type=_one_of(tuple(BENCH_SIZES)),
        nargs="+",
    )
    add(
        "rows",
        "batch times seq_len, in the order to run (default: "
        f"{' '.join(map(str, ROWS['cuda']))}; on a CPU, {ROWS['cpu'][0]})",
        type=_positive(int),
        nargs="+",
    )
    add("seq_len", "positions of a sequence (default: 1024)", type=_positive(int), default=1024)
    add(
        "ops",
        f"any of {', '.join(OPERATIONS)} (default: all)",
        type=_one_of(tuple(OPERATIONS)),
        nargs="+",
        default=list(OPERATIONS),
    )
    add(
        "providers",
        f"any of {', '.join(PROVIDERS)} (default: all)",
        type=_one_of(tuple(PROVIDERS)),
        nargs="+",
        default=list(PROVIDERS),
    )
    add("dtype", "bf16, fp16 or fp32 (default: bf16)", type=_one_of(tuple(DTYPES)), default="bf16")
    add(
        "seconds_per_case",
        "time to spend on the repeats of a case, all providers together (default: 0.5)",
        type=_positive(float),
    )
    add("repeats", "repeats of each provider, in place of seconds_per_case", type=_positive(int))
    add(
        "minutes",
        "start no case after this time; the others are listed as not run (default: 4.5)",
        type=_positive(float),
        default=4.5,
    )
    add("cuda_graphs", "replay CUDA graphs: no launches in the times", action="store_true")
    add("output", "JSON, written after every case", type=Path)
    add("csv", "the same rows as CSV, written after every case", type=Path)
    add("plot", "time a row over the rows, if matplotlib is installed", type=Path)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with device a torch.device and dtype a torch.dtype; UsageError."""
    options = _parser().parse_args(argv)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and found != "cuda":
        raise UsageError("--device: cuda, but torch finds no CUDA device here; allowed is cpu")
    kind = found if options.device == "auto" else options.device
    if options.cuda_graphs and kind != "cuda":
        raise UsageError("--cuda_graphs: needs a CUDA device; the device is the CPU")
    if options.repeats is not None and options.seconds_per_case is not None:
        raise UsageError("--repeats: not together with --seconds_per_case")
    options.device = torch.device(kind)
    options.dtype = DTYPES[options.dtype]
    options.seconds_per_case = options.seconds_per_case or 0.5
    options.rows = options.rows or ROWS[kind]
    options.sizes = options.sizes or SIZES[kind]
    for name in ("rows", "sizes", "ops", "providers"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    for rows in options.rows:
        if rows % options.seq_len:
            raise UsageError(f"--rows: {rows} is no multiple of --seq_len {options.seq_len}")
    for name in ("output", "csv", "plot"):
        _check_file(name, getattr(options, name))
    if options.plot is not None and options.plot.suffix not in PLOT_SUFFIXES:
        raise UsageError(f"--plot: {options.plot}; allowed are {', '.join(PLOT_SUFFIXES)}")
    return options


def _check_file(name: str, path: Path | None) -> None:
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"--{name}: {path}: the folder {path.parent} does not exist")
    if path.is_dir():
        raise UsageError(f"--{name}: {path} is a folder; allowed is a file")
    if not os.access(path.parent, os.W_OK):
        raise UsageError(f"--{name}: {path}: the folder {path.parent} cannot be written to")
