"""A checkpoint that does not fit: a small file system that is full, and a file size limit."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Runs
from tests.faults.conftest import EVERY, SETTINGS
from tests.faults.job import Job
from tests.faults.record import Records
from tests.faults.state import assert_all_whole, assert_same_run, checkpoints

SAYS = "the checkpoint could not be written"
slow = pytest.mark.slow
WAYS = {"background": True, "in the step": False}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:  # as an ordinary user, and in most containers
        pytest.skip(f"no small file system could be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path, leave: int) -> Path:
    """Fills a file system up to so many bytes."""
    usable = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(b"x" * (usable.f_bavail * usable.f_frsize - leave))
    return filler


def failed_save(fault: str, saving: str, job: Job, before: dict, records: Records) -> None:
    """The job ends with code 2, says it once, and leaves nothing but whole checkpoints."""
    job.finish()
    assert job.rank_code() == 2, job.output()
    assert len(job.errors()) == 1, job.output()
    found = assert_all_whole(job.run_dir, before)
    left = {p.name for p in (job.run_dir / "checkpoints").iterdir()}
    assert left == {folder.name for folder in found.values()}, "nothing half-written stays"
    records.ended(fault, job, SAYS, saving=saving, seconds_until_gone=None)


# What is free when the disk is full, and what the message says: next to nothing, which the check
# before a save sees; and about what the tensors take, so that it fills up inside the last file.
PAGE = 4096
ROOM = {
    "disk-full": (lambda folder: 100_000, "no space left: "),
    "disk-full-in-write": (lambda folder: tensor_bytes(folder) + 2 * PAGE, "os error 28"),
}


def tensor_bytes(folder: Path) -> int:
    """Size of a checkpoint's two large files."""
    names = ("model.safetensors", "optimizer.safetensors")
    return sum((folder / name).stat().st_size for name in names)


@pytest.mark.parametrize(
    ("fault", "saving"),
    [
        pytest.param("disk-full-in-write", "background", marks=slow),
        pytest.param("disk-full-in-write", "in the step", marks=slow),
        pytest.param("disk-full", "background", marks=slow),
        pytest.param("disk-full", "in the step", marks=slow),
    ],
)
def test_full_disk(
    fault: str,
    saving: str,
    small_disk: Path,
    prepared: Path,
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    made = Runs(small_disk, prepared).config(
        **(SETTINGS | {"training__async_checkpoint": WAYS[saving]})
    )
    job = start(made)
    job.wait_until(lambda: EVERY in checkpoints(job.run_dir), "a checkpoint")
    before = checkpoints(job.run_dir)
    room, says = ROOM[fault]
    filler = fill(small_disk, room(before[EVERY]))
    failed_save(fault, saving, job, before, records)
    assert says in job.line(SAYS)
    filler.unlink()
    again = start(made)
    assert again.finish() == 0, again.output()
    assert_same_run(job.run_dir, undisturbed())


@slow
@pytest.mark.parametrize("saving", WAYS)
@pytest.mark.parametrize("stage", [1, 3])
def test_file_size_limit_of_rank_0(
    saving: str,
    stage: int,
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    """Where no file system can be mounted, this is what stands for the full disk."""
    made = config(deepspeed__zero_stage=stage, training__async_checkpoint=WAYS[saving])
    job = start(made)
    job.wait_until(lambda: EVERY in checkpoints(job.run_dir), "a checkpoint")
    before = checkpoints(job.run_dir)
    limit = (before[EVERY] / "optimizer.safetensors").stat().st_size - 1000
    job.rank(0).rlimit(psutil.RLIMIT_FSIZE, (limit, limit))
    failed_save("file-limit", saving, job, before, records)
    records.rows[-1].zero_stage = stage
    again = start(made)
    assert again.finish() == 0, again.output()
    assert_same_run(job.run_dir, undisturbed(deepspeed__zero_stage=stage))
