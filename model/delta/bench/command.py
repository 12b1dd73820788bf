"""The sub-command: what is measured, where, and what of it is written."""

import argparse
import importlib.metadata
import os
import shlex
import time
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from model.delta.bench.cases import cases
from model.delta.bench.measure import CLOCKS, MODES, Row, measure_case
from model.delta.bench.table import table
from training import run_dir

SCALARS = ("layers", "rank", "seconds", "threads")  # numbers over 0


def peft_version() -> str | None:
    """Of the installed package; None where there is none."""
    try:
        import peft  # noqa: F401  (a package without its own dependencies is none)

        return importlib.metadata.version("peft")
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return None


def environment(options: argparse.Namespace, peft: str | None) -> dict[str, Any]:
    """Hardware, versions, threads and load, before anything is measured."""
    found = run_dir.environment(torch.device("cpu"))
    del found["command_line"], found["world_size"]  # a path of this machine; one process
    found["packages"]["peft"] = peft
    words = ["--sizes", *map(str, options.sizes), "--rows", *map(str, options.rows)]
    for name in SCALARS:
        words += [f"--{name}", str(getattr(options, name))]
    words += ["--clock", options.clock]
    return found | {
        "command": shlex.join(["python", "-m", "model.delta", "bench", *words]),
        "threads": torch.get_num_threads(),
        "clock": options.clock,
        "load_average_1min": os.getloadavg()[0],
        "cpus_of_the_process": len(os.sched_getaffinity(0)),
    }


def bench(options: argparse.Namespace) -> None:
    """Measures every case, prints tables, and writes --output after each. InputError where an
    option is out of range.
    """
    for name in SCALARS:
        if getattr(options, name) <= 0:
            raise InputError(f"--{name} {getattr(options, name)}: it must be over 0")
    if options.clock == "cpu" and options.threads > 1:
        raise InputError(f"--clock cpu: with --threads {options.threads}; allowed is wall")
    clock = CLOCKS[options.clock]
    every = list(cases(options.sizes, options.rows, options.layers, options.rank))
    torch.set_num_threads(options.threads)
    peft = peft_version()
    if peft is None:
        print("peft is not installed: only frozen layers and our deltas are measured")
    begun = time.monotonic()
    result: Row = {"environment": environment(options, peft), "measurements": [], "ratios": []}
    result["checks"] = []
    for number, case in enumerate(every, start=1):
        print(f"[{number}/{len(every)}] {case.name()}", flush=True)
        for key, rows in measure_case(case, peft is not None, options.seconds, clock).items():
            result[key] += rows
        result["seconds"] = time.monotonic() - begun
        result["load_average_1min_at_the_end"] = os.getloadavg()[0]
        if options.output is not None:
            run_dir.write_json(Path(options.output), result)
    _print(result)


def _print(result: Row) -> None:
    for mode in MODES:
        print(f"\n{mode}, median (p10 to p90) of a layer; ratios with 95 % intervals\n")
        print(table(result["measurements"], result["ratios"], mode))
    where = result["environment"]
    first, last = where["load_average_1min"], result["load_average_1min_at_the_end"]
    versions = ", ".join(f"{name} {where['packages'][name]}" for name in ("torch", "peft"))
    print(
        f"\n{where['device']}, threads: {where['threads']}, {where['clock']} clock, {versions}, "
        f"load {first:.1f} to {last:.1f}, {result['seconds']:.0f} s"
    )
