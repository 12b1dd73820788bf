"""A second job on one run directory, and a rank that stands still for a while: the first run ends
as if nothing had been.
"""

import signal
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults.job import Job
from tests.faults.record import Records
from tests.faults.state import assert_all_whole, assert_same_run


def test_second_job_is_refused_and_a_stopped_rank_goes_on(
    config: Callable[..., Path],
    start: Callable[..., Job],
    undisturbed: Callable[..., Path],
    records: Records,
):
    made = config()
    job = start(made)
    job.wait_for_step(7)
    hung = job.rank(1)
    hung.send_signal(signal.SIGSTOP)
    time.sleep(1)  # the step that rank 0 was in may end
    reached = job.steps()
    second = start(made)
    second.finish()
    assert second.rank_code() == 2, second.output()
    assert f"process {job.rank(0).pid} on" in second.line("another run is using it")
    assert len(second.errors()) == 1
    assert job.steps() == reached, "rank 0 waits for rank 1"
    assert job.status()["state"] == "running"
    hung.send_signal(signal.SIGCONT)
    assert job.finish() == 0, job.output()
    records.endured(
        "two-runs",
        second,
        "another run is using it",
        exit_code=second.process.returncode,
        rank_exit_code=2,
    )
    records.endured("stopped-rank", job)
    assert_all_whole(job.run_dir, {5})
    assert_same_run(job.run_dir, undisturbed())
