"""One case: all providers of an operation at one size and number of rows, in one process."""

import gc
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from kernels.bench.gate import Gate, Path, WrongError, recorded_paths
from kernels.bench.inputs import GraphedRun, InputSet, Run, random_set, set_count
from kernels.bench.operations import PROVIDERS, Operation, Problem
from kernels.bench.timing import Clock, CPUClock, CUDAClock, Sample, Timed, time_interleaved


@dataclass(frozen=True)
class Settings:
    """How to measure; repeats None: as many as fit into `seconds`."""

    device: torch.device
    dtype: torch.dtype
    repeats: int | None
    seconds: float
    cuda_graphs: bool = False


@dataclass
class Measured:
    """What became of a provider: samples, or why there are none."""

    status: str = "ok"  # or wrong, out_of_memory, error
    message: str = ""
    samples: Sequence[Sample] = ()
    correctness: dict[str, Any] | None = None
    paths: Sequence[Path] = ()
    peak_memory_bytes: int | None = None

    def fail(self, error: Exception) -> None:
        message = " ".join(str(error).split())[:300]
        self.status, self.message = "error", f"{type(error).__name__}: {message}"
        if isinstance(error, WrongError):
            self.status, self.message = "wrong", message
        elif isinstance(error, torch.OutOfMemoryError):
            self.status, self.message = "out_of_memory", message


def measure_case(
    operation: Operation, problem: Problem, providers: Sequence[str], settings: Settings
) -> tuple[dict[str, Measured], int]:
    """The result of each provider, and the number of input sets. Nothing is raised: what fails is
    in the results.
    """
    measured = {name: Measured() for name in providers}
    sets = 0
    try:
        sets = _measure(operation, problem, measured, settings)
    except Exception as error:  # in what all share: the inputs, or the definition's results
        for result in measured.values():
            if result.status == "ok":
                result.fail(error)
    if any(PROVIDERS[name].compiled for name in providers):
        torch.compiler.reset()  # with dynamic=False every shape is compiled; only a few are kept
    _free(settings.device)
    return measured, sets


def _measure(
    operation: Operation, problem: Problem, measured: dict[str, Measured], settings: Settings
) -> int:
    given = _input_sets(operation, problem, settings)
    runs = _prepare(operation, given, measured, settings)
    if runs:
        clock: Clock = CUDAClock(settings.device) if settings.device.type == "cuda" else CPUClock()
        samples = time_interleaved(
            runs,
            clock,
            settings.repeats,
            settings.seconds,
            lambda name, error: measured[name].fail(error),
        )
        for name, found in samples.items():
            measured[name].samples = found
    return len(given)


def _input_sets(operation: Operation, problem: Problem, settings: Settings) -> list[InputSet]:
    generator = torch.Generator(settings.device).manual_seed(0)
    first = random_set(operation, problem, settings.dtype, generator)
    count = set_count(settings.device, first.nbytes)
    rest = (random_set(operation, problem, settings.dtype, generator) for _ in range(count - 1))
    return [first, *rest]


def _prepare(
    operation: Operation,
    given: Sequence[InputSet],
    measured: dict[str, Measured],
    settings: Settings,
) -> dict[str, list[Timed]]:
    """The runs of each provider that computes what it should; compilation happens here."""
    gate = Gate(operation, given[0])
    pool = torch.cuda.graph_pool_handle() if settings.cuda_graphs else None
    prepared: dict[str, list[Timed]] = {}
    for name, result in measured.items():
        provider = PROVIDERS[name]
        try:
            function = provider.function(operation)
            runs = [Run(function, provider.form, operation, each) for each in given]
            with recorded_paths() as result.paths:
                result.correctness = gate.check(runs[0])
            result.peak_memory_bytes = _peak_memory(runs[0], settings.device)
            graphed = settings.cuda_graphs
            prepared[name] = [GraphedRun(run, pool) if graphed else run for run in runs]
        except Exception as error:
            result.fail(error)
        runs = []
        _free(settings.device)
    return prepared


def _peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that forward and backward allocate at their peak, above what was there; CUDA only."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run.backward(run.forward())
    return torch.cuda.max_memory_allocated(device) - before


def _free(device: torch.device) -> None:
    if device.type != "cuda":
        return
    gc.collect()
    # An illegal access makes every later call raise; the results so far are still to be saved.
    with suppress(RuntimeError):
        torch.cuda.empty_cache()
