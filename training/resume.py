"""Where a run begins: new weights, its own newest whole checkpoint, or another run's."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.shards import sha256_file
from training import checkpoint
from training.config import RunConfig


@dataclass
class Start:
    """Where a run begins.

    Attributes:
        folder: The checkpoint; None: new weights.
        step: Steps done, those left out included.
        optimizer_steps: Steps that AdamW took.
        skipped_steps: Steps left out because a gradient was not finite.
        began_from: What tells the checkpoint of another run that this run began from.
        notes: What the log should say of it.
    """

    folder: Path | None = None
    step: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    began_from: str | None = None
    notes: list[str] = field(default_factory=list)


def choose(run: RunConfig, expected: dict[str, Any]) -> Start:
    """What training.resume means for this run directory. Rank 0 alone calls it, holding the lock.

    `expected` as for checkpoint.check. A damaged checkpoint of the run is put aside as
    step-NNNNNNNN.damaged and the one before it is taken. InputError where the choice cannot be
    followed, or where all checkpoints are damaged: a run never starts anew by itself.
    """
    choice, run_dir = run.training.resume, Path(run.training.run_dir)
    checkpoint.clean(run_dir)
    own = checkpoint.candidates(run_dir)
    if choice == "never":
        if own:
            raise _holds_a_run(choice, run_dir, own[0])
        return Start()
    if choice != "auto":
        source = checkpoint.resolve(Path(choice))
        if not own or any(source.samefile(folder) for folder in own):
            return _start(source, run, expected, [])
        mine = _newest_whole(own, run, expected)
        if mine.began_from != began_from(source):
            raise _holds_a_run(choice, run_dir, own[0])
        return mine
    return _newest_whole(own, run, expected) if own else Start()


def began_from(source: Path) -> str:
    """What tells a checkpoint from any other."""
    return sha256_file(source / "checkpoint.json")


def _newest_whole(own: list[Path], run: RunConfig, expected: dict[str, Any]) -> Start:
    notes: list[str] = []
    damaged = []
    for folder in own:
        try:
            start = _start(folder, run, expected, notes)
        except checkpoint.DamagedError as error:
            damaged.append(folder)
            notes.append(f"warning: {error}")
            continue
        for found in damaged:  # aside, so that it is neither counted nor taken again
            numbers = itertools.chain([""], itertools.count(2))
            names = (f"{found.name}.damaged{number}" for number in numbers)
            found.rename(next(p for p in map(found.with_name, names) if not p.exists()))
        return start
    raise InputError(
        f"{own[0].parent}: every checkpoint is damaged ({notes[0].removeprefix('warning: ')}); "
        "remove the folder to start anew, or use another training.run_dir"
    )


def _start(folder: Path, run: RunConfig, expected: dict[str, Any], notes: list[str]) -> Start:
    state, changed = checkpoint.check(folder, run.model, expected)
    ours = folder.parent.resolve() == (Path(run.training.run_dir) / "checkpoints").resolve()
    return Start(
        folder,
        state["step"],
        state["optimizer_steps"],
        state["skipped_steps"],
        state["began_from"] if ours else began_from(folder),
        [*notes, *(f"warning: {difference}: losses differ by rounding" for difference in changed)],
    )


def _holds_a_run(choice: str, run_dir: Path, newest: Path) -> InputError:
    return InputError(
        f"training.resume: {choice}, but {run_dir} holds a run (its newest checkpoint is "
        f"{newest.name}); use training.resume auto to go on from it, or another training.run_dir"
    )
