"""Names of runs and arms, from the folders in which runs are."""

import os
import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

# Not the minus of an exponent, as in lr4e-3.
_SEPARATOR = re.compile(r"[/_\s]+|(?<!\de)-+")


def relative_names(paths: Sequence[Path]) -> list[str]:
    """The paths from their common parent on, so that no name has a path of this machine."""
    if not paths:
        return []
    absolute = [path.resolve() for path in paths]
    parent = os.path.commonpath([path.parent for path in absolute])
    return [path.relative_to(parent).as_posix() for path in absolute]


def arm_names(arms: Sequence[Sequence[tuple[Path, int]]]) -> list[str]:
    """A name for each arm, no two alike, from the folders and seeds of its runs.

    A folder's part that says the seed is left out, then what the runs of an arm do not share, then
    what begins or ends the names of all arms.
    """
    relative = iter(relative_names([path for arm in arms for path, _ in arm]))
    names = [
        _shared([_without_seed(next(relative), seed) or _parent(path) for path, seed in arm])
        for arm in arms
    ]
    if len(names) > 1:
        names = _different_parts(names)
    used: set[str] = set()
    unique = []
    for name in names:
        number, candidate = 1, name
        while candidate in used:
            number += 1
            candidate = f"{name} ({number})"
        used.add(candidate)
        unique.append(candidate)
    return unique


def _without_seed(name: str, seed: int) -> str:
    """lpa-s1, lpa_seed1, lpa/1 and lpa-seed-1-long of seed 1 are lpa, lpa, lpa and lpa-long."""
    part = rf"(?:^|[-_./])(?:seed[-_=]?|s[-_=]?|(?<=[/])|^){seed}(?=$|[-_./])"
    return re.sub(part, "", name).strip("-_./")


def _parent(path: Path) -> str:
    """For runs that are named after their seed alone."""
    return path.resolve().parent.name or path.name


def _shared(names: Sequence[str]) -> str:
    """The beginning that all names share, without half a part; the first name if there is none."""
    if len(set(names)) == 1:
        return names[0]
    words = [_words(name) for name in names]
    return "-".join(_common(words)) or names[0]


def _different_parts(names: Sequence[str]) -> list[str]:
    words = [_words(name) for name in names]
    begin = len(_common(words))
    end = len(_common([part[begin:][::-1] for part in words]))
    cut = [part[begin : len(part) - end] for part in words]
    if not all(cut):  # one name is part of another: there is nothing that can go
        return list(names)
    return ["-".join(part) for part in cut]


def _common(lists: Sequence[Sequence[str]]) -> list[str]:
    """The words with which all lists begin."""
    places = zip(*lists, strict=False)  # as long as the shortest
    return [place[0] for place in takewhile(lambda words: len(set(words)) == 1, places)]


def _words(name: str) -> list[str]:
    return [word for word in _SEPARATOR.split(name) if word]
