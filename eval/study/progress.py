"""What of a study is done, and what is to be run next."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from data.command_line import parse_options
from data.errors import InputError
from eval.compare.runs import NO_EFFECT, Run, read_run
from eval.compare.sweep import Optimum, Trial, optimum
from eval.study.config import PlannedRun, StudyConfig, planned
from training.config import RunConfig


@dataclass
class Arm:
    """The state of an arm.

    Attributes:
        name: Its name.
        trials: Runs of the sweep that are over.
        best: The best learning rate, once all trials are over; None: they are not, or all diverged,
            or there is no sweep.
        final: Final runs that are over.
        waiting: Runs that can be started now.
    """

    name: str
    trials: list[Trial]
    best: Optimum | None
    final: list[Run]
    waiting: list[PlannedRun]

    @property
    def hopeless(self) -> bool:
        """Whether every learning rate of its sweep diverged, so that it has no final runs."""
        return bool(self.trials) and not (self.best or self.waiting)


# Runs that have ended, by folder, with what they were compared with: a worker looks often.
_ENDED: dict[Path, tuple[int, RunConfig, Run]] = {}


def over(run: PlannedRun) -> Run | None:
    """The run directory of a planned run that has ended: completed, or diverged. None too where its
    files cannot be read, since train.py is at work on them or was killed there. InputError where
    the folder holds a run with other settings.
    """
    status = run.folder / "status.json"
    try:
        stamp = status.stat().st_mtime_ns
        known = _ENDED.get(run.folder)
        if known is not None and known[:2] == (stamp, run.config):
            return known[2]
        had, _ = parse_options(
            RunConfig, ["--config", str(run.folder / "config.yaml")], prog="", description=""
        )
        state = json.loads(status.read_text(encoding="utf-8"))["state"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    _require_same(run, had)
    if state not in ("completed", "failed"):
        return None
    found = read_run(run.folder)
    if state == "failed" and not found.diverged:
        return None
    _ENDED[run.folder] = (stamp, run.config, found)
    return found


def _require_same(run: PlannedRun, had: RunConfig) -> None:
    wanted, found = dataclasses.asdict(run.config), dataclasses.asdict(had)
    for fields in (wanted, found):
        fields["data"]["path"] = str(Path(fields["data"]["path"]).resolve())
    for block, keys in wanted.items():
        for key, value in keys.items():
            if f"{block}.{key}" not in NO_EFFECT and found[block][key] != value:
                raise InputError(
                    f"{run.folder}: it was run with {block}.{key} {found[block][key]!r}, and the "
                    f"study says {value!r}; choose another run_dir, or remove the folder"
                )


def trial_of(run: Run) -> Trial:
    """Learning rate and validation loss of a run that is over."""
    return Trial(run.config.training.learning_rate, None if run.diverged else _loss(run))


def _loss(run: Run) -> float:
    loss = run.last_validation_loss
    if loss is None:
        raise InputError(
            f"{run.path}: no validation loss to choose a learning rate by; set "
            "base.training.validate_every"
        )
    return loss


def arm_state(study: StudyConfig, name: str) -> Arm:
    """What of an arm is done and what comes next."""
    grid = list(study.sweep.learning_rates or [])
    trials: list[Trial] = []
    waiting: list[PlannedRun] = []
    best: Optimum | None = None
    tried: set[float] = set()
    left = 2 * study.sweep.extend
    while grid:
        for rate in grid:
            for seed in study.sweep.seeds if rate not in tried else []:
                run = planned(study, name, rate, seed, trial=True)
                found = over(run)
                if found is None:
                    waiting.append(run)
                else:
                    trials.append(trial_of(found))
            tried.add(rate)
        if waiting:
            return Arm(name, trials, None, [], waiting)
        best = None if all(trial.loss is None for trial in trials) else optimum(trials)
        # Where every rate diverged a lower one may not.
        beyond = _beyond(grid, best.trial.learning_rate if best else grid[0], study)
        if (best is not None and best.interior) or beyond is None or not left:
            break
        left -= 1
        grid = sorted([*grid, beyond])
    if grid and best is None:
        return Arm(name, trials, None, [], [])
    final: list[Run] = []
    for seed in study.seeds:
        run = planned(study, name, best.trial.learning_rate if best else None, seed, trial=False)
        found = over(run)
        if found is None:
            waiting.append(run)
        else:
            final.append(found)
    return Arm(name, trials, best, final, waiting)


def _beyond(grid: list[float], best: float, study: StudyConfig) -> float | None:
    """The next learning rate beyond the end of the grid at which the best one lies; None where it
    lies at none, or that end has been extended as often as is allowed.
    """
    first = study.sweep.learning_rates or []
    if best == grid[-1] and sum(rate > first[-1] for rate in grid) < study.sweep.extend:
        return float(f"{grid[-1] * grid[-1] / grid[-2]:.4g}")
    if best == grid[0] and sum(rate < first[0] for rate in grid) < study.sweep.extend:
        return float(f"{grid[0] * grid[0] / grid[1]:.4g}")
    return None


def in_order(study: StudyConfig, arms: list[Arm]) -> list[PlannedRun]:
    """The runs that can be started, trials first, then seed by seed, so that what is there at any
    time can be compared.
    """
    runs = [run for arm in arms for run in arm.waiting]
    seeds = study.sweep.seeds + study.seeds
    return sorted(runs, key=lambda run: (not run.trial, seeds.index(run.seed)))
