"""Repeats in turn, their quantiles, ratios with intervals, and the check that comes before."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Step = Callable[[], float]

WARM_UP = 3  # rounds
RESAMPLES = 2000
CONFIDENCE = 0.95


class DifferentLossError(Exception):
    """Two sides of a comparison that do not compute the same loss: there is nothing to compare."""


def check_losses(case: str, losses: Mapping[str, Sequence[float]], tolerance: float) -> Row:
    """The largest relative difference of a side's losses from those of the first side.

    losses: for each side its losses, step by step, from equal weights on equal data. Losses after
    the first step depend on the gradients and the optimizer too. DifferentLossError where a
    difference is over the tolerance, or a loss is not finite.
    """
    first, *others = losses
    worst = 0.0
    for other in others:
        for step, (a, b) in enumerate(zip(losses[first], losses[other], strict=True)):
            difference = abs(a - b) / abs(a)
            if not difference <= tolerance:  # nan too
                raise DifferentLossError(
                    f"{case}, step {step}: the loss is {a:.8g} of {first} and {b:.8g} of {other}; "
                    f"allowed is a relative difference of {tolerance:g}"
                )
            worst = max(worst, difference)
    return {
        "losses_compared": len(losses[first]),
        "first_loss": losses[first][0],
        "largest_relative_difference": worst,
        "allowed_relative_difference": tolerance,
    }


def in_turn(sides: Mapping[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, in the order A B A B: what drifts meets all sides alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, step in sides.items():
            begun = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def compare_steps(
    case: str, sides: Mapping[str, Step], rounds: int, tolerance: float
) -> tuple[dict[str, list[float]], Row]:
    """Seconds of `rounds` repeats in turn, and the check of the losses of the warm-up before it.

    Each side is a function that makes one step and returns its loss.
    """
    losses: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(WARM_UP):
        for name, step in sides.items():
            losses[name].append(step())
    checked = check_losses(case, losses, tolerance)
    return in_turn(sides, rounds), checked


def measurement(case: str, side: str, seconds: Sequence[float], **rest: Any) -> Row:
    """A row of results: median, 10th and 90th percentile in seconds, linear between samples."""
    median, low, high = np.quantile(np.asarray(seconds, dtype=np.float64), [0.5, 0.1, 0.9])
    row = {"case": case, "side": side, "repeats": int(np.size(seconds))}
    row |= {"seconds_median": median, "seconds_p10": low, "seconds_p90": high}
    return {k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} | rest


def merge(parts: Sequence[Row]) -> Row:
    """The lists of several cases, one behind the other."""
    return {key: [row for part in parts for row in part[key]] for key in parts[0]}


def tokens_per_second(rows: Sequence[Row], tokens: int) -> list[Row]:
    """The rows with the tokens per second that their median makes."""
    return [row | {"tokens_per_second": tokens / row["seconds_median"]} for row in rows]


def ratio(
    case: str,
    quantity: str,
    numerator: Sequence[Any],
    denominator: Sequence[Any],
    goal: float | None = None,
    of: Callable[[float], float] = lambda r: r,
) -> Row:
    """The ratio of two medians with its percentile bootstrap interval (Efron and Tibshirani 1993,
    section 13.3), and whether it reaches the goal.

    numerator, denominator: seconds (rounds,) or (rounds, repeats). Whole rounds are drawn, with
    what both sides had in them, since noise lasts longer than a step. `of` maps the ratio to the
    quantity that is reported.
    """
    a, b = (np.asarray(v, dtype=np.float64).reshape(len(v), -1) for v in (numerator, denominator))
    if a.shape[0] != b.shape[0]:
        raise ValueError(f"{case}: {a.shape[0]} rounds of one side and {b.shape[0]} of the other")
    drawn = np.random.RandomState(0).randint(len(a), size=(RESAMPLES, len(a)))
    medians = (np.median(v[drawn].reshape(RESAMPLES, -1), axis=1) for v in (a, b))
    resampled = [of(r) for r in np.divide(*medians)]
    value = of(float(np.median(a) / np.median(b)))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return {
        "case": case,
        "quantity": quantity,
        "ratio": value,
        "low": float(low),
        "high": float(high),
        "confidence": CONFIDENCE,
        "rounds": len(a),
        "goal": goal,
        "reached": None if goal is None or not math.isfinite(value) else value >= goal,
    }
