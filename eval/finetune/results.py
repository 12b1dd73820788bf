"""What a run came to: result.json of a seed, and of a task over its seeds."""

import json
import statistics
from pathlib import Path
from typing import Any

from data.errors import InputError
from eval.finetune import state
from eval.finetune.config import TuneConfig
from eval.finetune.loop import count_seconds, score
from eval.finetune.setup import Job
from eval.finetune.sparsity import write_report
from training import distributed, hardware
from training.run_dir import write_json

RESULT = "result.json"
_READ = ("task", "method", "delta", "metric", "val", "test", "seed", "trained_parameters", "stages")


def finish(job: Job) -> dict[str, Any]:
    """Scores the best state on test, and writes result.json; every rank calls it."""
    count_seconds(job)
    seconds = job.progress.seconds
    state.load_best(job.engine, job.folder)
    best = job.progress.stages[-1]
    test = score(job, "test")
    found = {
        "task": job.task.name,
        "method": job.config.delta["method"],
        "delta": job.config.delta,
        "start": job.config.start,
        "backbone": job.engine.model.source.about | {"name": job.config.backbone},
        "seed": job.seed,
        "metric": job.task.metrics[0],
        "val": job.progress.best_scores,
        "test": test,
        "best_step": best["best_step"],
        "steps": job.progress.step,
        "epochs": job.progress.step * job.tuning.batch_size / len(job.rows["train"]),
        "examples": {split: len(rows) for split, rows in job.rows.items()},
        "trained_parameters": job.counts,
        "seconds_training": seconds,
        "cpu_seconds_training": job.progress.cpu_seconds,
        "tokens_trained": job.progress.tokens,
        "skipped_steps": job.engine.skipped_steps(),
        # On the CPU that of the whole process, which may have made other runs before.
        "peak_memory_bytes": hardware.peak_memory_bytes(job.engine.device),
        "device": hardware.device_name(job.engine.device),
        "precision": job.tuning.precision,
        "world_size": distributed.world_size(),
        "zero_stage": job.config.deepspeed.zero_stage,
        "stages": job.progress.stages,
        "validations": job.progress.validations,
        "identity": job.identity,
    }
    if distributed.rank() == 0:
        if job.config.delta["method"] == "sora":
            pruned = write_report(job.folder, job.engine.model.backbone, job.first_ranks)
            total = pruned["delta_parameters"] + job.counts["head"]
            found["after_pruning"] = pruned | {"total": total}
        write_json(job.folder / RESULT, found)
    say = ", ".join(f"{name} {value:.4f}" for name, value in test.items())
    job.metrics.say(f"test {say}; {seconds:.1f} s of training; {job.folder / RESULT}")
    return found


def read_result(path: Path) -> dict[str, Any]:
    """A result.json. InputError where it is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in (*_READ, "seconds_training", "cpu_seconds_training"):
            found[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the result of a run ({error})") from None
    return found


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of each metric over runs of one task and method."""
    first = results[0]
    found: dict[str, Any] = {key: first[key] for key in ("task", "method", "metric", "delta")}
    found |= {"seeds": [one["seed"] for one in results]}
    found |= {"trained_parameters": first["trained_parameters"]}
    for split in ("val", "test"):
        names = first[split]
        found[split] = {name: mean_sd([one[split][name] for one in results]) for name in names}
    for key in ("seconds_training", "cpu_seconds_training"):
        found[key] = mean_sd([one[key] for one in results])
    if all("after_pruning" in one for one in results):
        found["parameters_after_pruning"] = mean_sd(
            [one["after_pruning"]["total"] for one in results]
        )
    if len(first["stages"]) > 1:
        found["stages"] = [
            _stage([one["stages"][i] for one in results]) for i in range(len(first["stages"]))
        ]
    return found


def _stage(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A stage over the seeds. memorisation_percent and the like are of each seed's first stage."""
    values = {key: [row[key] for row in rows] for key in rows[0] if key != "stage"}
    return {key: mean_sd(every) for key, every in values.items() if None not in every}


def mean_sd(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation where there are two values or more, and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "by_seed": values}


def write_task(config: TuneConfig, task: str) -> dict[str, Any]:
    """TASK/result.json, from those of its seeds."""
    folder = config.folder(task, 0).parent
    found = over_seeds([read_result(config.folder(task, s) / RESULT) for s in config.seeds])
    write_json(folder / RESULT, found)
    return found
