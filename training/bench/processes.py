"""Programs that are measured from outside: each in a session of its own, so that it can be ended
with all that it started.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 1800  # seconds
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


class ProgramError(Exception):
    """A measured program that failed; the message has the end of its output."""


def clean_environment() -> dict[str, str]:
    """The environment without what a launcher may have left in it."""
    return {k: v for k, v in os.environ.items() if k not in _LAUNCHED}


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one of `ranks` on this machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return clean_environment() | {k: str(v) for k, v in (place | address).items()}


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def python(*arguments: str) -> list[str]:
    """A command for this Python."""
    return [sys.executable, *arguments]


def run_all(commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]]) -> str:
    """Runs commands at the same time from the repository's root; the stderr of the first.

    ProgramError where one fails or takes longer than TIMEOUT.
    """
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=dict(environment),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for command, environment in zip(commands, environments, strict=True)
    ]
    first = ""
    try:
        for index, process in enumerate(processes):
            error = process.communicate(timeout=TIMEOUT)[1]
            if process.returncode:
                lines = " | ".join(error.strip().splitlines()[-3:])
                raise ProgramError(f"exit code {process.returncode}: {lines}")
            first = first if index else error
    except subprocess.TimeoutExpired:
        raise ProgramError(f"no end after {TIMEOUT} s: {' '.join(commands[0])}") from None
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return first


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Runs one command from the repository's root; its stderr. ProgramError where it fails."""
    return run_all([command], [clean_environment() if environment is None else environment])
