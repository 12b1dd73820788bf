"""Jobs, undisturbed runs to compare with, and the record of what was seen."""

import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Runs
from tests.faults.job import Job
from tests.faults.record import Records

PASSED = pytest.StashKey[bool]()
STEPS, EVERY = 40, 5
# 8 micro-batches a step on each of two ranks: most moments are inside an accumulation.
SETTINGS: dict[str, Any] = {
    "training__max_steps": STEPS,
    "training__checkpoint_every": EVERY,
    "training__keep_checkpoints": None,
    "training__global_batch_size": 32,
    "data__final_split": None,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fault-results", type=Path, help="write what the fault tests saw to this JSON file"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, Any]:
    """Remembers whether the body of a test passed."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture(scope="session")
def all_records(request: pytest.FixtureRequest) -> Iterator[Records]:
    """The rows of the session; they are written where --fault-results asks for it."""
    made = Records()
    yield made
    path = request.config.getoption("fault_results", default=None)
    if path is not None:
        path.write_text(json.dumps(made.to_json(), indent=2) + "\n")


@pytest.fixture
def records(request: pytest.FixtureRequest, all_records: Records) -> Iterator[Records]:
    """Takes the rows of a test, which count if it passes: the last checks come after them."""
    made = Records()
    yield made
    if request.node.stash.get(PASSED, False):
        all_records.rows += made.rows


@pytest.fixture
def config(runs: Runs) -> Callable[..., Path]:
    """Writes a configuration of the jobs here: config(name, key=value)."""

    def make(name: str = "run", **changes: Any) -> Path:
        return runs.config(name, **(SETTINGS | changes))

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    """Starts jobs as `Job` does; what lives at the end of the test is killed."""
    jobs: list[Job] = []

    def begin(*arguments: Any, **keywords: Any) -> Job:
        jobs.append(Job(*arguments, **keywords))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.end()


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Callable[..., Path]:
    """The run directory of a job that nothing befell, with the same changes of the settings."""
    done: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        key = json.dumps(changes, sort_keys=True)
        if key not in done:
            runs = Runs(tmp_path_factory.mktemp("undisturbed"), prepared)
            job = Job(runs.config(**(SETTINGS | changes)))
            try:
                assert job.finish() == 0, job.output()
            finally:
                job.end()
            done[key] = job.run_dir
        return done[key]

    return run
