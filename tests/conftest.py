"""What several test modules share: a small prepared folder, run configurations, launched jobs."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
VOCAB = 400


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder: 60 short documents of real prose and code, vocabulary 320."""
    from data.embedded import embedded_documents
    from data.prepare import main

    folder = tmp_path_factory.mktemp("prepared")
    source = folder / "source.jsonl"
    with source.open("w") as file:
        for count, (_, text) in enumerate(embedded_documents()):
            if count == 60:
                break
            file.write(json.dumps({"text": text[:3000]}) + "\n")
    options = ["--valid_fraction", "0.1", "--test_fraction", "0.1", "--processes", "1"]
    arguments = ["--input", str(source), "--output", str(folder / "data")]
    assert main([*arguments, "--vocab_size", str(VOCAB), *options]) == 0
    return folder / "data"


class Runs:
    """Writes run configurations and starts train.py on them."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder, self.data = folder, data
        self.processes: list[subprocess.Popen[str]] = []

    def config(self, name: str = "run", **changes: Any) -> Path:
        """A YAML of a tiny LPA run; changes are dotted keys, `training__max_steps=3`."""
        config: dict[str, Any] = {
            "model": {
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_layers": 2,
                "num_heads": 2,
                "max_seq_len": 64,
                "r": 8,
            },
            "data": {"path": str(self.data)},
            "training": {
                "run_dir": str(self.folder / name),
                "max_steps": 6,
                "global_batch_size": 8,
                "micro_batch_size": 2,
                "seq_len": 32,
                "learning_rate": 1.0e-2,
                "warmup_steps": 2,
                "log_every": 1,
                "checkpoint_every": 3,
                "seed": 5,
            },
            "deepspeed": {"zero_stage": 1},
        }
        for key, value in changes.items():
            block, _, leaf = key.partition("__")
            config.setdefault(block, {})[leaf] = value
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    def start(self, config: Path, *options: str, ranks: int = 1, launcher: str = "python") -> Any:
        """Starts train.py; its output is a pipe. The whole process group ends with the test."""
        command = {
            "python": [sys.executable],
            "torchrun": [
                str(BIN / "torchrun"), f"--nproc_per_node={ranks}", f"--master_port={free_port()}",
            ],
            "deepspeed": [
                str(BIN / "deepspeed"), f"--num_gpus={ranks}", f"--master_port={free_port()}",
            ],
        }[launcher]  # fmt: skip
        return self.launch([*command, "train.py", "--config", str(config), *options])

    def launch(self, command: list[str], **keywords: Any) -> Any:
        """Starts any command from the repository's root."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
            **keywords,
        )
        self.processes.append(process)
        return process

    def train(self, config: Path, *options: str, code: int = 0, **keywords: Any) -> tuple[str, str]:
        """Runs train.py to its end; stdout and stderr."""
        return finish(self.start(config, *options, **keywords), code)


def finish(process: Any, code: int = 0, timeout: float = 300) -> tuple[str, str]:
    """Waits for a process and checks its exit code."""
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture
def runs(tmp_path: Path, prepared: Path) -> Iterator[Runs]:
    """Run configurations in a fresh folder; processes that still live at the end are killed."""
    made = Runs(tmp_path, prepared)
    yield made
    for process in made.processes:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, prepared: Path) -> Path:
    """A run directory that six steps of training left, checkpoints at 3 and 6."""
    made = Runs(tmp_path_factory.mktemp("trained"), prepared)
    config = made.config(training__validate_every=3, training__validation_tokens=500)
    made.train(config)
    return made.folder / "run"
