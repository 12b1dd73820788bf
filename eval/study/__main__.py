"""Runs a study and writes its page.

    python -m eval.study configs/study/small.yaml

It takes up a study where it was left. Several workers, on one machine or as a Slurm array over a
shared file system, share the runs of a study; docs/comparison.md describes all of it.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
from jsonargparse import ArgumentParser
from tabulate import tabulate

from data.command_line import parse_options
from data.errors import InputError, run_cli
from eval.compare.page import write_page
from eval.study.config import StudyConfig, planned
from eval.study.progress import Arm, arm_state
from eval.study.work import Worker
from training import distributed
from training.config import CONFIG_FOLDER


def describe(study: StudyConfig) -> str:
    """A table of the arms: their sizes, and how far they are."""
    rows = []
    for name in study.arm_names:
        arm = arm_state(study, name)
        rate = study.sweep.learning_rates[0] if study.sweep.learning_rates else None
        run = planned(study, name, rate, study.seeds[0], trial=False)
        model, seq_len = run.config.model, run.config.training.seq_len
        rows.append(
            {
                "arm": name,
                "parameters": model.num_parameters(),
                "without embeddings": model.num_parameters(embeddings=False),
                "FLOPs/token": model.flops_per_token(seq_len),
                "trials": len(arm.trials),
                "best lr": arm.best.trial.learning_rate if arm.best else None,
                "final runs": f"{len(arm.final)} of {len(study.seeds)}",
                "FLOPs to go": sum(one.flops for one in arm.waiting),
            }
        )
    formats = ("", ",", ",", ",.0f", "", "g", "", ".2e")
    return tabulate(rows, headers="keys", floatfmt=formats, intfmt=",", missingval="-")


def page(study: StudyConfig, arms: list[Arm]) -> Path:
    """Writes the page of the runs that are over, in the study's folder."""
    final = {arm.name: arm.final for arm in arms if arm.final}
    if not final:
        raise InputError(f"{study.run_dir}: no final run is over yet, so there is no page")
    folder = Path(study.run_dir) / "page"
    with filelock.FileLock(Path(study.run_dir) / ".page.lock"):
        write_page(
            folder,
            final,
            baseline=study.arm_names[0] if study.arm_names[0] in final else None,
            title=study.title,
            sweeps={arm.name: arm.trials for arm in arms if arm.trials and arm.final} or None,
            notes=list(_notes(study, arms)),
        )
    return folder / "index.html"


def _notes(study: StudyConfig, arms: list[Arm]) -> Iterator[str]:
    """What a reader of the page must know of the study."""
    yield from study.notes
    sweep = study.sweep
    if sweep.learning_rates:
        example = planned(study, arms[0].name, sweep.learning_rates[0], sweep.seeds[0], trial=True)
        whole = planned(study, arms[0].name, sweep.learning_rates[0], study.seeds[0], trial=False)
        steps, all_steps = (one.config.training.max_steps for one in (example, whole))
        short = ": that of whole runs may be another" if steps < all_steps else ""
        yield (
            f"Learning rates were chosen by the validation loss of runs of {steps:,} of "
            f"{all_steps:,} steps, seed {', '.join(map(str, sweep.seeds))}{short}. The losses of "
            "the sweep are theirs."
        )
    for arm in arms:
        if arm.hopeless:
            yield f"{arm.name} has no result: every learning rate of its sweep diverged."
        elif len(arm.final) < len(study.seeds):
            yield f"{arm.name}: {len(arm.final)} of {len(study.seeds)} final runs are over."


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="say what there is to do, and stop")
    parser.add_argument("--page", action="store_true", help="write the page of what is over")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    """The command."""
    argv = sys.argv[1:]
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--config")
    study, options = parse_options(
        StudyConfig,
        argv,
        prog="python -m eval.study",
        description="Runs a study: python -m eval.study STUDY.yaml [options].",
        config_folder=CONFIG_FOLDER / "study",
        add_options=_add_options,
    )
    if options.list:
        print(describe(study))
        return 0
    if options.page:
        print(page(study, [arm_state(study, name) for name in study.arm_names]))
        return 0
    worker = Worker(study, _say)
    worker.listen()
    arms = worker.work()
    if arms is None:
        return distributed.STOPPED_EARLY
    print(describe(study))
    print(page(study, arms))
    return 0


if __name__ == "__main__":
    run_cli(main)
