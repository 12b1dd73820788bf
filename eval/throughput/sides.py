"""Both models in turn: A B A B, both in memory or one at a time, and the memory of each."""

import gc
import json
import math
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from data.errors import InputError
from eval.throughput.inference import Decode, Evaluate, Prefill
from eval.throughput.options import Cell, Options
from eval.throughput.train import Train
from eval.throughput.workload import Round, Workload, wait
from model.cache import CacheForm, cached_numbers
from model.execution import Plan
from training import distributed, memory
from training.bench import processes
from training.config import RunConfig

ROOM = 0.85  # of the free memory, for what the formulas leave out


def workload(
    options: Options, run: RunConfig, device: torch.device, below: int, form: CacheForm
) -> Workload:
    """A side as the mode measures it."""
    if options.mode == "train":
        return Train(run, device, below)
    if options.mode == "evaluate":
        return Evaluate(run, device, below, options.sequences)
    if options.mode == "prefill":
        return Prefill(run, device, below, form)
    return Decode(run, device, below, options.new_tokens(), form)


class Side:
    """One model, in memory between open() and close().

    Attributes:
        rounds: Seconds of each round so far.
        plan: What its execution came to.
        tokens_per_step: Tokens of a step, over all ranks.
        peak_memory_bytes: On a GPU the most that the allocator held for it in the warm-up, beyond
            what was there before it was built.
        steps_done: Since it was last built.
        last_loss: After the last of them; see Workload.loss.
    """

    plan: Plan
    tokens_per_step: int

    def __init__(self, name: str, build: Callable[[], Workload], device: torch.device) -> None:
        self.name, self.build, self.device = name, build, device
        self.rounds: list[Round] = []
        self.peak_memory_bytes: int | None = None
        self.workload: Workload | None = None
        self.steps_done, self.last_loss = 0, math.nan

    def open(self, warm_up: int) -> Workload:
        """Builds it and makes its first steps. InputError where the loss is not finite."""
        cuda = self.device.type == "cuda"
        if cuda:
            # Workspaces of matrix products would count for the side that is built first.
            wait(self.device)
            torch._C._cuda_clearCublasWorkspaces()
            before = torch.cuda.memory_allocated(self.device)
        self.workload = self.build()
        self.plan, self.tokens_per_step = self.workload.plan, self.workload.tokens_per_step
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        self.workload.round(warm_up)
        self.steps_done = warm_up
        if cuda:
            peak = torch.cuda.max_memory_allocated(self.device) - before
            self.peak_memory_bytes = max(self.peak_memory_bytes or 0, peak)
        self._check("warm-up")
        return self.workload

    def turn(self, steps: int) -> None:
        """One timed round."""
        assert self.workload is not None
        self.rounds.append(self.workload.round(steps))
        self.steps_done += steps

    def _check(self, what: str) -> None:
        assert self.workload is not None
        self.last_loss = self.workload.loss()
        if not math.isfinite(self.last_loss):
            raise InputError(
                f"{self.name}: the loss or the logits after the {what} are not finite; there is no "
                "speed to compare"
            )

    def close(self) -> None:
        """Checks the last loss and frees the memory."""
        if self.workload is None:
            return
        try:
            self._check("last round")
        finally:
            self.free()

    def free(self) -> None:
        """Frees the memory."""
        if self.workload is not None:
            self.workload.close()
            self.workload = None
            release(self.device)


def release(device: torch.device) -> None:
    """Gives back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(sides: Mapping[str, Side], options: Options, resident: str) -> None:
    """All rounds, the sides in turn; what was measured is in the sides. They are freed in the end,
    with an error too. Python's own garbage collection should be off (training.garbage).
    """
    try:
        if resident == "both":
            for side in sides.values():
                side.open(options.warm_up)
        for _ in range(options.rounds):
            for side in sides.values():
                if resident == "one":
                    side.open(options.warm_up)
                gc.collect()  # not in the middle of a round
                side.turn(options.steps)
                if resident == "one":
                    side.close()
        for side in sides.values():
            side.close()
    finally:
        for side in sides.values():
            side.free()


def bytes_needed(
    options: Options, run: RunConfig, world_size: int, form: CacheForm
) -> tuple[int, int]:
    """Bytes that a side holds between its steps, and those that a step takes beside; formulas of
    training/memory.py, and for a forward pass weights, cache and logits.
    """
    model, training = run.model, run.training
    assert training.micro_batch_size is not None
    if options.mode == "train":
        parts = memory.bytes_per_rank(run, run.deepspeed.zero_stage, world_size)
        passing = parts["activations"] + parts["logits"]
        return sum(parts.values()) - passing, passing
    element = training.torch_dtype.itemsize
    tokens = training.micro_batch_size * training.seq_len
    cached = cached_numbers(model, form) * tokens * element
    kept = model.num_parameters() * element + (0 if options.mode == "evaluate" else cached)
    logits = 0 if options.mode != "evaluate" else tokens * model.vocab_size * (element + 4)
    return kept, logits


def cache_of(
    options: Options, run: RunConfig, form: CacheForm, device: torch.device
) -> dict[str, Any]:
    """The cache of a side, in the modes that have one: its form, its bytes for each token of a
    sequence, and the context for which the device has memory, computed: (all of its memory -
    weights) / (micro-batch · bytes a token).
    """
    if options.mode not in ("prefill", "decode"):
        return {}
    element = run.training.torch_dtype.itemsize
    a_token = cached_numbers(run.model, form) * element
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
    else:
        whole = psutil.virtual_memory().total
    left = max(0, whole - run.model.num_parameters() * element)
    assert run.training.micro_batch_size is not None
    return {
        "cache": form,
        "cache_bytes_per_token": a_token,
        "longest_context_tokens": left // (a_token * run.training.micro_batch_size),
    }


def choose_resident(
    options: Options, cell: Cell, runs: Mapping[str, RunConfig], device: torch.device
) -> str:
    """ "both" or "one": as asked for, or whether both fit into the memory that is free now, by
    formula. The same on every rank.
    """
    if options.resident != "auto":
        return options.resident
    world_size = distributed.world_size()
    needs = [bytes_needed(options, run, world_size, cell.form(side)) for side, run in runs.items()]
    need = sum(kept for kept, _ in needs) + max(passing for _, passing in needs)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available // world_size
    return str(distributed.from_rank_0("both" if need <= ROOM * free else "one"))


def resident_memory_alone(side: str, options: Options, cell: Cell, below: int) -> dict[str, Any]:
    """Peak resident memory of a CPU process that builds one side and makes its warm-up, and how
    much of it was there before; of several ranks the largest. ProgramError where it fails.

    The peak of this process would be that of whatever was the largest in it so far.
    """
    ranks, port = distributed.world_size(), processes.free_port()
    there = asdict(options.from_anywhere())  # it starts in the repository's root
    task = {"side": side, "options": there, "cell": asdict(cell), "below": below}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder) / f"{rank}.json") for rank in range(ranks)]
        module = ("-m", "eval.throughput.alone", json.dumps(task))
        # They are in sessions of their own: a SIGTERM to this process has to end them too.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            processes.run_all(
                [processes.python(*module, output) for output in outputs],
                [_rank_environment(rank, ranks, port) for rank in range(ranks)],
            )
        finally:
            signal.signal(signal.SIGTERM, before)
        found = [json.loads(Path(output).read_text()) for output in outputs]
    return dict(max(found, key=lambda one: one["peak_memory_bytes"]))


def _rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """Without torchrun's variables: with them a new group waits for a store that its agent has."""
    found = processes.rank_environment(rank, ranks, port)
    return {k: v for k, v in found.items() if not k.startswith("TORCHELASTIC_")}
