"""Where a run begins: new weights, its own newest whole checkpoint, or another run's."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.shards import PreparedData, sha256_file
from training import checkpoint, distributed, init_from
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
        weights: The checkpoint whose weights alone a run begins from, where folder is None.
        init_from: What checkpoint.json says of those weights, also in a run that goes on.
        notes: What the log should say of it.
    """

    folder: Path | None = None
    step: int = 0
    optimizer_steps: int = 0
    skipped_steps: int = 0
    began_from: str | None = None
    weights: Path | None = None
    init_from: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """The line of the log."""
        if self.folder is not None:
            return f"resumed from {self.folder}"
        if self.init_from is None:
            return "starting from new weights"
        return f"starting from the weights of {self.weights} (sha256 {self.init_from['sha256']})"

    def recorded(self) -> dict[str, Any]:
        """What a checkpoint of the run says of its beginning."""
        found = {"began_from": self.began_from}
        return found | ({"init_from": self.init_from} if self.init_from else {})


def identity(
    run: RunConfig, data: PreparedData, teacher: init_from.GivenWeights | None
) -> dict[str, Any]:
    """What must be the same when a run is resumed, but for checkpoint.MAY_CHANGE; a checkpoint
    leaves out what is None.
    """
    return {
        "world_size": distributed.world_size(),
        "zero_stage": run.deepspeed.zero_stage,
        "precision": run.training.precision,
        "global_batch_size": run.training.global_batch_size,
        "seq_len": run.training.seq_len,
        "seed": run.training.seed,
        "tokenizer_sha256": data.tokenizer.sha256,
        "data_sha256": data.split_sha256("train"),
        "teacher_sha256": teacher.sha256 if teacher is not None else None,
    }


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
        return _new(run, expected)
    if choice != "auto":
        source = checkpoint.resolve(Path(choice))
        if not own or any(source.samefile(folder) for folder in own):
            return _start(source, run, expected, [])
        mine = _newest_whole(own, run, expected)
        if mine.began_from != began_from(source):
            raise _holds_a_run(choice, run_dir, own[0])
        return mine
    return _newest_whole(own, run, expected) if own else _new(run, expected)


def _new(run: RunConfig, expected: dict[str, Any]) -> Start:
    """New weights, or those of training.init_from."""
    path = run.training.init_from
    if path is None:
        return Start()
    found = init_from.beginning(path, run.model, expected.get("tokenizer_sha256"))
    return Start(weights=found.folder, init_from=found.record())


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
    given = state.get("init_from")
    changes = [f"warning: {difference}: losses differ by rounding" for difference in changed]
    if ours:
        changes += init_from.same_beginning(given, run.training.init_from, folder)
    return Start(
        folder,
        state["step"],
        state["optimizer_steps"],
        state["skipped_steps"],
        state["began_from"] if ours else began_from(folder),
        init_from=given,
        notes=[*notes, *changes],
    )


def _holds_a_run(choice: str, run_dir: Path, newest: Path) -> InputError:
    return InputError(
        f"training.resume: {choice}, but {run_dir} holds a run (its newest checkpoint is "
        f"{newest.name}); use training.resume auto to go on from it, or another training.run_dir"
    )
