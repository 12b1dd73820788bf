"""StudyConfig: what a study's YAML says, and the runs that follow from it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.command_line import parse_options
from data.errors import InputError
from training.config import RunConfig

Blocks = dict[str, Any]  # blocks of a run's YAML, each a dictionary of keys


@dataclass
class SweepConfig:
    """The search for each arm's learning rate, by the loss on the valid split.

    Attributes:
        learning_rates: The grid, rising; null: no sweep, every arm has base.training.learning_rate
            or its own.
        seeds: A trial of each learning rate for each of them.
        max_steps: Steps of a trial; null: as in the final runs, which then are trials too where
            their seed is among these.
        warmup_steps: Warm-up of a trial; null: the share of max_steps that it is in the final runs.
            So it is with the decay of schedule wsd.
        extend: How many learning rates to add beyond either end of the grid, one by one, while the
            best lies there.
    """

    learning_rates: list[float] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    max_steps: int | None = None
    warmup_steps: int | None = None
    extend: int = 2

    def __post_init__(self) -> None:
        rates = self.learning_rates
        if rates is None:
            return
        if not rates or any(not 0 < rate < math.inf for rate in rates):
            raise ValueError(f"sweep.learning_rates: {rates}; each must be greater than 0")
        if any(a >= b for a, b in pairwise(rates)):
            raise ValueError(f"sweep.learning_rates: {rates}; they must rise")
        if self.extend and len(rates) < 2:
            raise ValueError("sweep.extend: a grid of one learning rate has no step; give 0")
        _require_seeds("sweep.seeds", self.seeds)
        if self.extend < 0:
            raise ValueError(f"sweep.extend: {self.extend}; it must be at least 0")


@dataclass
class StudyConfig:
    """A study: arms × learning rates × seeds.

    Attributes:
        title: Heading of the page.
        run_dir: Folder of all runs and of the page.
        base: Blocks of a run's YAML that all arms have.
        arms: For each arm, by name, the keys in which it differs from `base`.
        baseline: The arm that the others are compared with; null: the first.
        sweep: The search for each arm's learning rate.
        seeds: A final run of each arm for each of them.
        data: A prepared folder, in place of base.data.path.
        launcher: What starts train.py on several devices, such as "torchrun --nproc_per_node 8";
            null: one process.
        only: The arms to run and show; null: all.
        keep_trial_checkpoints: Keep the checkpoints of trials that are over.
        notes: Sentences for the page: what a reader must know that no file of a run says.
    """

    title: str
    run_dir: str
    base: dict[str, Any]
    arms: dict[str, dict[str, Any] | None]
    baseline: str | None = None
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    data: str | None = None
    launcher: str | None = None
    only: list[str] | None = None
    keep_trial_checkpoints: bool = False
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.arms:
            raise ValueError("arms: at least one is needed")
        if not self.run_dir:
            raise ValueError("run_dir: it is empty; a folder is needed")
        _require_seeds("seeds", self.seeds)
        for name in self.arms:
            if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
                raise ValueError(f"arms: {name!r}; a name is a folder's, without /")
        named = [("only", name) for name in self.only or []]
        named += [("baseline", self.baseline)] if self.baseline is not None else []
        for key, name in named:
            if name not in self.arms:
                raise ValueError(f"{key}: {name!r}; arms are {', '.join(self.arms)}")
        fixed = {"run_dir", "seed"}
        if self.sweep.learning_rates:
            fixed |= {"learning_rate", "min_learning_rate"}
        for where, blocks in {"base": self.base, **self.arms}.items():
            _require_blocks(where, blocks or {}, fixed)

    @property
    def arm_names(self) -> list[str]:
        """The arms to run, the baseline first."""
        first = self.baseline or next(iter(self.arms))
        names = [name for name in self.arms if self.only is None or name in self.only]
        return sorted(names, key=lambda name: name != first)  # stable: the rest stays in order


def _require_seeds(key: str, seeds: list[int]) -> None:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"{key}: {seeds}; they must be different, at least one, none under 0")


def _require_blocks(where: str, blocks: Blocks, fixed: set[str]) -> None:
    for block, keys in blocks.items():
        if not isinstance(keys, dict):
            raise ValueError(
                f"{where}.{block}: {keys!r}; it is a block of keys, as in a run's YAML"
            )
    set_here = fixed & set(blocks.get("training", {}))
    if set_here:
        name = sorted(set_here)[0]
        raise ValueError(f"{where}.training.{name}: the study sets it for each run")


def merged(*layers: Mapping[str, Any]) -> Blocks:
    """Blocks of keys, later layers over earlier ones."""
    result: Blocks = {}
    for layer in layers:
        for block, keys in layer.items():
            result[block] = {**result.get(block, {}), **keys}
    return result


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study.

    Attributes:
        name: Its folder, relative to the study's.
        arm: Its arm.
        learning_rate: Peak of its schedule.
        seed: Its seed.
        trial: It belongs to the sweep alone.
        config: What train.py is given.
    """

    name: str
    arm: str
    learning_rate: float
    seed: int
    trial: bool
    config: RunConfig

    @property
    def folder(self) -> Path:
        """Its run directory."""
        return Path(self.config.training.run_dir)

    @property
    def flops(self) -> float:
        """FLOPs of its training: three times those of the forward pass."""
        training = self.config.training
        tokens = training.max_steps * training.global_batch_size * training.seq_len
        return 3 * self.config.model.flops_per_token(training.seq_len) * tokens


def planned(
    study: StudyConfig, arm: str, learning_rate: float | None, seed: int, trial: bool
) -> PlannedRun:
    """A run of an arm. InputError, naming the key, where its configuration is not valid."""
    sweep = study.sweep
    layers = [study.base, study.arms[arm] or {}]
    if study.data is not None:
        layers.append({"data": {"path": study.data}})
    changed = _shortened(sweep, merged(*layers).get("training", {}))
    trial = trial and bool(changed)  # without a change a trial is a final run
    if trial:
        layers += [{"training": changed}, {"data": {"final_split": None}}]
    chosen: Blocks = {"seed": seed}
    if learning_rate is not None:
        chosen["learning_rate"] = learning_rate
    blocks = merged(*layers, {"training": chosen})
    rate = blocks["training"].get("learning_rate")
    name = f"{'trials' if trial else 'final'}/{arm}/lr-{rate}-seed-{seed}"
    blocks["training"]["run_dir"] = str(Path(study.run_dir) / name)
    try:
        config = _parsed(json.dumps(blocks))
    except InputError as error:
        raise InputError(f"arm {arm}: {error}") from None
    return PlannedRun(name, arm, config.training.learning_rate, seed, trial, config)


def _shortened(sweep: SweepConfig, training: Blocks) -> Blocks:
    """What a trial has of `training` in place of a final run's."""
    changed: Blocks = {}
    whole = training.get("max_steps")
    if sweep.max_steps is not None:
        changed["max_steps"] = sweep.max_steps
        for key in ("warmup_steps", "decay_steps") if isinstance(whole, int) else ():
            if isinstance(training.get(key), int):
                changed[key] = round(training[key] * sweep.max_steps / whole)
    if sweep.warmup_steps is not None:
        changed["warmup_steps"] = sweep.warmup_steps
    return changed


@cache
def _parsed(blocks: str) -> RunConfig:
    """Blocks, as JSON, checked as train.py checks its options."""
    options = [
        f"--{block}.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for block, keys in json.loads(blocks).items()
        for key, value in keys.items()
    ]
    return parse_options(RunConfig, options, prog="python -m eval.study", description="")[0]
