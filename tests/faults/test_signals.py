"""Signals to ranks, to launchers and from a terminal."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.faults.conftest import EVERY, STEPS
from tests.faults.job import Job
from tests.faults.record import Records, readable
from tests.faults.state import assert_all_whole, assert_same_run, checkpoints

slow = pytest.mark.slow
STOPPED = "stopped by a signal after step"


@pytest.fixture
def saved_and_goes_on(
    start: Callable[..., Job], undisturbed: Callable[..., Path]
) -> Callable[..., None]:
    """Checks that a signalled run saved its last step, and that the next start completes it."""

    def check(job: Job, config: Path, **changes: Any) -> None:
        found = job.status()
        assert found["state"] == "preempted", job.output()
        assert found["step"] == job.steps() == max(assert_all_whole(job.run_dir, {EVERY})) < STEPS
        again = start(config)
        assert again.finish() == 0, again.output()
        assert again.line(f"resumed from {job.run_dir}/checkpoints/step-{found['step']:08d}")
        assert_same_run(job.run_dir, undisturbed(**changes))

    return check


@pytest.mark.parametrize(
    ("number", "rank", "launcher", "stage"),
    [
        (signal.SIGTERM, 1, "torchrun", 1),
        *[
            pytest.param(*case, marks=slow)
            for case in (
                (signal.SIGUSR1, 0, "torchrun", 1),
                (signal.SIGUSR1, 1, "torchrun", 3),
                (signal.SIGTERM, 0, "torchrun", 3),
                (signal.SIGTERM, 0, "deepspeed", 1),
                (signal.SIGUSR1, 1, "deepspeed", 1),
            )
        ],
    ],
)
def test_signal_to_one_rank(
    number: signal.Signals,
    rank: int,
    launcher: str,
    stage: int,
    config: Callable[..., Path],
    start: Callable[..., Job],
    saved_and_goes_on: Callable[..., None],
    records: Records,
):
    made = config(deepspeed__zero_stage=stage)
    job = start(made, launcher=launcher)
    job.wait_for_step(EVERY + 2)
    job.strike(job.rank(rank), number)
    assert job.finish() == (75 if launcher == "deepspeed" else 1)
    assert job.rank_code() == 75
    records.ended("signal-rank", job, STOPPED, zero_stage=stage)
    saved_and_goes_on(job, made, deepspeed__zero_stage=stage)


@slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ctrl_c(
    launcher: str,
    config: Callable[..., Path],
    start: Callable[..., Job],
    saved_and_goes_on: Callable[..., None],
    records: Records,
):
    made = config()
    job = start(made, launcher=launcher)
    job.wait_for_step(EVERY + 2)
    job.strike_group(signal.SIGINT)
    job.finish()
    records.ended("ctrl-c", job, STOPPED)
    saved_and_goes_on(job, made)


@slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_ctrl_c_twice(
    launcher: str,
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    """The steps are long, so that the second Ctrl-C comes before the first one takes effect.
    torchrun does not pass it on: its ranks save as after one.
    """
    long = {"training__global_batch_size": 1024, "training__checkpoint_every": 1}
    long["training__max_steps"] = 4
    made = config(**long)
    job = start(made, launcher=launcher)
    job.wait_until(lambda: 2 in checkpoints(job.run_dir), "the second checkpoint")
    before = checkpoints(job.run_dir)
    for _ in range(2):
        time.sleep(0.3)  # at once, the launcher would pass on one
        job.strike_group(signal.SIGINT)
    assert job.finish() != 0
    new = {*assert_all_whole(job.run_dir, before)} - {*before}
    assert new == ({3} if launcher == "torchrun" else set())
    assert job.status()["state"] == ("preempted" if new else "failed")
    records.ended("ctrl-c-twice", job, STOPPED if new else "")
    again = start(made)
    assert again.finish() == 0, again.output()
    assert_same_run(job.run_dir, undisturbed(**long))


@slow
def test_sigterm_to_torchrun(
    config: Callable[..., Path],
    start: Callable[..., Job],
    saved_and_goes_on: Callable[..., None],
    records: Records,
):
    made = config()
    job = start(made)
    job.wait_for_step(EVERY + 2)
    job.strike(psutil.Process(job.process.pid), signal.SIGTERM)
    assert job.finish() != 0
    records.ended("signal-torchrun", job, STOPPED)
    saved_and_goes_on(job, made)


@slow
def test_sigterm_to_deepspeed_leaves_ranks_that_keep_the_run_directory(
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    # Long enough for the second start while the ranks live on.
    long = {"training__max_steps": 300, "training__checkpoint_every": 100}
    made = config(**long)
    job = start(made, launcher="deepspeed")
    job.wait_for_step(2)
    ranks = [job.rank(0), job.rank(1)]
    job.strike(psutil.Process(job.process.pid), signal.SIGTERM)
    assert job.process.wait() == -signal.SIGTERM
    reached = job.steps()
    second = start(made)
    second.finish()
    message = second.line("another run is using it")
    assert f"process {ranks[0].pid} on" in message
    assert second.rank_code() == 2
    assert job.steps() > reached, "the ranks trained on"
    job.strike(ranks[0], signal.SIGTERM)
    job.finish()
    records.ended("signal-deepspeed", job, rank_exit_code=75, message=readable(job, message))
    assert job.status()["state"] == "preempted", job.output()
    assert job.status()["step"] == max(assert_all_whole(job.run_dir, {}))
    again = start(made)
    assert again.finish() == 0, again.output()
    assert_same_run(job.run_dir, undisturbed(**long))


@slow
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_signal_inside_an_accumulation(
    stage: int,
    config: Callable[..., Path],
    start: Callable[..., Job],
    saved_and_goes_on: Callable[..., None],
    records: Records,
):
    made = config(deepspeed__zero_stage=stage)
    job = start(made, program=("tests.faults.signal_inside", str(EVERY + 1)))
    job.finish()
    assert job.status()["step"] == EVERY + 2
    records.ended("signal-in-accumulation", job, STOPPED, zero_stage=stage, seconds_until_gone=None)
    saved_and_goes_on(job, made, deepspeed__zero_stage=stage)
