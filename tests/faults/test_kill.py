"""SIGKILL to a rank: inside a step, and while rank 0 writes a checkpoint."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import EVERY
from tests.faults.job import Job
from tests.faults.record import Records
from tests.faults.state import assert_all_whole, assert_same_run, checkpoints

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("rank", "launcher", "stage"),
    [
        (1, "torchrun", 1),
        *[
            pytest.param(rank, launcher, stage, marks=slow)
            for rank, launcher, stage in (
                (0, "torchrun", 1),
                (0, "torchrun", 3),
                (1, "torchrun", 3),
                (0, "torchrun", 0),
                (1, "torchrun", 2),
                (0, "deepspeed", 1),
                (1, "deepspeed", 1),
            )
        ],
    ],
)
def test_killed_inside_a_step(
    rank: int,
    launcher: str,
    stage: int,
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    made = config(deepspeed__zero_stage=stage)
    job = start(made, launcher=launcher)
    job.wait_for_step(2 * EVERY + 2)
    before = checkpoints(job.run_dir)
    job.strike(job.rank(rank), signal.SIGKILL)
    assert job.finish() != 0
    assert_all_whole(job.run_dir, before)
    records.ended("kill-rank", job, zero_stage=stage)
    again = start(made, launcher=launcher)
    assert again.finish() == 0, again.output()
    assert again.line("resumed from")
    assert_same_run(job.run_dir, undisturbed(deepspeed__zero_stage=stage))


# A save of this model writes 41 MB.
LARGE = {"model__hidden_size": 256, "model__intermediate_size": 1024, "model__num_layers": 4}


def kill_in_save(job: Job, delay: float) -> dict[int, Path]:
    """Kills rank 0 so many seconds after a save has begun; the checkpoints that were there."""

    def begun() -> bool:
        return any((job.run_dir / "checkpoints").glob("step-*.partial"))

    job.wait_until(lambda: checkpoints(job.run_dir), "a checkpoint")
    victim = job.rank(0)
    job.wait_until(lambda: not begun(), "a moment without a save")
    job.wait_until(begun, "a save")
    before = checkpoints(job.run_dir)
    time.sleep(delay)
    job.strike(victim, signal.SIGKILL)
    return before


@pytest.mark.parametrize(
    ("background", "moment"),
    [
        pytest.param(True, 0, id="background"),
        pytest.param(False, 0, id="in-the-step", marks=slow),
        *[
            pytest.param(way, moment, marks=slow, id=f"{way}-{moment}")
            for way in (True, False)
            for moment in range(1, 5)
        ],
    ],
)
def test_killed_while_it_saves(
    background: bool,
    moment: int,
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    changes = LARGE | {"training__checkpoint_every": 1, "training__max_steps": 12} if moment else {}
    made = config(training__async_checkpoint=background, **changes)
    job = start(made)
    before = kill_in_save(job, random.Random(moment).uniform(0.0, 0.3) if moment else 0.03)
    assert job.finish() != 0
    left = assert_all_whole(job.run_dir, before)
    saving = "background" if background else "in the step"
    records.ended("kill-in-save", job, saving=saving)
    again = start(made)
    assert again.finish() == 0, again.output()
    assert again.line(f"resumed from {left[max(left)]}")
    assert not list((job.run_dir / "checkpoints").glob("*.partial"))
    assert_same_run(job.run_dir, undisturbed(**changes))
