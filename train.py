"""Trains a model: deepspeed train.py --config lpa_370m.yaml

Read from top to bottom: parse, validate, build, resume, loop, final evaluation. It also runs under
torchrun, and as plain `python train.py` with one process. docs/training.md describes every part.
"""

import json
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from data.loader import WindowLoader
from data.shards import PreparedData
from eval.scoring import Score, score
from training import checkpoint, distributed, hardware, init_from, resume, run_dir
from training.batches import Batches
from training.clock import StepClock
from training.config import CONFIG_FOLDER, RunConfig
from training.dry_run import describe, dry_run
from training.garbage import GarbageCollection
from training.guard import Guard
from training.metrics import Metrics
from training.profile import Profiler, parse_steps
from training.report import run_values, step_values, summary_line
from training.saving import Saver, Written
from training.schedule import learning_rate
from training.signals import StopSignal
from training.teacher import find_teacher, load_teacher


@dataclass
class Job:
    """What this process works with."""

    run: RunConfig
    folder: Path
    data: PreparedData
    loader: WindowLoader
    device: torch.device
    engine: Any
    metrics: Metrics
    saver: Saver
    clock: StepClock
    start: resume.Start
    identity: dict[str, Any]
    step: int  # optimizer steps done
    saves: list[Written] = field(default_factory=list)


def parse() -> tuple[RunConfig, Namespace]:
    """The run's configuration and the options beside it."""

    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--dry-run", action="store_true", help="say what the run would cost, and stop"
        )
        parser.add_argument("--output", help="write what --dry-run says to this JSON file")
        parser.add_argument(
            "--profile", help="steps to trace, such as 20-22, into profile/ of the run directory"
        )
        parser.add_argument("--local_rank", type=int, default=-1, help="set by `deepspeed`")

    return parse_options(
        RunConfig,
        prog="train.py",
        description="Trains a model; --config takes a path or the name of a file in configs/.",
        config_folder=CONFIG_FOLDER,
        add_options=add_options,
    )


def open_data(run: RunConfig) -> tuple[PreparedData, WindowLoader]:
    """The prepared tokens, checked against the model."""
    verify = run.data.verify and distributed.local_rank() == 0
    data = PreparedData.open(run.data.path, verify=verify)
    if data.tokenizer.vocab_size > run.model.vocab_size:
        raise InputError(
            f"{run.data.path}: token ids up to {data.tokenizer.vocab_size - 1}, and "
            f"model.vocab_size is {run.model.vocab_size}; it must be at least "
            f"{data.tokenizer.vocab_size}"
        )
    if run.model.document_start_id not in (None, data.tokenizer.bos_id):
        raise InputError(
            f"model.document_start_id: {run.model.document_start_id}; documents in {run.data.path} "
            f"begin with token {data.tokenizer.bos_id}"
        )
    if run.training.validate_every:
        data.split("valid")
    return data, WindowLoader(data.split("train"), run.training.seq_len, run.training.seed)


def setup(run: RunConfig, data: PreparedData, loader: WindowLoader) -> Job:
    """Builds everything and resumes."""
    folder, first = Path(run.training.run_dir), distributed.rank() == 0
    teacher = find_teacher(run, data.tokenizer.sha256) if first else None
    same = resume.identity(run, data, teacher)
    start = resume.choose(run, same) if first else None
    device = distributed.init_distributed()
    start, same, teacher = distributed.from_rank_0((start, same, teacher))

    from training.engine import Engine  # after the checks: DeepSpeed takes seconds to import

    engine = Engine(run, device)
    if start.folder is not None:
        checkpoint.load(engine, start.folder, start.optimizer_steps)
        engine.skipped_before = start.skipped_steps
    elif start.weights is not None:
        init_from.load(engine, start.weights)
    if teacher is not None:
        engine.learn_from(load_teacher(run, teacher, device))
    log = run_dir.logger(folder if first else None)
    if first:
        run_dir.write_text(folder / "config.yaml", run.to_yaml())
        run_dir.write_json(folder / "environment.json", run_dir.environment(device))
    metrics = Metrics(folder if first else None, log, start.step, run.training.max_steps)
    micro = run.training.global_batch_size // engine.accumulation // engine.world_size
    metrics.say(
        f"{run.model.num_parameters():,} parameters, {hardware.device_name(device)}, "
        f"{run.training.precision}, ZeRO stage {run.deepspeed.zero_stage}; batch: "
        f"{engine.world_size} ranks × {micro} sequences × {engine.accumulation} accumulation "
        f"= {run.training.global_batch_size} sequences of {run.training.seq_len} tokens"
    )
    metrics.say(str(start))
    for line in start.notes + engine.plan.lines:
        metrics.say(line)
    for warning in run.warnings():
        metrics.say(f"warning: {warning}")
    training = run.training
    saver = Saver(
        engine,
        folder,
        data.tokenizer,
        keep=training.keep_checkpoints,
        keep_every=training.keep_every,
        in_background=training.async_checkpoint,
    )
    clock = StepClock(device, training.untimed_steps)
    return Job(
        run, folder, data, loader, device, engine, metrics, saver, clock, start, same, start.step
    )


def validate(job: Job, split: str, max_tokens: int | None) -> Score:
    """Loss of the current weights on a split, on all ranks together."""
    training = job.run.training
    micro = training.global_batch_size // job.engine.accumulation // job.engine.world_size
    return score(
        job.engine.token_losses,
        job.data.split(split),
        job.data.tokenizer.token_bytes(),
        seq_len=training.seq_len,
        micro_batch_size=training.eval_micro_batch_size or micro,
        max_tokens=max_tokens,
        device=job.device,
    )


def validation_values(job: Job) -> dict[str, float]:
    """The numbers of a validation, as they are reported."""
    result = validate(job, "valid", job.run.training.validation_tokens).to_dict()
    return {
        "validation_loss": result["loss_nats_per_token"],
        "validation_perplexity": result["perplexity"],
        "validation_bits_per_byte": result["bits_per_byte"],
    }


def save(job: Job, steps_done: int) -> None:
    """Writes a checkpoint of the state after `steps_done` optimizer steps, or begins to."""
    batch, length = job.run.training.global_batch_size, job.run.training.seq_len
    job.saver.save(
        {key: value for key, value in job.identity.items() if value is not None}
        | {
            "step": steps_done,
            "skipped_steps": job.engine.skipped_steps(),
            "position": steps_done * batch,
            "tokens": steps_done * batch * length,
        }
        | job.start.recorded()
    )
    say_saved(job)


def say_saved(job: Job) -> None:
    """Reports a checkpoint that was written since the last call."""
    written = job.saver.take_written()
    if written is None:
        return
    job.saves.append(written)
    run_dir.write_status(job.folder, "running", job.step)
    job.metrics.say(
        f"saved {written.folder}: {written.bytes / 1e6:,.1f} MB in {written.seconds:.1f} s, for "
        f"{written.blocked_seconds:.1f} s of which training waited"
    )


def train(job: Job, stop: StopSignal, profiler: Profiler) -> None:
    """Steps from job.step to max_steps, or to a signal."""
    training, engine, clock = job.run.training, job.engine, job.clock
    batches = Batches(job.run, job.loader, job.device, engine.accumulation, job.step)
    guard = Guard(training.max_skipped_steps, training.global_batch_size, engine.accumulation)
    garbage = GarbageCollection(training.gc_every)
    clock.restart()
    for step in range(job.step, training.max_steps):
        if job.run.model.dropout:
            # Dropout is a pure function of step and rank too, so there is no RNG state to save.
            mixed = (training.seed * 1_000_003 + step) * 65_537 + distributed.rank()
            torch.manual_seed(mixed % 2**63)
        if profiler.before(step + 1):
            clock.leave_out()
        losses, norm = engine.train_step(step, lambda: batches.next(clock), clock)
        clock.step()
        guard.remember(losses)
        job.step = done = step + 1
        job.metrics.advance(done)
        garbage.step(done)
        last = done == training.max_steps
        signalled, (save_failed, skipped) = stop.over_ranks(
            job.saver.failed(), engine.skipped_in_a_row()
        )
        stopping = signalled and not last
        if stopping:  # at once: a validation may take longer than a launcher waits
            with clock.paused():
                save(job, done)
        due = training.validate_every and (done % training.validate_every == 0 or last)
        if done % training.log_every == 0 or due or last or done == 1:
            values = step_values(job.run, engine, clock, done, losses, norm)
            if due:
                with clock.paused():
                    values |= validation_values(job)
            job.metrics.record(values)
        elif clock.just_warm:
            clock.window()
        if profiler.ends(done, last or stopping):
            with clock.paused():
                job.metrics.say(f"profile: {profiler.write()}")
        if save_failed:
            job.saver.finish()  # raises on every rank
        if training.max_skipped_steps is not None and skipped >= training.max_skipped_steps:
            rate = learning_rate(training, step)
            raise guard.stop(done, skipped, rate, job.loader, job.folder)
        every = training.checkpoint_every
        if not stopping and (last or (every and done % every == 0)):
            with clock.paused():
                save(job, done)
        say_saved(job)
        if stopping:
            break
    batches.close()
    garbage.close()
    job.saver.finish()
    say_saved(job)
    finish_timing(job)


def finish_timing(job: Job) -> None:
    """Writes throughput.json and its line in the log."""
    values = run_values(job.run, job.engine, job.clock, job.saves)
    if values is not None and distributed.rank() == 0:
        run_dir.write_json(job.folder / "throughput.json", values)
        job.metrics.say(summary_line(values))


def evaluate_final(job: Job) -> None:
    """Scores the final split and writes final.json."""
    split = job.run.data.final_split
    if split is None:
        return
    if split not in job.data.manifest["splits"]:
        job.metrics.say(f"warning: {job.data.path} has no split {split} for data.final_split")
        return
    result = {"split": split} | validate(job, split, None).to_dict()
    job.metrics.say(
        f"{split}: loss {result['loss_nats_per_token']:.4f} nats/token, perplexity "
        f"{result['perplexity']:.3f}, {result['bits_per_byte']:.4f} bits/byte "
        f"({result['tokens']:,} tokens)"
    )
    if distributed.rank() == 0:
        run_dir.write_json(job.folder / "final.json", result)


def main() -> int:
    """The main job."""
    run, options = parse()
    if options.dry_run:
        require_folder_of(options.output)
        result = dry_run(run)
        if distributed.rank() == 0:
            print(describe(run, result))
            if options.output:
                Path(options.output).write_text(json.dumps(result, indent=2) + "\n")
        return 0
    distributed.join_environment()
    run.training.accumulation(distributed.world_size())  # refuses a batch that does not divide
    profiled = parse_steps(options.profile, run.training.max_steps) if options.profile else None
    data, loader = open_data(run)
    folder = Path(run.training.run_dir)
    with run_dir.lock(folder) if distributed.rank() == 0 else nullcontext():
        code = run_job(setup(run, data, loader), profiled)
        distributed.leave(code)
    return code


def run_job(job: Job, profiled: tuple[int, int] | None) -> int:
    """Trains to the end or to a signal; the exit code."""
    stop = StopSignal()
    profiler = Profiler(profiled, job.folder, distributed.rank(), job.device)
    status = partial(run_dir.write_status, job.folder) if distributed.rank() == 0 else _ignore
    status("running", job.step)
    try:
        if job.step == 0 and job.run.training.validate_every:
            values = validation_values(job)
            job.metrics.scalars(0, values)
            job.metrics.say(f"before training: {values['validation_bits_per_byte']:.4f} bits/byte")
        train(job, stop, profiler)
        completed = job.step >= job.run.training.max_steps
        if completed:
            evaluate_final(job)
    except BaseException as error:
        if isinstance(error, Exception):  # a second Ctrl-C waits for nothing
            job.saver.wait()
        with suppress(OSError):  # a full disk must not hide the error itself
            status("failed", job.step, str(error) or type(error).__name__)
            job.metrics.close()
        raise
    status("completed" if completed else "preempted", job.step)
    job.metrics.say(
        f"done: {job.folder} (metrics.jsonl, tensorboard/, checkpoints/)"
        if completed
        else f"stopped by a signal after step {job.step}; start the same command again to go on"
    )
    job.metrics.close()
    distributed.barrier()
    return 0 if completed else distributed.STOPPED_EARLY


def _ignore(*_: Any) -> None:
    """What ranks other than the first do where only the first writes."""


if __name__ == "__main__":
    run_cli(main, distributed.leave)
