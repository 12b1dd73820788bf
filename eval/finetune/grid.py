"""Backbones × methods × tasks × seeds, one run after another in one process.

python -m eval.finetune.grid configs/tune/small_study.yaml

Start the same command again to go on: what is done is left alone, and a run that was stopped by a
signal goes on from its checkpoint. --list says what there is to do.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from tabulate import tabulate

from data.command_line import parse_options
from data.errors import InputError, run_cli
from eval.finetune.config import TUNE_FOLDER, TuneConfig
from eval.finetune.cost import Cost, Lengths, cost_of, lengths_of
from eval.finetune.results import RESULT, write_task
from eval.finetune.run import run_one
from training import distributed
from training.signals import StopSignal


@dataclass
class GridConfig:
    """A comparison of methods.

    Attributes:
        run_dir: Where results go: BACKBONE/METHOD/TASK/seed-N/ in it.
        backbones: By name, what `backbone` of a run takes.
        methods: By name, a block with `delta`, and with what differs from `base` for this method
            (tuning, overrides, sparsity).
        base: What all runs have: tasks, data, seeds, texts, tuning and so on.
        flops_per_second: What this machine reaches, from which --list predicts seconds.
    """

    run_dir: str
    backbones: dict[str, Any]
    methods: dict[str, Any]
    base: dict[str, Any]
    flops_per_second: float = 1e10

    def __post_init__(self) -> None:
        for name in ("backbones", "methods"):
            if not getattr(self, name):
                raise ValueError(f"{name}: empty; at least one is needed")
        if self.flops_per_second <= 0:
            raise ValueError(f"flops_per_second: {self.flops_per_second}; it must be over 0")

    def arms(self) -> dict[tuple[str, str], TuneConfig]:
        """The configuration of each backbone and method. InputError where one is wrong."""
        return {
            (backbone, method): self._arm(backbone, method)
            for backbone in self.backbones
            for method in self.methods
        }

    def _arm(self, backbone: str, method: str) -> TuneConfig:
        block = self.methods[method]
        if not isinstance(block, dict):
            raise InputError(f"methods.{method}: {block!r}; a block with delta is expected")
        fields: dict[str, Any] = merged(self.base, block)
        fields |= {"backbone": self.backbones[backbone]}
        fields |= {"run_dir": str(Path(self.run_dir) / backbone / method)}
        options = [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in fields.items()
        ]
        try:
            return parse_options(TuneConfig, options, prog="grid", description="")[0]
        except InputError as error:
            raise InputError(f"methods.{method}: {error}") from None


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Blocks of `base` with what `changes` has in their place; a delta is replaced whole."""
    found = dict(base)
    for key, value in changes.items():
        inner = found.get(key)
        both = isinstance(value, dict) and isinstance(inner, dict) and key != "delta"
        found[key] = merged(found[key], value) if both else value
    return found


def planned(grid: GridConfig) -> Iterator[tuple[str, str, TuneConfig, str, int]]:
    """Backbone, method, configuration, task, seed; a seed of everything before the next seed."""
    arms = grid.arms()
    seeds = list(dict.fromkeys(seed for one in arms.values() for seed in one.seeds))
    tasks = list(dict.fromkeys(task for one in arms.values() for task in one.tasks))
    for seed in seeds:
        for task in tasks:
            for (backbone, method), config in arms.items():
                if seed in config.seeds and task in config.tasks:
                    yield backbone, method, config, task, seed


def describe(grid: GridConfig) -> str:
    """Runs, tokens, FLOPs and predicted seconds by method and task, all backbones and seeds."""
    costs: dict[tuple[str, str], list[Cost]] = {}
    read: dict[tuple[str, str], Lengths] = {}
    left = 0
    for backbone, method, config, task, seed in planned(grid):
        if (backbone, task) not in read:
            read[backbone, task] = lengths_of(config, task)
        cost = cost_of(config, task, read[backbone, task])
        costs.setdefault((task, method), []).append(cost)
        left += not (config.folder(task, seed) / RESULT).exists()
    rows: list[list[Any]] = []
    for (task, method), every in costs.items():
        flops = sum(one.flops for one in every)
        steps = ", ".join(map(str, sorted({one.steps for one in every})))
        tokens = sum(one.tokens for one in every)
        rows.append([task, method, len(every), steps, tokens, flops, flops / grid.flops_per_second])
    total: float = sum(row[5] for row in rows)
    rows.append(["all", "", sum(r[2] for r in rows), "", sum(r[4] for r in rows), total,
                 total / grid.flops_per_second])  # fmt: skip
    header = ["task", "method", "runs", "steps a run", "tokens trained", "FLOPs", "predicted s"]
    text = tabulate(rows, header, floatfmt=("", "", "", "", "", ".2e", ",.0f"), intfmt=",")
    return f"{text}\n{left} of {rows[-1][2]} runs are left"


def run_grid(grid: GridConfig) -> bool:
    """All runs that are left; False after a signal."""
    device, stop = distributed.init_distributed(), StopSignal()
    every = list(planned(grid))
    for number, (backbone, method, config, task, seed) in enumerate(every, start=1):
        if distributed.rank() == 0:
            print(f"[{number}/{len(every)}] {backbone} {method} {task} seed {seed}", flush=True)
        if not run_one(config, task, seed, device, stop):
            return False
        over = [(config.folder(task, one) / RESULT).exists() for one in config.seeds]
        if distributed.rank() == 0 and all(over):
            write_task(config, task)
    return True


def main() -> int:
    """The command."""

    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")
        parser.add_argument("--local_rank", type=int, default=-1, help="set by `deepspeed`")

    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    grid, options = parse_options(
        GridConfig,
        argv,
        prog="python -m eval.finetune.grid",
        description="Runs a comparison: python -m eval.finetune.grid GRID.yaml [options].",
        config_folder=TUNE_FOLDER,
        add_options=add_options,
    )
    if options.list:
        print(describe(grid))
        return 0
    return 0 if run_grid(grid) else distributed.STOPPED_EARLY


if __name__ == "__main__":
    run_cli(main, distributed.leave)
