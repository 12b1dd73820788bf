"""A training job of two ranks under a real launcher, and what can be done to it while it runs."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import BIN, ROOT, free_port

PATIENCE = 600  # seconds after which a test gives up; no assertion is about a time


class Job:
    """A started job. Every process of it is known, because launchers put ranks into sessions of
    their own, or die and leave them behind.

    Attributes:
        run_dir: Its run directory.
        launcher: "torchrun" or "deepspeed"; where a `command` is given, nothing is added to that
            but the options.
        seconds_until_gone: From the last `strike` until no process was left; None before that.
    """

    def __init__(
        self,
        config: Path,
        *options: str,
        launcher: str = "torchrun",
        program: Sequence[str] = ("train.py",),
        command: Sequence[str] | None = None,
    ) -> None:
        self.run_dir, self.launcher, self.program = config.with_suffix(""), launcher, program
        self.out = config.with_name(f"{config.stem}-{time.monotonic_ns()}.out")
        self.err = self.out.with_suffix(".err")
        started = [*launch(launcher), *_as_module(launcher, program), "--config", str(config)]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [*(command or started), *options],
                cwd=ROOT,
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            )
        self.tree = [psutil.Process(self.process.pid)]
        self.struck = time.monotonic()
        self.seconds_until_gone: float | None = None

    def output(self) -> str:
        """stdout, then stderr, so far."""
        return self.out.read_text() + self.err.read_text()

    def processes(self) -> list[psutil.Process]:
        """All that live, the launcher first."""
        for parent in list(self.tree):
            try:
                known = {process.pid for process in self.tree}
                found = parent.children(recursive=True)
                self.tree += [child for child in found if child.pid not in known]
            except psutil.NoSuchProcess:
                continue
        return [process for process in self.tree if _lives(process)]

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes that train, by their rank."""
        found = {}
        for process in self.processes():
            try:
                words, environment = process.cmdline(), process.environ()
            except psutil.Error:
                continue
            if self.program[0] in words and "RANK" in environment:
                found[int(environment["RANK"])] = process
        return found

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        found = self.ranks()
        assert number in found, f"rank {number} is not there\n{self.output()}"
        return found[number]

    def steps(self) -> int:
        """Optimizer steps that the run has reported."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_until(self, condition: Callable[[], Any], what: str) -> None:
        """Returns as soon as the condition holds; the launcher must live until then."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended before {what}\n{self.output()}"
            assert time.monotonic() < deadline, f"waited in vain for {what}\n{self.output()}"
            time.sleep(0.002)

    def wait_for_step(self, step: int) -> None:
        """Returns when the run has reported this step."""
        self.wait_until(lambda: self.steps() >= step, f"step {step}")

    def strike(self, process: psutil.Process, number: signal.Signals) -> None:
        """Sends a signal to one process; the time until all are gone counts from here."""
        self.processes()
        self.struck = time.monotonic()
        process.send_signal(number)

    def strike_group(self, number: signal.Signals) -> None:
        """What a terminal does on Ctrl-C: the signal goes to the launcher's process group."""
        self.processes()
        self.struck = time.monotonic()
        os.killpg(self.process.pid, number)

    def finish(self) -> int:
        """Waits until no process of the job is left; the launcher's exit code."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None or self.processes():
            assert time.monotonic() < deadline, f"still there: {self.tree}\n{self.output()}"
            time.sleep(0.01)
        self.seconds_until_gone = time.monotonic() - self.struck
        return int(self.process.returncode)

    def rank_code(self) -> int | None:
        """The exit code of the rank that failed first, as the launcher reports it; None: none."""
        text = self.err.read_text() + self.out.read_text()
        found = re.findall(r"exitcode\s*: (-?\d+)|exits with return code = (-?\d+)", text)
        return int(found[-1][0] or found[-1][1]) if found else None

    def status(self) -> dict[str, Any]:
        """status.json of the run."""
        found: dict[str, Any] = json.loads((self.run_dir / "status.json").read_text())
        return found

    def errors(self) -> list[str]:
        """The lines with which train.py refuses or gives up."""
        lines = self.err.read_text().splitlines()
        return [line for line in lines if line.startswith("error: ")]

    def line(self, part: str) -> str:
        """The first line of the output that holds `part`."""
        for line in self.output().splitlines():
            if part in line:
                return line
        raise AssertionError(f"no line says {part!r}\n{self.output()}")

    def end(self) -> None:
        """Kills what is left of it."""
        for process in self.processes():
            process.kill()
        self.process.wait()


def launch(launcher: str) -> list[str]:
    """The launcher's part of a command for two ranks."""
    count = "--nproc_per_node=2" if launcher == "torchrun" else "--num_gpus=2"
    return [str(BIN / launcher), count, f"--master_port={free_port()}"]


def _as_module(launcher: str, program: Sequence[str]) -> list[str]:
    if program[0].endswith(".py"):
        return list(program)
    return ["--module" if launcher == "deepspeed" else "-m", *program]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
