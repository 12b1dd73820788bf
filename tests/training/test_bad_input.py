"""What train.py says of bad input: one line that names it, exit code 2, nothing half-written."""

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import train
from data.errors import InputError
from model import ModelConfig, Ranks
from tests.conftest import Runs
from training import checkpoint


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The message with which train.py refuses a command line before it joins any process group."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def not_refused() -> None:
        raise AssertionError("the command line was not refused")

    # A run that is not refused would end this process, and every later test with it.
    monkeypatch.setattr(train.distributed, "init_distributed", not_refused)

    def run(*arguments: Any) -> str:
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        with pytest.raises(InputError) as caught:
            train.main()
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model__num_heads": 3}, ["model.num_heads", "3", "32"]),
        ({"model__r": 64}, ["model.r", "64", "q_proj", "32"]),
        ({"model__hiden_size": 32}, ["model.hiden_size", "model.hidden_size"]),
        ({"training__lr": 0.1}, ["training.lr", "training.learning_rate"]),
        ({"training__seq_len": 65}, ["training.seq_len", "65", "64"]),
        ({"training__learning_rate": "fast"}, ["training.learning_rate", "fast"]),
        ({"training__precision": "fp8"}, ["training.precision", "fp8", "bf16"]),
        ({"training__max_steps": 0}, ["training.max_steps", "at least 1"]),
        ({"training__warmup_steps": -1}, ["training.warmup_steps", "-1", "at least 0"]),
        ({"training__global_batch_size": 7}, ["training.global_batch_size", "7", "multiples of 2"]),
        ({"deepspeed__zero_stage": 4}, ["deepspeed.zero_stage", "4"]),
        ({"model__vocab_size": 399}, ["model.vocab_size", "399", "400"]),
        ({"model__document_start_id": 7}, ["model.document_start_id", "7", "begin with token 1"]),
        ({"model__document_start_id": 400}, ["model.document_start_id", "400", "0 to 399"]),
        ({"execution__kernels": "cuda"}, ["execution.kernels", "cuda", "reference", "triton"]),
        ({"execution__kernel": "auto"}, ["execution.kernel", "execution.kernels"]),
        ({"execution__loss_chunk_tokens": 0}, ["execution.loss_chunk_tokens", "at least 1"]),
        ({"data__path": "nowhere"}, ["nowhere", "python -m data.prepare", "--output nowhere"]),
    ],
)
def test_bad_configuration(changes: dict, expected: list[str], runs: Runs, refused: Callable):
    message = refused("--config", runs.config(**changes))
    for part in expected:
        assert part in message, message
    assert not (runs.folder / "run" / "config.yaml").exists()


def test_command_ends_with_one_line_and_exit_code_2(runs: Runs):
    out, err = runs.train(runs.config(data__path="nowhere"), code=2)
    assert out == ""
    assert err.startswith("error: nowhere")
    assert err.count("\n") == 1


def test_altered_shard_is_named_with_its_checksum(runs: Runs, prepared: Path, refused: Callable):
    copy = runs.folder / "data"
    shutil.copytree(prepared, copy)
    shard = copy / "train-00000.tokens.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    message = refused("--config", runs.config(data__path=str(copy)))
    assert "train-00000.tokens.bin" in message
    assert "sha256" in message


def test_validation_without_a_valid_split_is_refused_at_once(
    runs: Runs, prepared: Path, refused: Callable
):
    copy = runs.folder / "data"
    shutil.copytree(prepared, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["splits"]["valid"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    config = runs.config(data__path=str(copy), training__validate_every=2)
    assert "has no split 'valid'" in refused("--config", config)
    assert not (runs.folder / "run").exists()


def test_output_folder_that_is_not_there_is_refused_before_the_work(runs: Runs, refused: Callable):
    message = refused("--config", runs.config(), "--dry-run", "--output", "no/such/out.json")
    assert "no/such" in message


def test_never_refuses_a_folder_that_holds_a_run(trained: Path, refused: Callable):
    message = refused("--config", trained / "config.yaml", "--training.resume", "never")
    assert "training.resume: never" in message


def test_path_of_another_run_is_refused_where_a_run_is(
    trained: Path, tmp_path: Path, refused: Callable
):
    shutil.copytree(trained, tmp_path / "other")
    message = refused("--config", trained / "config.yaml", "--training.resume", tmp_path / "other")
    assert "holds a run" in message


@pytest.fixture
def copied(trained: Path, runs: Runs) -> Path:
    """A copy of a finished run that thinks it has more to do."""
    run_dir = runs.folder / "run"
    shutil.copytree(trained, run_dir)
    return run_dir


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--training.global_batch_size", "4"], "global_batch_size was 8, now it is 4"),
        (["--training.seq_len", "16"], "seq_len was 32, now it is 16"),
        (["--training.seed", "6"], "seed was 5, now it is 6"),
        (["--model.num_layers", "3"], "model.num_layers was 2, now it is 3"),
    ],
)
def test_resume_names_what_differs(
    change: list[str], expected: str, copied: Path, runs: Runs, refused: Callable
):
    message = refused("--config", runs.config(training__max_steps=8), *change)
    assert expected in message


def test_ranks_written_out_are_the_same_model(copied: Path):
    folder = copied / "checkpoints/step-00000006"
    model = ModelConfig.from_json(folder / "model.json")
    model.r = Ranks(q=8, k=8, v=8, o=8)
    state, changed = checkpoint.check(folder, model, {})
    assert (state["step"], changed) == (6, [])


def test_no_space_for_a_checkpoint_keeps_the_one_before(copied: Path, runs: Runs):
    """A file-size limit under a checkpoint's largest file stands for the full disk."""
    largest = max(p.stat().st_size for p in (copied / "checkpoints/step-00000006").rglob("*"))
    limit = largest - 1000
    config = runs.config(training__max_steps=8)
    process = runs.launch(
        ["prlimit", f"--fsize={limit}", sys.executable, "train.py", "--config", str(config)]
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, out + err
    assert err.count("\n") == 1, err
    assert "could not be written" in err
    assert "start again" in err
    left = [p.name for p in sorted((copied / "checkpoints").iterdir())]
    assert left == ["step-00000003", "step-00000006"], "nothing half-written stays"
    checkpoint.read_state(copied / "checkpoints/step-00000006")
    runs.train(config)
    assert checkpoint.read_state(checkpoint.newest(copied))["step"] == 8


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 3 MiB; mounting one needs root."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_seen_before_anything_is_written(small_disk: Path, runs: Runs):
    config = runs.config(training__run_dir=str(small_disk / "run"))
    filler = small_disk / "filler"
    usable = os.statvfs(small_disk)
    filler.write_bytes(b"x" * (usable.f_bavail * usable.f_frsize - 300_000))
    _, err = runs.train(config, code=2)
    assert "no space left" in err.lower()
    assert err.count("\n") == 1, err
    assert checkpoint.newest(small_disk / "run") is None
    filler.unlink()
    runs.train(config)


def test_limits_are_those_of_this_process():
    """The no-space test relies on prlimit limiting its child alone."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
