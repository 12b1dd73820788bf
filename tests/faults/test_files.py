"""Files that change between two starts: a shard of the data, and those of checkpoints."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import EVERY
from tests.faults.job import Job
from tests.faults.record import Records
from tests.faults.state import assert_all_whole, assert_same_run, checkpoints


def flip_a_bit(path: Path) -> None:
    """Changes one bit in the middle of a file; done twice, it is as it was."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def interrupted(
    config: Callable[..., Path], start: Callable[..., Job], prepared: Path, tmp_path: Path
) -> tuple[Path, Job]:
    """A run that a kill -9 ended after its second checkpoint, on its own copy of the data."""
    shutil.copytree(prepared, tmp_path / "data")
    made = config(data__path=str(tmp_path / "data"), training__async_checkpoint=False)
    job = start(made)
    job.wait_for_step(2 * EVERY + 1)
    job.strike(job.rank(1), signal.SIGKILL)
    job.finish()
    assert max(assert_all_whole(job.run_dir, {EVERY, 2 * EVERY})) < 40
    return made, job


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "checkpoint-truncated": ("optimizer.safetensors", lambda file: os.truncate(file, 1000)),
    "checkpoint-missing": ("model.safetensors", Path.unlink),
    "checkpoint-altered": ("model.safetensors", flip_a_bit),
    "checkpoint-no-json": ("checkpoint.json", lambda file: file.write_text("{half of it")),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", DAMAGE)
def test_damaged_files(
    fault: str,
    interrupted: tuple[Path, Job],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    """A shard first, which is refused; once it is restored, a checkpoint."""
    made, job = interrupted
    shard = job.run_dir.parent / "data" / "train-00000.tokens.bin"
    flip_a_bit(shard)
    before = checkpoints(job.run_dir)
    refused = start(made)
    refused.finish()
    assert refused.rank_code() == 2, refused.output()
    assert len(refused.errors()) == 1
    seen = {"status": None, "steps_lost": 0, "seconds_until_gone": None}
    records.ended("altered-shard", refused, shard.name, **seen)
    flip_a_bit(shard)
    newest = max(before)
    name, damage = DAMAGE[fault]
    damage(before[newest] / name)
    again = start(made)
    assert again.finish() == 0, again.output()
    warning = again.line(f"warning: {before[newest] / name}")
    records.endured(fault, again, warning, steps_lost=EVERY)
    assert again.line(f"resumed from {before[newest - EVERY]}")
    assert before[newest].with_name(before[newest].name + ".damaged").is_dir()
    assert_all_whole(job.run_dir, before)
    assert_same_run(job.run_dir, undisturbed())


@pytest.mark.slow
def test_clock_that_goes_backwards(
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    """By a day in the middle of a run; then the oldest checkpoint is from the year to come."""
    made = config()
    job = start(made, program=("tests.faults.clock_back", str(EVERY + 2)))
    job.wait_for_step(3 * EVERY + 1)
    job.strike(job.rank(0), signal.SIGUSR1)
    job.finish()
    assert job.status()["time"] < time.time() - 80_000, "the clock was not set back"
    found = assert_all_whole(job.run_dir, {EVERY, 2 * EVERY, 3 * EVERY})
    ahead = time.time() + 365 * 86_400
    for path in (found[EVERY], *found[EVERY].iterdir()):
        os.utime(path, (ahead, ahead))
    again = start(made)
    assert again.finish() == 0, again.output()
    assert again.line(f"resumed from {found[max(found)]}")
    records.endured("clock-back", job)
    assert_same_run(job.run_dir, undisturbed())
