"""The command: python -m training.bench {step,ddp,loop,lpa,startup,loader,all,page}."""

import argparse
import importlib.metadata
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from data.errors import InputError, require_folder_of, run_cli
from training import run_dir
from training.bench import page, processes
from training.bench.measure import DifferentLossError, Row

BENCHMARKS = {
    "step": "a training step of the vanilla model against transformers' Llama",
    "ddp": "the engine on two ranks against DistributedDataParallel",
    "loop": "train.py against the least loop with DeepSpeed",
    "lpa": "LPA against vanilla: how much of the saved FLOPs is saved time",
    "startup": "from the start of the process to the end of the first optimizer step",
    "loader": "batches from the page cache",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options; InputError where they do not fit."""
    names = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
    parser = _Parser(
        prog="python -m training.bench",
        description="Benchmarks of the training system.",
        epilog="Exit codes: 0; 1 where the two sides of a comparison compute different losses or a "
        "measured program fails; 2 for a command line that cannot be run.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "benchmark",
        choices=[*BENCHMARKS, "all", "page"],
        help=f"{names}; all: each of them; page: measure nothing, write a result into a page",
    )
    parser.add_argument("--output", help="write the result to this JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to test the programs")
    parser.add_argument("--input", nargs="+", help="page: JSON files of results")
    parser.add_argument("--page", help="page: the Markdown file to put its tables into")
    options = parser.parse_args(argv)
    for name in ("input", "page"):
        given = getattr(options, name)
        if (options.benchmark == "page") != (given is not None):
            raise InputError(f"--{name}: `page` needs it, and no other benchmark takes it")
        for file in [given] if isinstance(given, str) else given or []:
            if not Path(file).is_file():
                raise InputError(f"--{name} {file}: no such file")
    require_folder_of(options.output)
    return options


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Hardware, versions and the command."""
    found = run_dir.environment(torch.device("cpu"))
    del found["command_line"], found["world_size"]  # paths of this machine; some have two ranks
    try:
        found["packages"]["transformers"] = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        found["packages"]["transformers"] = None
    return found | {
        "command": shlex.join(["python", "-m", "training.bench", *argv]),
        "mkl_cbwr": os.environ["MKL_CBWR"],
    }


def measured(name: str, quick: bool, alone: bool) -> Row:
    """The result of one benchmark; with others, from a process of its own."""
    begun = time.monotonic()
    if alone:
        result: Row = import_module(f"training.bench.{name}").measure(quick)
        return result | {"seconds": time.monotonic() - begun}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        options = ["--output", str(output), *(["--quick"] if quick else [])]
        processes.run(processes.python("-m", "training.bench", name, *options))
        found: Row = json.loads(output.read_text())["benchmarks"][name]
    return found


def run(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Measures, prints and saves, one benchmark after the other."""
    begun = time.monotonic()
    names = list(BENCHMARKS) if options.benchmark == "all" else [options.benchmark]
    result: Row = {"environment": environment(argv), "quick": options.quick, "benchmarks": {}}
    for name in names:
        found = measured(name, options.quick, alone=len(names) == 1)
        result["benchmarks"][name] = found
        result["seconds"] = time.monotonic() - begun
        if options.output:
            run_dir.write_json(Path(options.output), result)
        print(page.section(name, found), end="\n\n", flush=True)
    print(page.where(result))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    # As train.py has it on a CPU (training/distributed.py); MKL reads it at its first call.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    if options.benchmark == "page":
        results = [json.loads(Path(file).read_text()) for file in options.input]
        page.update(Path(options.page), results)
        return 0
    # What was started is ended with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        run(options, argv)
    except (DifferentLossError, processes.ProgramError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run_cli(main)
