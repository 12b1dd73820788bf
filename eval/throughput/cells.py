"""One cell from its settings to its results; out of memory; results that are there already."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from eval.throughput.comparison import compare, flops_per_token, side_row
from eval.throughput.conditions import (
    conditions,
    expected_plan,
    model_differences,
    require_equal,
)
from eval.throughput.options import Cell, Options, run_of, side_names
from eval.throughput.sides import (
    Side,
    cache_of,
    choose_resident,
    measure,
    release,
    resident_memory_alone,
    workload,
)
from model.cache import cached_shapes
from model.execution import Plan
from training import distributed, hardware
from training.bench.measure import Row
from training.bench.processes import ProgramError
from training.config import RunConfig

OUT_OF_MEMORY = "out of memory"
# torch raises a plain RuntimeError for it, and the process that measures memory leaves its text.
_CPU_REFUSED = "DefaultCPUAllocator: can't allocate memory"
Runs = Mapping[str, RunConfig]


def runs_of(options: Options, cell: Cell, device: torch.device) -> dict[str, RunConfig]:
    """The runs of both sides, checked: InputError where they cannot be had or are not comparable.

    What the fused operators' check on the device may still change is checked again with the models.
    """
    world = distributed.world_size()
    runs = {side: run_of(side, options, cell, world) for side in ("config", "baseline")}
    for side, run in runs.items():
        try:
            cached_shapes(run.model, cell.form(side))
        except ValueError as error:
            raise InputError(f"--{error}") from None
    training = options.mode == "train"
    plans = {side: expected_plan(run, device, training) for side, run in runs.items()}
    _unequal(options, runs, plans)
    return runs


def _unequal(options: Options, runs: Runs, plans: Mapping[str, Plan]) -> dict[str, list[Any]]:
    training = options.mode == "train"
    found = {side: conditions(run, plans[side], training) for side, run in runs.items()}
    return require_equal(found, side_names(options), options.allow_unequal)


def measure_cell(options: Options, cell: Cell, runs: Runs, device: torch.device) -> Row:
    """A cell's results; where one process alone runs out of memory, a row that says so.

    With several ranks that is an InputError: others may wait for this one for ever.
    """
    row: Row = {"cell": asdict(cell), "runs": as_json(runs), "started_unix_seconds": time.time()}
    try:
        return row | {"status": "ok", "message": None} | _measured(options, cell, runs, device)
    except (RuntimeError, ProgramError) as error:
        message = _out_of_memory(error)
        if message is None:
            raise
    # Out here the error, and with it the frames that hold tensors, is gone.
    release(device)
    if distributed.world_size() > 1:
        failure = InputError(f"{cell.name() or 'the comparison'}: {message}")
        failure.any_rank = True
        raise failure
    return row | {"status": OUT_OF_MEMORY, "message": message}


def _out_of_memory(error: Exception) -> str | None:
    """The line that says so, of a GPU or of a CPU; None where it is another error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return text.partition("\n")[0]
    at = text.find(_CPU_REFUSED)
    return None if at < 0 else text[at:].partition("\n")[0]


def _measured(options: Options, cell: Cell, runs: Runs, device: torch.device) -> Row:
    """Both sides, measured."""
    names, world = side_names(options), distributed.world_size()
    below = min(run.model.vocab_size for run in runs.values())
    alone = {side: _alone(side, options, cell, below, device) for side in runs}
    resident = choose_resident(options, cell, runs, device)
    sides = {
        name: Side(
            names[name], partial(workload, options, run, device, below, cell.form(name)), device
        )
        for name, run in runs.items()
    }
    measure(sides, options, resident)
    plans = {name: side.plan for name, side in sides.items()}
    unequal = _unequal(options, runs, plans)
    peak = hardware.peak_flops(hardware.device_name(device))
    rows = {}
    for name, side in sides.items():
        run = runs[name]
        form = cell.form(name)
        flops = flops_per_token(run.model, options.mode, run.training.seq_len, options.steps, form)
        rows[name] = (
            side_row(side.name, side.rounds, side.tokens_per_step, flops, peak and peak * world)
            | _about(options, run, side)
            | cache_of(options, run, form, device)
            | (alone[name] or _allocated(options, side, device))
        )
    return {
        "resident": resident,
        "token_ids_below": below,
        "unequal": unequal,
        "model_differences": model_differences(runs),
        "sides": rows,
        "comparison": compare(rows["config"], rows["baseline"]),
    }


def _alone(
    side: str, options: Options, cell: Cell, below: int, device: torch.device
) -> dict[str, Any] | None:
    """On a CPU the memory of a process that has this side alone, the same on every rank."""
    if device.type == "cuda" or not options.memory:
        return None
    found = resident_memory_alone(side, options, cell, below) if distributed.rank() == 0 else None
    return dict(distributed.from_rank_0(found)) | {"memory_is": "RSS of a process of its own"}


def _allocated(options: Options, side: Side, device: torch.device) -> dict[str, Any]:
    """On a GPU the allocator's peak, of the rank that has the largest. Collective."""
    if side.peak_memory_bytes is None or not options.memory:
        return {"peak_memory_bytes": None, "memory_is": None}
    peaks = torch.zeros(distributed.world_size(), dtype=torch.int64, device=device)
    peaks[distributed.rank()] = side.peak_memory_bytes
    peak = int(distributed.sum_over_ranks(peaks).max())
    return {"peak_memory_bytes": peak, "memory_is": "allocated on the GPU for this side alone"}


def _about(options: Options, run: RunConfig, side: Side) -> dict[str, Any]:
    """What was measured, and that it computed something."""
    training = run.training
    has_loss = options.mode in ("train", "evaluate")
    return {
        "parameters": run.model.num_parameters(),
        "parameters_non_embedding": run.model.num_parameters(embeddings=False),
        "flops_per_token_forward": run.model.flops_per_token(training.seq_len),
        "loss_nats_per_token": side.last_loss if has_loss else None,
        "steps_before_loss": side.steps_done,
        "tokens_before_loss": side.steps_done * side.tokens_per_step,
        "plan": side.plan.lines,
        "micro_batch_size": training.micro_batch_size,
        "seq_len": training.seq_len,
        "precision": training.precision,
    }


def as_json(runs: Runs) -> dict[str, Any]:
    """What was measured, of the two YAML files and the options, but for the data."""
    blocks = ("model", "training", "deepspeed", "execution")
    return {side: {b: asdict(getattr(run, b)) for b in blocks} for side, run in runs.items()}


def finished(path: str | None, settings: dict[str, Any], wanted: Mapping[Cell, Runs]) -> list[Row]:
    """The cells that an interrupted sweep left in its file; none where there is no file.

    InputError where the file is not the result of the same settings.
    """
    if path is None or not Path(path).exists():
        return []
    try:
        found = json.loads(Path(path).read_text())
        before, cells = found["settings"], list(found["cells"])
    except (ValueError, TypeError, KeyError):
        raise InputError(f"--output {path}: exists, and is no result of this command") from None
    differing = [k for k in settings if before.get(k) != settings[k]]
    if differing:
        key = differing[0]
        raise InputError(
            f"--output {path}: has cells measured with {key} {before.get(key)!r}, and now it is "
            f"{settings[key]!r}; give another file"
        )
    for cell, runs in wanted.items():
        for row in cells:
            if row["cell"] == asdict(cell) and row["runs"] != as_json(runs):
                raise InputError(
                    f"--output {path}: the YAML files have changed since the cell {cell.name()} "
                    "was measured; give another file"
                )
    return cells
