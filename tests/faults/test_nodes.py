"""Two launchers, one a node, that meet at a rendezvous: here both on this machine."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import BIN, free_port
from tests.faults.conftest import EVERY
from tests.faults.job import Job
from tests.faults.state import assert_all_whole, assert_same_run


@pytest.mark.slow
def test_two_nodes_are_one_job(
    config: Callable[..., Path], start: Callable[..., Job], undisturbed: Callable[..., Path]
):
    """One run directory, one lock, one checkpoint: the ranks count over both nodes."""
    made = config()

    def node(port: int) -> Job:
        meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=test"]
        command = [str(BIN / "torchrun"), "--nnodes=2", "--nproc_per_node=1", *meeting]
        return start(made, command=[*command, "train.py", "--config", str(made)])

    def both() -> tuple[Job, Job]:
        port = free_port()
        return node(port), node(port)

    first, second = both()
    first.wait_for_step(EVERY + 2)
    assert sorted([*first.ranks(), *second.ranks()]) == [0, 1]
    job = first if 1 in first.ranks() else second
    assert 0 not in job.ranks()
    job.strike(job.rank(1), signal.SIGUSR1)  # on the node that does not save
    assert {first.finish(), second.finish()} == {1}
    assert first.status()["state"] == "preempted"
    assert_all_whole(first.run_dir, {EVERY})
    for job in both():
        assert job.finish() == 0, job.output()
    assert_same_run(first.run_dir, undisturbed())
