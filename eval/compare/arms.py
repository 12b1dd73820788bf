"""Arms: runs that repeat one another with different seeds, and which of them count."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data.errors import InputError
from eval.compare.names import relative_names
from eval.compare.runs import Run, difference, settings

Arms = Mapping[str, Sequence[Run]]


class Subject(NamedTuple):
    """A run, the arm that it belongs to, and its name without a path of this machine."""

    arm: str
    name: str
    run: Run


def subjects(arms: Arms) -> list[Subject]:
    """Every run of every arm."""
    pairs = [(arm, run) for arm, runs in arms.items() for run in runs]
    names = relative_names([run.path for _, run in pairs])
    return [Subject(arm, name, run) for (arm, run), name in zip(pairs, names, strict=True)]


def counts(run: Run) -> bool:
    """Whether a run is in the means of its arm: only one that went to its end and has not diverged.

    The score of an unfinished one belongs to another number of tokens.
    """
    return run.completed and not run.diverged


def tokenizers_differ(arms: Arms) -> bool:
    """Whether runs are known to have different tokenizers, so that a token is not a token."""
    sums = {run.tokenizer_sha256 for runs in arms.values() for run in runs} - {None}
    return len(sums) > 1


def planned_tokens(run: Run) -> int:
    """Training tokens of the whole run: steps × sequences × their length."""
    training = run.config.training
    return training.max_steps * training.global_batch_size * training.seq_len


def check(arms: Arms, baseline: str | None, swept: Sequence[str]) -> None:
    """InputError where an arm is not one, where baseline or an arm with a sweep is not there, and
    where a run is given twice.
    """
    names = ", ".join(arms)
    if not arms:
        raise InputError("no run to compare: at least one run directory is expected")
    for option, given in (("--baseline", [baseline] if baseline else []), ("sweeps", swept)):
        for name in given:
            if name not in arms:
                raise InputError(f"{option}: there is no arm {name!r}; the arms are {names}")
    places: dict[str, str] = {}
    for name, runs in arms.items():
        if not runs:
            raise InputError(f"{name}: an arm without runs")
        for run in runs:
            where = str(run.path.resolve())
            if where in places:
                arms_of_it = dict.fromkeys((places[where], name))
                raise InputError(f"{run.path}: given twice, in {' and in '.join(arms_of_it)}")
            places[where] = name
        _check_arm(name, runs)


def _check_arm(name: str, runs: Sequence[Run]) -> None:
    """InputError where the runs are not repetitions of one with different seeds."""
    seeds: dict[int, Run] = {}
    for run in runs:
        found = difference(runs[0], run)
        if found is not None:
            raise InputError(
                f"{name}: {runs[0].path} and {run.path} are one arm, but {found}; runs of an arm "
                "differ in training.seed alone"
            )
        if run.seed in seeds:
            raise InputError(
                f"{name}: {seeds[run.seed].path} and {run.path} both have training.seed "
                f"{run.seed}; a seed counts once"
            )
        seeds[run.seed] = run


def default_baseline(arms: Arms) -> str:
    """The one vanilla arm, else the first."""
    vanilla = [name for name, runs in arms.items() if _is_vanilla(runs[0])]
    return vanilla[0] if len(vanilla) == 1 else next(iter(arms))


def _is_vanilla(run: Run) -> bool:
    return all(value is None for key, value in settings(run).items() if key.startswith("model.r."))
