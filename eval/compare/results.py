"""Every number of the page: what comparison.json holds and the template shows."""

import math
import statistics as medians
from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import InputError
from eval.compare import curves, fairness
from eval.compare.arms import (
    Arms,
    Subject,
    check,
    counts,
    default_baseline,
    planned_tokens,
    subjects,
    tokenizers_differ,
)
from eval.compare.runs import Run, settings
from eval.compare.statistics import CONFIDENCE, holm, paired, sample
from eval.compare.sweep import Trial, mean_trials, optimum

Sweeps = Mapping[str, Sequence[Trial]]
Values = dict[str, Any]
_VALUE_BYTES = {"fp32": 4, "bf16": 2}


def compare(
    arms: Arms, *, baseline: str | None, title: str, sweeps: Sweeps, notes: Sequence[str]
) -> Values:
    """The whole comparison, JSON with units in the key names. InputError where arms, baseline or
    sweeps do not fit together or nothing can be compared.
    """
    check(arms, baseline, list(sweeps))
    baseline = baseline or default_baseline(arms)
    measure = _measure(arms)
    bits = measure["unit"] == "bits_per_byte"
    if not bits:
        curves.check_common_tokens(arms)
    rows = {name: _arm(name, runs) | _scores(runs, measure) for name, runs in arms.items()}
    _add_differences(rows, arms, baseline, measure)
    found = fairness.find_warnings(arms, sweeps, measure["source"])
    return {
        "title": title,
        "baseline": baseline,
        "measure": measure,
        "confidence": CONFIDENCE,
        "warnings": [warning._asdict() for warning in found],
        "notes": list(notes),
        "arms": list(rows.values()),
        "setting_differences": _setting_differences(arms, baseline),
        "runs": [_run(subject, measure["source"]) for subject in subjects(arms)],
        "sweeps": {name: _sweep(trials) for name, trials in sweeps.items()},
        "curves": {
            name: curves.curves(name, curves.shown(runs), bits) for name, runs in arms.items()
        },
    }


def _measure(arms: Arms) -> Values:
    """Which score is compared: the same one for every run."""
    counted = [run for runs in arms.values() for run in runs if counts(run)]
    source = "final" if all(run.final is not None for run in counted) else "validation"
    unit = "nats_per_token"
    if tokenizers_differ(arms):
        unit = "bits_per_byte"
        if any(_bits(run, source) is None for run in counted):
            source = "validation"
        lacking = [run.path for run in counted if _bits(run, source) is None]
        if lacking:
            raise InputError(
                f"{lacking[0]}: its tokenizer differs from another's, and it has no bits per byte "
                "(final.json, metrics.jsonl), so its losses can be compared with nothing"
            )
    split = counted[0].final.get("split", "final") if counted and counted[0].final else "final"
    return {"source": source, "split": split if source == "final" else "valid", "unit": unit}


def _loss(run: Run, source: str) -> float | None:
    found = run.final["loss_nats_per_token"] if source == "final" and run.final else None
    return run.last_validation_loss if source == "validation" else found


def _bits(run: Run, source: str) -> float | None:
    if source == "final":
        return run.final.get("bits_per_byte") if run.final else None
    points = run.validation_points
    return points[-1].bits_per_byte if points else None


def _arm(name: str, runs: Sequence[Run]) -> Values:
    """What does not depend on the score. Speeds are of the runs that count, else of all."""
    model, training = runs[0].config.model, runs[0].config.training
    timed = [run for run in runs if counts(run)] or runs
    speeds = [run.throughput["tokens_per_second"] for run in timed if run.throughput is not None]
    memory = [record.get("peak_memory_bytes") for run in timed for record in run.metrics]
    full, latent = _cache_bytes(runs[0])
    return {
        "name": name,
        "runs": len(runs),
        "runs_counted": sum(counts(run) for run in runs),
        "seeds": sorted(run.seed for run in runs),
        "seeds_counted": sorted(run.seed for run in runs if counts(run)),
        "learning_rate": training.learning_rate,
        "parameters": model.num_parameters(),
        "parameters_non_embedding": model.num_parameters(embeddings=False),
        "flops_per_token_forward": runs[0].flops_per_token,
        "tokens": planned_tokens(runs[0]) if any(map(counts, runs)) else runs[0].tokens[-1],
        "training_seconds_median": medians.median(run.training_seconds[-1] for run in timed),
        "tokens_per_second_median": medians.median(speeds) if speeds else None,
        "peak_memory_bytes_max": max((size for size in memory if size), default=None),
        "kv_cache_bytes_per_token": full,
        "latent_cache_bytes_per_token": latent,
    }


def _cache_bytes(run: Run) -> tuple[int, int | None]:
    """Bytes a token of a cache of full keys and values, 2 · layers · num_kv_heads · head_dim · size
    of a value; and of one of latents where k or v is low-dimensional, r for the full width.
    """
    model = run.config.model
    assert model.num_kv_heads is not None
    assert model.head_dim is not None
    width = model.num_kv_heads * model.head_dim
    size = model.num_layers * _VALUE_BYTES[run.config.training.precision]
    k, v = model.ranks.k, model.ranks.v
    latent = None if k is None and v is None else size * ((k or width) + (v or width))
    return size * 2 * width, latent


def _scores(runs: Sequence[Run], measure: Values) -> Values:
    counted = [run for run in runs if counts(run)]
    source, comparable = measure["source"], measure["unit"] == "nats_per_token"
    losses = [found for run in counted if (found := _loss(run, source)) is not None]
    bits = [found for run in counted if (found := _bits(run, source)) is not None]
    loss = sample(losses if comparable else [])
    size = sample(bits if len(bits) == len(counted) else [])
    return {
        "loss_nats_per_token_mean": loss.mean if loss else None,
        "loss_nats_per_token_sd": loss.sd if loss else None,
        "perplexity": math.exp(loss.mean) if loss and loss.mean < 700 else None,
        "bits_per_byte_mean": size.mean if size else None,
        "bits_per_byte_sd": size.sd if size else None,
    }


def _by_seed(runs: Sequence[Run], measure: Values) -> dict[int, float]:
    score = _loss if measure["unit"] == "nats_per_token" else _bits
    found = {run.seed: score(run, measure["source"]) for run in runs if counts(run)}
    return {seed: value for seed, value in found.items() if value is not None}


def _add_differences(rows: dict[str, Values], arms: Arms, baseline: str, measure: Values) -> None:
    """To each arm but the baseline its difference to it, seed by seed."""
    unit = measure["unit"]
    against = _by_seed(arms[baseline], measure)
    tests = {n: paired(_by_seed(arms[n], measure), against) for n in arms if n != baseline}
    adjusted = holm({name: test.p for name, test in tests.items() if test.p is not None})
    for name, row in rows.items():
        test = tests.get(name)
        row |= {
            "difference_seeds": list(test.seeds) if test else [],
            f"difference_{unit}": test.difference if test else None,
            f"difference_low_{unit}": test.low if test else None,
            f"difference_high_{unit}": test.high if test else None,
            "difference_p": test.p if test else None,
            "difference_p_holm": adjusted.get(name) if len(tests) > 1 else None,
        }


def _setting_differences(arms: Arms, baseline: str) -> list[Values]:
    """Keys of the configuration that are not the same in all arms."""
    found = {name: settings(runs[0]) for name, runs in arms.items()}
    keys = dict.fromkeys(key for one in found.values() for key in one)
    rows = []
    for key in keys:
        values = {name: found[name].get(key) for name in arms}
        if differs := [name for name in arms if values[name] != values[baseline]]:
            rows.append({"key": key, "values": values, "differs": differs})
    return rows


def _run(subject: Subject, source: str) -> Values:
    run = subject.run
    return {
        "name": subject.name,
        "arm": subject.arm,
        "seed": run.seed,
        "state": run.status["state"],
        "diverged": run.diverged,
        "counted": counts(run),
        "steps": run.steps[-1],
        "max_steps": run.config.training.max_steps,
        "final_loss_nats_per_token": _finite(_loss(run, "final")),
        "validation_loss_nats_per_token": _finite(run.last_validation_loss),
        "bits_per_byte": _finite(_bits(run, source)),
        "training_seconds": run.training_seconds[-1],
        "git_commit": run.environment.get("git_commit"),
        "git_dirty": run.environment.get("git_dirty"),
        "device": run.environment.get("device"),
        "world_size": run.environment.get("world_size"),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _sweep(trials: Sequence[Trial]) -> Values:
    best = optimum(trials)
    return {
        "trials": [_trial(trial) for trial in trials],
        "means": [_trial(trial) for trial in mean_trials(trials)],
        "best": _trial(best.trial),
        "interior": best.interior,
        "reason": best.reason,
    }


def _trial(trial: Trial) -> Values:
    return {"learning_rate": trial.learning_rate, "loss_nats_per_token": _finite(trial.loss)}
