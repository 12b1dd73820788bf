"""Begins each task's tuning from the deltas of the other tasks (Lv et al. 2023).

python -m eval.finetune.ensemble runs/tune/small/vanilla/lora --output runs/tune/ensemble.json

Start the same command again to go on: a run that is over is not run again. --list says what there
is to do.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from eval.finetune.config import TUNE_FOLDER
from eval.finetune.cost import cost_of, flops_a_token, lengths_of
from eval.finetune.ensemble.config import FRESH, TUNED, EnsembleConfig
from eval.finetune.ensemble.report import report, table
from eval.finetune.ensemble.sources import read_sources
from eval.finetune.ensemble.work import Work, do
from training import distributed, run_dir
from training.signals import StopSignal

# Forward passes of scoring, a token and source: loss, el2n, cosine, kl with its target, and grand
# with its backward pass.
SCORING_PASSES = 3 + 2 + 2


def planned(config: EnsembleConfig) -> list[Work]:
    """Every held-out task with every seed, a seed of everything before the next. InputError where
    a task has no finished run.
    """
    sources = read_sources(config.sources, config.source_seed)
    for task in config.tasks:
        if task not in sources:
            raise InputError(f"tasks: {task}; the sources have {', '.join(sources)}")
    return [
        Work(config, sources[task], {k: one for k, one in sources.items() if k != task}, seed)
        for seed in config.seeds
        for task in (config.tasks or sources)
    ]


def describe(config: EnsembleConfig, every: list[Work]) -> str:
    """Runs, FLOPs and predicted seconds by task, all seeds."""
    rows: dict[str, list[Any]] = {}
    for work in every:
        one = work.run(FRESH, TUNED)
        row = rows.setdefault(work.task, [work.task, 0, 0, 0.0])
        lengths = lengths_of(one, work.task)
        for arm, phase in work.planned():
            these = config.run(work.held_out.config, work.task, work.seed, arm, phase, None)
            row[3] += cost_of(these, work.task, lengths).flops
        scored = sum(lengths.train) * len(work.sources)
        row[3] += SCORING_PASSES * scored * flops_a_token(lengths)
        row[1] += len(work.planned())
        row[2] += work.left()
    body = [[*row, row[3] / config.flops_per_second + row[1] * config.seconds_a_run]
            for row in rows.values()]  # fmt: skip
    body.append(["all", *(sum(row[at] for row in body) for at in range(1, 5))])
    header = ["task", "runs", "left", "FLOPs", "predicted s (all)"]
    return tabulate(body, header, floatfmt=("", "", "", ".2e", ",.0f"))


def run(config: EnsembleConfig, every: list[Work]) -> bool:
    """All that is left, then the result; False after a signal."""
    device, stop = distributed.init_distributed(), StopSignal()
    if distributed.world_size() > 1:
        raise InputError(f"{distributed.world_size()} processes; allowed is one")
    for number, work in enumerate(every, start=1):
        print(f"[{number}/{len(every)}] {work.task} held out, seed {work.seed}", flush=True)
        if not do(work, device, stop):
            return False
    write(config, every, device)
    return True


def write(config: EnsembleConfig, every: list[Work], device: torch.device) -> None:
    """Prints the table, and writes it and the JSON."""
    tasks = report(config, every)
    text = table(tasks, config)
    found = {
        "config": dataclasses.asdict(config),
        "delta": every[0].held_out.config.delta,
        "backbone": every[0].held_out.result["backbone"],
        "environment": run_dir.environment(device),
        "tasks": tasks,
    }
    run_dir.write_json(Path(config.output), found)
    run_dir.write_text(Path(config.output).with_suffix(".md"), text)
    print(text, end="")


def parse(argv: list[str]) -> tuple[EnsembleConfig, bool]:
    """The configuration, and whether --list was given."""

    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")

    if argv and not argv[0].startswith("-"):
        argv = ["--sources", *argv]
    config, options = parse_options(
        EnsembleConfig,
        argv,
        prog="python -m eval.finetune.ensemble",
        description="Begins tasks from deltas of others: ... ensemble RUN_DIR [RUN_DIR] [options].",
        config_folder=TUNE_FOLDER,
        add_options=add_options,
    )
    require_folder_of(config.output)
    return config, bool(options.list)


def main() -> int:
    """The command."""
    config, only_list = parse(sys.argv[1:])
    every = planned(config)
    if only_list:
        print(describe(config, every))
        return 0
    return 0 if run(config, every) else distributed.STOPPED_EARLY


if __name__ == "__main__":
    run_cli(main, distributed.leave)
