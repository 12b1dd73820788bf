"""The fine-tuning loop: steps, validations, stages, checkpoints, the final scores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from eval.finetune import state
from eval.finetune.evaluate import evaluate
from eval.finetune.setup import Job
from eval.finetune.sparsity import prune_in_place, rank_rows
from eval.finetune.texts import Batch, TrainingOrder, collate
from training import distributed, hardware
from training.run_dir import write_json
from training.signals import StopSignal


def train(job: Job, stop: StopSignal) -> bool:
    """Trains to the end, or to a signal (False: a checkpoint is written)."""
    progress, order = job.progress, job.order()
    job.clock.restart()
    while progress.stage < len(job.strengths):
        schedule = job.schedule(progress.stage)
        job.engine.begin_stage(schedule, progress.stage_start)
        last_step = progress.stage_start + schedule.max_steps
        while progress.step < last_step and not stopped_early(job):
            _step(job, order)
            done_of_stage = progress.step - progress.stage_start
            if progress.step == last_step or done_of_stage % _eval_every(job) == 0:
                with paused(job):
                    _validate(job)
            signalled, (skipped,) = stop.over_ranks(job.engine.skipped_in_a_row())
            _guard(job, skipped)
            if signalled:
                with paused(job):
                    save(job)
                return False
            every = job.tuning.checkpoint_every
            if every and progress.step % every == 0:
                with paused(job):
                    save(job)
        with paused(job):
            _end_stage(job)
    return True


def stopped_early(job: Job) -> bool:
    """Whether so many validations in a row brought nothing better."""
    patience = job.tuning.patience
    return patience is not None and job.progress.without_better >= patience


def paused(job: Job) -> Any:
    """What runs inside is not counted as training."""
    return job.clock.paused()


def _eval_every(job: Job) -> int:
    """Steps between two validations; with none on the way, all steps of the stage."""
    if not job.tuning.evals_per_epoch:
        return job.engine.stage.max_steps
    steps = job.tuning.steps(len(job.splits.train), 1.0)
    return max(1, round(steps / job.tuning.evals_per_epoch))


def _step(job: Job, order: TrainingOrder) -> None:
    """One optimizer step and what follows it: the proximal step, pruning, a line of metrics."""
    engine, progress, step = job.engine, job.progress, job.progress.step
    rank = distributed.rank()
    # Dropout is a pure function of seed, step and rank: there is no RNG state to save.
    torch.manual_seed(((job.seed * 1_000_003 + step) * 65_537 + rank) % 2**63)
    losses, norm = engine.train_step(step, micro_batches(job, order, step), job.clock)
    job.clock.step()
    strength = job.strengths[progress.stage]
    if strength and engine.step_was_applied():
        compat = job.config.sparsity.reference_compat
        engine.proximal_step(strength if compat else engine.rate(step) * strength, compat)
    progress.step = done = step + 1
    every = job.config.sparsity.prune_every
    if every and done % every == 0:
        delta = engine.model.delta
        assert delta is not None
        prune_in_place(delta, engine.optimizer)
        progress.delta = delta.config.to_dict()
    if done % job.tuning.log_every == 0 or done == 1:
        _log(job, losses, norm)


def micro_batches(job: Job, order: TrainingOrder, step: int) -> Callable[[], Batch]:
    """This rank's micro-batches of a step, one a call: contiguous parts of its examples."""
    size, world, parts = job.tuning.batch_size, job.engine.world_size, job.engine.accumulation
    indices = order.indices(step * size, size)
    rows = [job.rows["train"][index] for index in indices]
    job.progress.tokens += sum(len(row.ids) for row in rows)
    answers = sum(row.answer for row in rows) / (world * parts)
    micro, calls = size // world // parts, iter(range(parts))

    def next_batch() -> Batch:
        with job.clock.phase("data"):
            first = (next(calls) * world + distributed.rank()) * micro
            batch = collate(rows[first : first + micro], job.engine.device)
            batch.target_tokens = answers
        return batch

    return next_batch


def _log(job: Job, losses: Tensor, norm: Any) -> None:
    """One line of metrics.jsonl; every rank calls it."""
    progress, engine = job.progress, job.engine
    loss = distributed.sum_over_ranks(losses.double().mean()) / engine.world_size
    window = job.clock.window()
    seconds = window["seconds_per_step"]
    mean = job.clock.mean()
    step = mean["seconds_per_step"] if mean else seconds
    last = progress.stage_start + engine.stage.max_steps
    values = {
        "step": progress.step,
        "stage": progress.stage,
        "epoch": progress.step * job.tuning.batch_size / len(job.rows["train"]),
        "loss": float(loss),
        "lr": engine.rate(progress.step - 1),
        "grad_norm": float(norm),
        "tokens_per_second": progress.tokens / max(progress.step * step, 1e-9),
        "seconds_per_step": seconds,
        "mfu": None,
        "data_wait_share": window["data_seconds"] / seconds,
        "skipped_steps": engine.skipped_steps(),
        "peak_memory_bytes": hardware.peak_memory_bytes(engine.device),
        "eta_seconds": (last - progress.step) * step,
    }
    job.metrics.record(values | ranks(job))


def ranks(job: Job) -> dict[str, Any]:
    """Open and first ranks of a SoRA, and parameters of what is open; nothing for other methods.
    Collective under ZeRO.
    """
    delta = job.engine.model.delta
    if delta is None or job.config.delta["method"] != "sora":
        return {}
    if job.engine.sharded:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(delta.parameters())):
            rows = rank_rows(delta, job.first_ranks)
    else:
        rows = rank_rows(delta, job.first_ranks)
    return {"ranks_kept": sum(row["kept"] for row in rows), "ranks": sum(r["of"] for r in rows)}


def _validate(job: Job) -> None:
    """Scores val; the best state goes to best/."""
    scores = score(job, "val")
    progress = job.progress
    better = progress.score(scores, job.task.metrics[0])
    if better:
        about = {"task": job.task.name, "step": progress.step, "val": scores}
        state.save_best(job.engine, job.folder, job.fingerprint, about)
    text = ", ".join(f"{name} {value:.4f}" for name, value in scores.items())
    job.metrics.scalars(progress.step, {f"val_{name}": value for name, value in scores.items()})
    job.metrics.say(f"step {progress.step}: val {text}{' (best)' if better else ''}")
    line = {"step": progress.step, "stage": progress.stage, **scores}
    progress.validations.append(line | ranks(job))


def score(job: Job, split: str, most: int | None = None) -> dict[str, float]:
    """The metrics of the current state on a split, or on its first `most` examples."""
    examples, rows = getattr(job.splits, split)[:most], job.rows[split][:most]
    size = job.tuning.eval_batch_size
    return evaluate(job.engine, job.task, job.encoder, examples, rows, size)


def _end_stage(job: Job) -> None:
    """Notes what a stage came to: memorisation and generalisation, in % of the first stage's."""
    progress, main = job.progress, job.task.metrics[0]
    row: dict[str, Any] = {
        "stage": progress.stage,
        "strength": job.strengths[progress.stage],
        "steps": progress.step - progress.stage_start,
        "best_val": progress.best,
        "best_step": progress.best_step,
    }
    if len(job.strengths) > 1:
        most = job.config.sparsity.memorisation_examples
        row |= {"val": score(job, "val")[main], "test": score(job, "test")[main]}
        row["train"] = score(job, "train", most)[main]
        first = progress.stages[0] if progress.stages else row
        for name, split in (("memorisation", "train"), ("generalisation", "val")):
            row[f"{name}_percent"] = 100 * row[split] / first[split] if first[split] else None
        job.metrics.say(f"stage {progress.stage} is over: {row}")
    row |= ranks(job)
    if progress.stage + 1 < len(job.strengths):
        progress.next_stage(row)
        save(job)
    else:
        progress.stages.append(row)
        progress.stage += 1


def save(job: Job) -> None:
    """Writes a checkpoint; every rank calls it."""
    count_seconds(job)
    job.progress.skipped = job.engine.skipped_steps()
    state.save(job.engine, job.folder, {**job.progress.to_dict(), "identity": job.identity})


def count_seconds(job: Job) -> None:
    """Adds the seconds of training since the last call to the progress."""
    if job.clock.steps:
        job.clock.window()
    mean = job.clock.mean()
    if mean is not None:
        job.progress.seconds += mean["steps"] * mean["seconds_per_step"]
        job.progress.cpu_seconds += job.clock.total_cpu_seconds
    job.clock.total_steps, job.clock.total_seconds, job.clock.total_cpu_seconds = 0, 0.0, 0.0


def _guard(job: Job, skipped: int) -> None:
    """InputError where too many steps in a row were not finite."""
    limit = job.tuning.max_skipped_steps
    if limit is None or skipped < limit:
        return
    step = job.progress.step
    rate = job.engine.rate(step - 1)
    if distributed.rank() == 0:
        size = job.tuning.batch_size
        examples = job.order().indices((step - 1) * size, size)
        found = {"step": step, "skipped_in_a_row": skipped, "learning_rate": rate}
        write_json(job.folder / "not_finite.json", found | {"last_examples": examples})
    raise InputError(
        f"{job.folder}: training stopped after step {step}: {skipped} steps in a row were left "
        f"out, their loss or gradient was not finite; learning rate {rate:.3g}; not_finite.json "
        "has the examples of the last step; lower tuning.learning_rate"
    )
