"""What a fault came to, as a row of the table in docs/reliability.md."""

import dataclasses
import datetime
import os
import re
from importlib.metadata import version
from typing import Any

from tests.faults.catalogue import FAULTS
from tests.faults.job import Job
from tests.faults.state import checkpoints


@dataclasses.dataclass
class Row:
    """One fault, done once.

    Attributes:
        fault: Its key in the catalogue.
        launcher: "torchrun", "deepspeed" or "python".
        zero_stage: The job's ZeRO stage.
        saving: "background" or "in the step": training.async_checkpoint.
        exit_code: The launcher's; None where the fault does not end the job.
        rank_exit_code: That of the rank which failed first, as the launcher reports it.
        status: state in status.json afterwards.
        seconds_until_gone: From the fault to the end of the last process.
        steps_lost: Steps reported before the end and not in the newest whole checkpoint.
        message: The line that tells the user.
    """

    fault: str
    launcher: str = "torchrun"
    zero_stage: int = 1
    saving: str = "background"
    exit_code: int | None = None
    rank_exit_code: int | None = None
    status: str | None = None
    seconds_until_gone: float | None = None
    steps_lost: int | None = None
    message: str = ""

    def __post_init__(self) -> None:
        assert self.fault in FAULTS, f"{self.fault} is not in tests/faults/catalogue.py"


class Records:
    """Rows, of a test or of a session."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def ended(self, fault: str, job: Job, says: str = "", **values: Any) -> None:
        """Notes a fault that ended the job; `says`: part of the line that tells the user."""
        newest = max(checkpoints(job.run_dir), default=0)
        row = Row(
            fault,
            job.launcher,
            exit_code=job.process.returncode,
            rank_exit_code=job.rank_code(),
            status=job.status()["state"],
            seconds_until_gone=job.seconds_until_gone,
            steps_lost=max(job.steps() - newest, 0),
            message=readable(job, job.line(says)) if says else "",
        )
        self.rows.append(dataclasses.replace(row, **values))

    def endured(self, fault: str, job: Job, says: str = "", **values: Any) -> None:
        """Notes a fault that the job outlived."""
        text = readable(job, job.line(says)) if says else ""
        self.rows.append(
            dataclasses.replace(Row(fault, job.launcher, steps_lost=0, message=text), **values)
        )

    def to_json(self) -> dict[str, Any]:
        """All rows, with the day, the versions and the hardware in words."""
        return {
            "date": datetime.date.today().isoformat(),
            "hardware": f"{os.cpu_count()} cores, CPU, gloo, 2 ranks",
            "versions": {name: version(name) for name in ("torch", "deepspeed", "safetensors")},
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


def readable(job: Job, line: str) -> str:
    """A line without the paths and process numbers of one machine."""
    line = line.replace(str(job.run_dir), "RUN").replace(str(job.run_dir.parent), "DIR")
    line = re.sub(r"process \d+ on \S+?(?=\))", "process PID on NODE", line)
    return re.sub(r"\b[0-9a-f]{64}\b", "…", line)
