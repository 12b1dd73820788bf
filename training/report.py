"""The numbers of a logged step and of a whole run."""

import statistics
from typing import Any

import torch
from torch import Tensor

from training import distributed, hardware
from training.clock import PHASES, StepClock
from training.config import RunConfig
from training.engine import Engine
from training.saving import Written
from training.schedule import learning_rate


def step_values(
    run: RunConfig, engine: Engine, clock: StepClock, done: int, losses: Tensor, norm: Any
) -> dict[str, Any]:
    """What metrics.jsonl says after step `done`, about it and about the window since the last
    report. Every rank calls it; it waits for the device, as nothing else in a step does.

    losses: of this rank's micro-batches. Seconds are rank 0's, a step.
    """
    mean, memory = _over_ranks(losses.double().mean(), engine.device)
    tokens = run.training.global_batch_size * run.training.seq_len
    window = clock.window()
    average = clock.mean()
    seconds = (average or window)["seconds_per_step"]
    return {
        "step": done,
        "loss": mean,
        **_distilled(engine),
        "tokens": done * tokens,
        "lr": learning_rate(run.training, done - 1),
        "grad_norm": float(norm),
        **_speed(run, engine.device, window),
        "mean_tokens_per_second": tokens / seconds if average else None,
        "skipped_steps": engine.skipped_steps(),
        "peak_memory_bytes": max(memory),
        "peak_memory_bytes_by_rank": memory,
        "eta_seconds": (run.training.max_steps - done) * seconds,
    }


def _distilled(engine: Engine) -> dict[str, float]:
    """The distance to a teacher, where there is one; collective."""
    if engine.distillation is None:
        return {}
    mean = engine.distillation.last_step().double() / distributed.world_size()
    return {"distillation_loss": distributed.sum_over_ranks(mean).item()}


def _over_ranks(loss: Tensor, device: torch.device) -> tuple[float, list[int]]:
    """The mean loss, and the most memory that each rank has used."""
    world = distributed.world_size()
    values = torch.zeros(world + 1, dtype=torch.float64, device=device)
    values[0] = loss / world
    values[1 + distributed.rank()] = hardware.peak_memory_bytes(device)
    mean, *memory = distributed.sum_over_ranks(values).tolist()
    return mean, [int(size) for size in memory]


def _speed(run: RunConfig, device: torch.device, seconds: dict[str, Any]) -> dict[str, Any]:
    """Speeds from the seconds of a step and of its phases (StepClock)."""
    tokens = run.training.global_batch_size * run.training.seq_len
    step = seconds["seconds_per_step"]
    peak = hardware.peak_flops(hardware.device_name(device))
    flops = 3 * run.model.flops_per_token(run.training.seq_len) * tokens / step
    return {
        "tokens_per_second": tokens / step,
        "seconds_per_step": step,
        **{f"{name}_seconds": seconds[f"{name}_seconds"] for name in PHASES},
        "mfu": flops / (peak * distributed.world_size()) if peak else None,
        "data_wait_share": seconds["data_seconds"] / step,
    }


def run_values(
    run: RunConfig, engine: Engine, clock: StepClock, saves: list[Written]
) -> dict[str, Any] | None:
    """throughput.json: means over the steps that count (StepClock), without validations; None where
    no step counts. Every rank calls it.
    """
    _, memory = _over_ranks(torch.zeros((), dtype=torch.float64), engine.device)
    mean = clock.mean()
    if mean is None:
        return None
    return {
        "steps": mean["steps"],
        "untimed_steps": run.training.untimed_steps,
        **_speed(run, engine.device, mean),
        "peak_memory_bytes_by_rank": memory,
        "checkpoints_saved": len(saves),
        "checkpoint_bytes": saves[-1].bytes if saves else None,
        "checkpoint_seconds_median": _median([save.seconds for save in saves]),
        "checkpoint_blocked_seconds_median": _median([save.blocked_seconds for save in saves]),
        "device": hardware.device_name(engine.device),
        "world_size": distributed.world_size(),
    }


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def summary_line(values: dict[str, Any]) -> str:
    """The line a person reads at the end."""
    shares = {name: values[f"{name}_seconds"] / values["seconds_per_step"] for name in PHASES}
    phases = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    mfu = f"{values['mfu']:.1%}" if values["mfu"] is not None else "n/a"
    return (
        f"mean of {values['steps']} steps, without the first {values['untimed_steps']}: "
        f"{values['tokens_per_second']:,.0f} tok/s | mfu {mfu} | {phases}"
    )
