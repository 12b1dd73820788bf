"""Losses against tokens, FLOPs and seconds: over the seeds of an arm, in few points."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.errors import InputError
from eval.compare.runs import Run

POINTS = 40  # of a smoothed training loss
AXES = ("tokens", "training_flops", "training_seconds")
Curve = dict[str, list[float | None]]


def shown(runs: Sequence[Run]) -> list[Run]:
    """The runs that a curve is drawn of: those that count, else those that go on, else all."""
    alive = [run for run in runs if not run.diverged]
    return [run for run in alive if run.completed] or alive or list(runs)


def curves(name: str, runs: Sequence[Run], bits: bool) -> dict[str, Curve | None]:
    """The training and the validation curve of an arm; None where there is none.

    x is a list for each of AXES, y the mean, least and largest over the runs, with `bits` in bits
    per byte, of which there is no training loss. InputError where the runs have no step in common.
    """
    if not set.intersection(*(set(run.steps) for run in runs)):
        raise InputError(
            f"{name}: its runs have no logged step in common ({_ranges(runs)}), so there is no "
            "mean over them"
        )
    unit = "bits_per_byte" if bits else "loss_nats_per_token"
    losses = [dict(zip(run.steps, run.losses, strict=True)) for run in runs]
    training = None if bits else _curve(runs, losses, unit, smooth=True)
    field = "bits_per_byte" if bits else "loss"
    points = [{p.step: getattr(p, field) for p in run.validation_points} for run in runs]
    return {"training": training, "validation": _curve(runs, points, unit, smooth=False)}


def _ranges(runs: Sequence[Run]) -> str:
    return ", ".join(f"{run.path.name}: {run.steps[0]} to {run.steps[-1]}" for run in runs)


def _curve(
    runs: Sequence[Run], values: Sequence[Mapping[int, float | None]], unit: str, smooth: bool
) -> Curve | None:
    """values: for each run its y by step."""
    steps = sorted(set.intersection(*(set(found) for found in values)))
    if not steps:
        return None
    y = np.array([[found[step] for step in steps] for found in values], dtype=np.float64)
    x = {axis: _at(runs, axis, steps) for axis in AXES}  # None is nan in y
    if smooth:
        groups = np.array_split(np.arange(len(steps)), min(POINTS, len(steps)))
        y = np.stack([_mean(y[:, group], axis=1) for group in groups], axis=1)
        x = {axis: np.array([at[group].mean() for group in groups]) for axis, at in x.items()}
    found = {axis: _plain(at) for axis, at in x.items()}
    found[f"{unit}_mean"] = _plain(y.mean(axis=0))  # nan where one run is
    return found | {f"{unit}_min": _plain(y.min(axis=0)), f"{unit}_max": _plain(y.max(axis=0))}


def _at(runs: Sequence[Run], axis: str, steps: Sequence[int]) -> np.ndarray:
    """x at the steps (points,), the mean over the runs: seconds are not the same in each."""
    found = [dict(zip(run.steps, getattr(run, axis), strict=True)) for run in runs]
    return np.array([[one[step] for step in steps] for one in found]).mean(axis=0)


def _mean(values: np.ndarray, axis: int) -> Any:
    """The mean without what is not finite, such as a step that was left out; nan where all is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a mean of nothing
        return np.nanmean(values, axis=axis)


def _plain(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def check_common_tokens(arms: Mapping[str, Sequence[Run]]) -> None:
    """InputError where no number of tokens lies within what every arm logged."""
    first = {arm: max(run.tokens[0] for run in runs) for arm, runs in arms.items()}
    last = {arm: min(run.tokens[-1] for run in runs) for arm, runs in arms.items()}
    late, early = max(first, key=lambda arm: first[arm]), min(last, key=lambda arm: last[arm])
    if first[late] > last[early]:
        raise InputError(
            f"{late} logged nothing before {first[late]:,} tokens and {early} nothing after "
            f"{last[early]:,}: they have no number of tokens in common to compare at"
        )
