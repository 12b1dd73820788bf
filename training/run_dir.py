"""The folder of a run: who uses it, what state it is in, and what it was run with."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import filelock
import torch

from data.errors import InputError
from training.hardware import device_name

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "deepspeed", "numpy", "sentencepiece", "safetensors")


def lock(run_dir: Path) -> filelock.FileLock:
    """Takes the run directory for this process until it ends, however it ends.

    InputError where another living process has it, for example a rank whose launcher was killed.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    held = filelock.FileLock(run_dir / ".lock", timeout=0)
    try:
        held.acquire()
    except filelock.Timeout:
        owner = (run_dir / ".owner").read_text() if (run_dir / ".owner").exists() else "unknown"
        raise InputError(
            f"training.run_dir {run_dir}: another run is using it ({owner.strip()}); end that one, "
            "or choose another run_dir"
        ) from None
    (run_dir / ".owner").write_text(f"process {os.getpid()} on {platform.node()}\n")
    return held


def write_status(run_dir: Path, state: str, step: int, message: str | None = None) -> None:
    """status.json: running, completed, preempted or failed, the step, and why it failed."""
    status = {"state": state, "step": step, "time": time.time()}
    write_json(run_dir / "status.json", status | ({"message": message} if message else {}))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def environment(device: torch.device) -> dict[str, Any]:
    """Git commit, versions, hardware and command line: what one needs to repeat a run."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    commit = _git("rev-parse", "HEAD")
    return {
        "command_line": _command_line(),
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
        "python": platform.python_version(),
        "packages": versions,
        "cuda": torch.version.cuda,
        "device": device_name(device),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0],
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "started_unix_seconds": time.time(),
    }


def _command_line() -> list[str]:
    """sys.argv, its program as a path in the repository, which is elsewhere on other machines."""
    program = Path(sys.argv[0]).absolute()
    name = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else sys.argv[0]
    return [name, *sys.argv[1:]]


def _git(*args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *args], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def logger(run_dir: Path | None) -> logging.Logger:
    """The run's log: the console and, where a folder is given, its log.txt. Other ranks: silent."""
    log = logging.getLogger("lpa")
    log.handlers.clear()
    log.propagate = False
    log.setLevel(logging.INFO)
    if run_dir is None:
        log.addHandler(logging.NullHandler())
        return log
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(message)s"))
    file = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(console)
    log.addHandler(file)
    return log
