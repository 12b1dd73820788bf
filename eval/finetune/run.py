"""One run from its beginning to its result, with lock and status; all of a configuration."""

from contextlib import nullcontext, suppress

import torch

from eval.finetune import state
from eval.finetune.config import TuneConfig
from eval.finetune.identity import identity_now
from eval.finetune.loop import train
from eval.finetune.results import RESULT, finish, read_result, write_task
from eval.finetune.setup import read_task, setup
from training import distributed, run_dir
from training.signals import StopSignal


def run_one(
    config: TuneConfig, task: str, seed: int, device: torch.device, stop: StopSignal
) -> bool:
    """Trains and scores one task with one seed, unless its result is there. False after a signal,
    which leaves a checkpoint.
    """
    folder, first = config.folder(task, seed), distributed.rank() == 0
    over = distributed.from_rank_0((folder / RESULT).exists())
    if over:
        _require_same(config, task, seed)
        return True
    with run_dir.lock(folder) if first else nullcontext():
        return _run(config, task, seed, device, stop)


def _require_same(config: TuneConfig, task: str, seed: int) -> None:
    """InputError where the result that is there is of another configuration, backbone or data."""
    path = config.folder(task, seed) / RESULT
    was = read_result(path)["identity"]
    state.require_same(path, was, identity_now(config, *read_task(config, task), seed))


def _run(config: TuneConfig, task: str, seed: int, device: torch.device, stop: StopSignal) -> bool:
    folder, first = config.folder(task, seed), distributed.rank() == 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    job = setup(config, task, seed, device)
    if first:
        run_dir.write_status(folder, "running", job.progress.step)
    try:
        completed = train(job, stop)
        if completed:
            finish(job)
    except BaseException as error:
        with suppress(OSError):  # a full disk must not hide the error itself
            if first:
                text = str(error) or type(error).__name__
                run_dir.write_status(folder, "failed", job.progress.step, text)
            job.metrics.close()
        raise
    if first:
        run_dir.write_status(folder, "completed" if completed else "preempted", job.progress.step)
    if not completed:
        step = job.progress.step
        job.metrics.say(f"stopped by a signal after step {step}; start the same command to go on")
    job.metrics.close()
    job.engine.deepspeed.destroy()
    return completed


def run_all(config: TuneConfig, device: torch.device, stop: StopSignal) -> bool:
    """Every task with every seed, in turn; False after a signal."""
    for task in config.tasks:
        for seed in config.seeds:
            if not run_one(config, task, seed, device, stop):
                return False
        if distributed.rank() == 0:
            found = write_task(config, task)
            test = found["test"][found["metric"]]
            deviation = f" ± {test['sd']:.4f}" if test["sd"] is not None else ""
            print(f"{task}: {found['metric']} {test['mean']:.4f}{deviation}", flush=True)
    return True
