"""One side in a process of its own: python -m eval.throughput.alone TASK.json-text OUTPUT.

Started by eval.throughput on a CPU, where the peak of resident memory is one number for the whole
life of a process.
"""

import json
import sys
from pathlib import Path

from eval.throughput.options import Cell, Options, run_of
from eval.throughput.sides import Side, workload
from training import distributed
from training.hardware import peak_memory_bytes
from training.run_dir import write_json


def main() -> None:
    """Builds the side, makes the steps of the warm-up and writes the peaks before and after."""
    task, output = json.loads(sys.argv[1]), Path(sys.argv[2])
    cell = Cell(**task["cell"])
    options = Options(**{**task["options"], "cells": [cell]})
    device = distributed.init_distributed()
    if options.mode == "train":
        distributed.prepare_deepspeed()  # imports it: that memory is not the model's
    before = peak_memory_bytes(device)
    run = run_of(task["side"], options, cell, distributed.world_size())
    form = cell.form(task["side"])
    side = Side(task["side"], lambda: workload(options, run, device, task["below"], form), device)
    side.open(options.warm_up)
    found = {"peak_memory_bytes": peak_memory_bytes(device), "before_building_bytes": before}
    write_json(output, found)
    side.free()
    distributed.barrier()
    distributed.leave(0)


if __name__ == "__main__":
    main()
