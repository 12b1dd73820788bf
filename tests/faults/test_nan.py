"""A gradient that is NaN on one rank: the step is left out on all, and too many end the run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import EVERY
from tests.faults.job import Job
from tests.faults.record import Records
from tests.faults.state import assert_all_whole, assert_same_run, metrics

LIMIT = 3
SAYS = f"{LIMIT} steps in a row were left out"
stages = pytest.mark.parametrize(
    "stage", [1, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 2, 3))]
)


def weights(job: Job, rank: int) -> list[str]:
    """The sum of a rank's weights after each step."""
    lines = (job.run_dir / f"weights-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line)["sha256"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_with_nan_are_left_out_on_all_ranks(
    stage: int, config: Callable[..., Path], start: Callable[..., Job], records: Records
):
    made = config(deepspeed__zero_stage=stage, training__max_skipped_steps=LIMIT)
    job = start(made, program=("tests.faults.nan_gradient", "7", "8"))
    assert job.finish() == 0, job.output()
    counts = [values["skipped_steps"] for values in metrics(job.run_dir)]
    assert counts == [0] * 7 + [1] + [2] * 32
    of_rank_0 = weights(job, 0)
    assert of_rank_0 == weights(job, 1)
    assert of_rank_0[6] == of_rank_0[7] == of_rank_0[8] != of_rank_0[9]
    records.endured("nan-gradient", job, zero_stage=stage, exit_code=0)


@stages
def test_too_many_steps_with_nan_end_the_run(
    stage: int,
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    made = config(deepspeed__zero_stage=stage, training__max_skipped_steps=LIMIT)
    job = start(made, program=("tests.faults.nan_gradient", str(EVERY + 2), "1000"))
    job.finish()
    assert job.rank_code() == 2, job.output()
    assert len(job.errors()) == 1
    assert job.status()["state"] == "failed"
    assert [v["skipped_steps"] for v in metrics(job.run_dir)][EVERY + 2 :][:LIMIT] == [1, 2, 3]
    of_rank_0 = weights(job, 0)
    assert of_rank_0 == weights(job, 1)
    assert len({*of_rank_0[EVERY + 1 :]}) == 1, "no step after the first NaN changed the weights"
    assert_all_whole(job.run_dir, {EVERY})
    records.ended("nan-in-a-row", job, SAYS, zero_stage=stage, seconds_until_gone=None)
    again = start(made)
    assert again.finish() == 0, again.output()
    assert_same_run(job.run_dir, undisturbed(deepspeed__zero_stage=stage))
