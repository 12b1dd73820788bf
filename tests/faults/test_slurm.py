"""docs/slurm.sh: what it does after a signal, an error and the end, with stand-ins for the two
programs of Slurm. `srun` here starts real ranks on this machine.
"""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BIN, ROOT
from tests.faults.conftest import EVERY
from tests.faults.job import Job
from tests.faults.state import assert_all_whole, assert_same_run

SCRIPT = ROOT / "docs" / "slurm.sh"
SRUN = """#!/bin/bash
# Two tasks. As with --kill-on-bad-exit=1 one that fails ends the other; the highest exit code.
while [[ $1 == --* ]]; do shift; done
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" &
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &
wait -n; first=$?
[ $first -eq 0 ] || kill $(jobs -p) 2>/dev/null
wait -n; second=$?
exit $((first > second ? first : second))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def test_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.fixture
def requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the stand-in notes what is put back into the queue; the job's environment is set."""
    programs = tmp_path / "slurm"
    programs.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    noted = tmp_path / "requeued"
    job_id = str(os.getpid())  # of which the script makes the port
    for name, value in {
        "PATH": f"{programs}:{BIN}:{os.environ['PATH']}",
        "REQUEUED": str(noted),
        "SLURM_JOB_ID": job_id,
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    return noted


@pytest.mark.slow
def test_requeued_after_a_signal_alone(
    requeued: Path,
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
):
    made = config()
    run_dir = made.with_suffix("")

    def submit(*options: str) -> Job:
        return start(made, *options, command=["bash", str(SCRIPT), str(made), str(run_dir)])

    job = submit()
    job.wait_for_step(EVERY + 2)
    for rank in (0, 1):
        job.strike(job.rank(rank), signal.SIGUSR1)
    assert job.finish() == 75, job.output()
    assert job.status()["state"] == "preempted"
    assert_all_whole(run_dir, {EVERY})
    note = f"requeue {os.environ['SLURM_JOB_ID']}\n"
    assert requeued.read_text() == note
    refused = submit("--training.seed", "6")
    assert refused.finish() not in (0, 75)
    assert refused.line("error: ")
    assert refused.status()["state"] == "preempted", "that of the run before"
    assert requeued.read_text() == note
    again = submit()
    assert again.finish() == 0, again.output()
    assert requeued.read_text() == note
    assert_same_run(run_dir, undisturbed())
