"""Ranks for a budget of parameters: those of least error, exactly."""

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate, product
from typing import NamedTuple

from torch import Tensor

from data.errors import InputError

Chosen = dict[str, int | None]


class Kind(NamedTuple):
    """All projections of one kind, over the layers.

    energy: Σ over the layers of σ_i², descending, (min(d_out, d_in),); layers: how many.
    """

    d_in: int
    d_out: int
    layers: int
    energy: Tensor

    @property
    def dense(self) -> int:
        """Parameters of the dense weights."""
        return self.layers * self.d_in * self.d_out

    @property
    def step(self) -> int:
        """Parameters of one more rank in every layer."""
        return self.layers * (self.d_in + self.d_out)

    @property
    def largest(self) -> int:
        """The largest rank that saves something; 0: none does."""
        return min(len(self.energy), (self.d_in * self.d_out - 1) // (self.d_in + self.d_out))


def choose_ranks(kinds: Mapping[str, Kind], share: float) -> Chosen:
    """The ranks (None: dense) whose squared error is least among those that keep at most `share` of
    the dense parameters. A kind has one rank in all layers. InputError where even rank 1 is more.

    The error of a kind at rank r is Σ_{i>r} energy_i. Where kinds cost the same a rank, taking the
    largest energies first is exact, since energies descend; kinds of other costs (grouped-query
    attention has two) are tried with every split of the budget, and every subset as dense.
    """
    budget = math.floor(share * sum(kind.dense for kind in kinds.values()) * (1 + 1e-12))
    best: tuple[float, Chosen] | None = None
    for dense in product((True, False), repeat=len(kinds)):
        left = dict(kind for kind, whole in zip(kinds.items(), dense, strict=True) if not whole)
        spent = sum(k.dense for k, whole in zip(kinds.values(), dense, strict=True) if whole)
        spent += sum(kind.step for kind in left.values())  # at least rank 1
        if spent > budget or any(kind.largest < 1 for kind in left.values()):
            continue
        ranks = _allocate(left, budget - spent)
        error = sum(float(kind.energy[ranks[name] :].sum()) for name, kind in left.items())
        if best is None or error < best[0]:
            best = error, {name: ranks.get(name) for name in kinds}
    if best is None:
        total = sum(kind.dense for kind in kinds.values())
        least = sum(min(kind.step, kind.dense) for kind in kinds.values())
        raise InputError(
            f"--parameter_budget: {share:g} of {total:,} parameters is less than what rank 1 "
            f"takes, {least:,}; allowed is at least {least / total:.4g}"
        )
    return best[1]


def _allocate(kinds: Mapping[str, Kind], budget: int) -> dict[str, int]:
    """Ranks of least error, at least 1, with at most `budget` parameters beyond rank 1."""
    groups: dict[int, dict[str, Kind]] = {}
    for name, kind in kinds.items():
        groups.setdefault(kind.step, {})[name] = kind
    gains = {cost: _ordered(group) for cost, group in groups.items()}
    sums = {c: [0.0, *accumulate(value for value, _ in found)] for c, found in gains.items()}
    best: tuple[float, dict[int, int]] = (-1.0, {})
    for counts in _splits(gains, budget):
        gain = sum(sums[cost][count] for cost, count in counts.items())
        if gain > best[0]:
            best = gain, counts
    ranks = dict.fromkeys(kinds, 1)
    for cost, count in best[1].items():
        for _, name in gains[cost][:count]:
            ranks[name] += 1
    return ranks


def _ordered(group: Mapping[str, Kind]) -> list[tuple[float, str]]:
    """What each further rank of kinds of one cost gains, and whose it is, the largest first."""
    gains = [
        (float(value), name)
        for name, kind in group.items()
        for value in kind.energy[1 : kind.largest]
    ]
    return sorted(gains, key=lambda one: -one[0])  # stable: ranks of a kind stay in order


def _splits(gains: Mapping[int, list[tuple[float, str]]], budget: int) -> Iterator[dict[int, int]]:
    """How many ranks each cost may get: every split where no more can be added to the last."""
    if not gains:
        yield {}
        return
    (cost, found), *others = gains.items()
    most = min(len(found), budget // cost)
    for count in range(most + 1) if others else [most]:
        for rest in _splits(dict(others), budget - count * cost):
            yield {cost: count, **rest}
