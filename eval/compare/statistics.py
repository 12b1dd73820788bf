"""Means over seeds, differences between arms seed by seed, and what several comparisons cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sample:
    """n values: their mean, and their standard deviation with n - 1 (None where n is 1)."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Paired:
    """Differences between two arms over the seeds that both have.

    Attributes:
        seeds: The common seeds, rising.
        difference: Mean of the differences, arm - baseline; None without a common seed.
        low: Lower end of the interval of Student's t; None with fewer than two common seeds, and
            where all differences are equal, which leaves no spread to judge by.
        high: Its upper end.
        p: Two-sided p of the paired t-test; None where low is.
    """

    seeds: tuple[int, ...]
    difference: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def sample(values: Sequence[float]) -> Sample | None:
    """Mean and standard deviation; None without values."""
    if not values:
        return None
    n, mean = len(values), math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return Sample(n, mean, math.sqrt(squares / (n - 1)) if n > 1 else None)


def paired(arm: Mapping[int, float], baseline: Mapping[int, float]) -> Paired:
    """The paired t-test (Student 1908) over the seeds of both, each a loss by seed."""
    seeds = tuple(sorted(set(arm) & set(baseline)))
    differences = [arm[seed] - baseline[seed] for seed in seeds]
    found = sample(differences)
    if found is None:
        return Paired(seeds, None)
    if len(set(differences)) == 1:  # one seed too
        return Paired(seeds, found.mean)
    test = stats.ttest_rel([arm[s] for s in seeds], [baseline[s] for s in seeds])
    low, high = test.confidence_interval(CONFIDENCE)
    return Paired(seeds, found.mean, float(low), float(high), float(test.pvalue))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p adjusted for the number of comparisons by Holm's step-down (Holm 1979): the chance of one
    false finding or more among all of them stays under the level, whatever their dependence.
    """
    adjusted, largest = {}, 0.0
    for place, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p))
        adjusted[name] = largest
    return adjusted
