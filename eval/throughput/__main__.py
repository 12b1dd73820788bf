"""The command: python -m eval.throughput --config A.yaml --baseline B.yaml."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError, run_cli
from eval.throughput import output
from eval.throughput.cells import Runs, finished, measure_cell, runs_of
from eval.throughput.options import PROG, Cell, Options, parse
from training import distributed, hardware, run_dir
from training.bench.measure import Row
from training.bench.processes import ProgramError
from training.garbage import GarbageCollection


def choose_device(options: Options) -> torch.device:
    """The device of this rank; joins the others. InputError where the mode cannot have it."""
    if options.mode != "train":
        if distributed.world_size() > 1:
            raise InputError(f"--mode {options.mode}: one process; a launcher is for mode train")
        return distributed.evaluation_device(options.device)
    cuda = torch.cuda.is_available()
    if options.device not in ("auto", "cuda" if cuda else "cpu"):
        raise InputError(
            f"--device: {options.device}, and mode train takes the "
            f"{'GPU, which this machine has' if cuda else 'CPU: this machine has no usable GPU'}"
        )
    return distributed.init_distributed()


def environment(device: torch.device, argv: Sequence[str]) -> dict[str, Any]:
    """Hardware, versions and the command, without paths of this machine."""
    found = run_dir.environment(device)
    del found["command_line"]
    return found | {
        "command": shlex.join([*PROG.split(), *argv]),
        "mkl_cbwr": os.environ.get("MKL_CBWR"),
        "peak_flops_per_second": hardware.peak_flops(hardware.device_name(device)),
    }


def save(options: Options, result: Row) -> None:
    """The JSON, and the CSV and the plot beside it."""
    if options.output is None:
        return
    path = Path(options.output)
    run_dir.write_json(path, result)
    output.replace(path.with_suffix(".csv"), output.as_csv(result["cells"]).encode())
    output.replace(path.with_suffix(".png"), output.as_png(result["cells"]))


def run(
    options: Options, argv: Sequence[str], wanted: Mapping[Cell, Runs], device: torch.device
) -> None:
    """Measures cell by cell; rank 0 prints and saves after each."""
    first = distributed.rank() == 0
    about = environment(device, argv)
    settings = options.measured() | {k: about[k] for k in ("device", "world_size", "threads")}
    cells = distributed.from_rank_0(
        finished(options.output, settings, wanted) if options.sweep and first else []
    )
    result: Row = {"environment": about, "settings": settings, "cells": cells}
    done = [cell["cell"] for cell in cells]
    for cell, runs in wanted.items():
        if asdict(cell) in done:
            continue
        row = measure_cell(options, cell, runs, device)
        row |= {key: about[key] for key in ("git_commit", "git_dirty")}
        cells.append(row)
        if first:
            print(output.cell_text(options.mode, row), end="\n\n", flush=True)
            save(options, result)
    if first:
        where = (
            f"{about['device']}; ranks: {about['world_size']}; torch {about['packages']['torch']}"
        )
        print(output.sweep_text(cells) + "\n\n" + where if options.sweep else where, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    device = choose_device(options)
    # Before anything is measured, all that will be refused is.
    wanted = {cell: runs_of(options, cell, device) for cell in options.cells}
    garbage = GarbageCollection(1)  # as in training: never in the middle of a step
    try:
        run(options, argv, wanted, device)
    except ProgramError as error:
        print(f"error: the process that measures memory: {error}", file=sys.stderr)
        return 1
    finally:
        garbage.close()
    distributed.barrier()
    return 0


if __name__ == "__main__":
    run_cli(main, distributed.leave)
