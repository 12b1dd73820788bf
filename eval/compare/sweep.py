"""The best learning rate of a sweep, and whether the sweep went far enough to say so."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from data.errors import InputError


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        learning_rate: Its peak.
        loss: Its loss in nats/token; None where it diverged.
    """

    learning_rate: float
    loss: float | None


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of a sweep.

    Attributes:
        trial: The learning rate and its mean loss.
        interior: Whether the next rates on both sides are strictly worse, or diverged.
        reason: Why so, in words.
    """

    trial: Trial
    interior: bool
    reason: str


def mean_trials(trials: Sequence[Trial]) -> list[Trial]:
    """One trial a learning rate, rising: the mean over seeds; diverged where one of them did."""
    losses: dict[float, list[float | None]] = {}
    for trial in trials:
        losses.setdefault(trial.learning_rate, []).append(trial.loss)
    return [Trial(rate, _mean(found)) for rate, found in sorted(losses.items())]


def _mean(losses: list[float | None]) -> float | None:
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return math.fsum(finite) / len(finite) if len(finite) == len(losses) else None


def optimum(trials: Sequence[Trial]) -> Optimum:
    """The learning rate with the least mean loss; of equal ones the lowest.

    InputError where there is no trial, or none that did not diverge.
    """
    means = mean_trials(trials)
    left = [(trial.loss, i) for i, trial in enumerate(means) if trial.loss is not None]
    if not left:
        what = "every learning rate diverged" if means else "there is no trial"
        raise InputError(f"sweep of learning rates: {what}, so there is no best one")
    loss, best = min(left)
    found = [_side(means, best, step, loss) for step in (-1, 1)]
    return Optimum(
        means[best],
        interior=all(worse for worse, _ in found),
        reason="; ".join(text for _, text in found),
    )


def _side(means: list[Trial], best: int, step: int, loss: float) -> tuple[bool, str]:
    """Whether the neighbour on one side is worse, and what it is."""
    side, place = ("lower", best - 1) if step < 0 else ("higher", best + 1)
    if not 0 <= place < len(means):
        return False, f"no {side} learning rate was tried"
    neighbour = means[place]
    if neighbour.loss is None:
        return True, f"{neighbour.learning_rate:g} diverged"
    if neighbour.loss > loss:
        return True, f"{neighbour.learning_rate:g} is worse by {neighbour.loss - loss:.4f}"
    return False, f"{neighbour.learning_rate:g} has the same loss"
