"""The embedded corpus, prepared for a benchmark."""

from pathlib import Path

from training.bench import processes


def prepare(folder: Path) -> Path:
    """The prepared folder of configs/data/embedded.yaml, at `folder`."""
    config = ("--config", "configs/data/embedded.yaml")
    processes.run(processes.python("-m", "data.prepare", *config, "--output", str(folder)))
    return folder
