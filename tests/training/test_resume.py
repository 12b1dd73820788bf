"""Where a run begins, and what becomes of damaged checkpoints."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.command_line import parse_options
from data.errors import InputError
from tests.conftest import Runs
from training import checkpoint, resume
from training.config import RunConfig


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunConfig:
    """The configuration of a finished run of six steps, in a copy of its folder."""
    shutil.copytree(trained, tmp_path / "run")
    options = [
        "--config",
        str(trained / "config.yaml"),
        "--training.run_dir",
        str(tmp_path / "run"),
    ]
    made, _ = parse_options(RunConfig, options, prog="test", description="test")
    return made


def choose(run: RunConfig, choice: str = "auto", **expected: Any) -> resume.Start:
    run.training.resume = choice
    return resume.choose(run, expected)


def folder(run: RunConfig, name: str) -> Path:
    return Path(run.training.run_dir) / "checkpoints" / name


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "optimizer.safetensors", 1000), "has 1000 bytes"),
    "missing": (lambda f: (f / "optimizer.safetensors").unlink(), "is missing"),
    "altered weights": (lambda f: flip_a_bit(f / "model.safetensors"), "sha256"),
    "altered moments": (lambda f: flip_a_bit(f / "optimizer.safetensors"), "sha256"),
    "altered shape": (lambda f: flip_a_bit(f / "model.json"), "sha256"),
    "no list of files": (lambda f: (f / "checkpoint.json").unlink(), "checkpoint.json: unreadable"),
    "half a list": (
        lambda f: os.truncate(f / "checkpoint.json", 50),
        "checkpoint.json: unreadable",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_one_is_taken(run: RunConfig, damage: str):
    """What is damaged is named, and put aside: it is neither counted nor taken again."""
    do, message = DAMAGE[damage]
    do(folder(run, "step-00000006"))
    start = choose(run)
    assert (start.folder, start.step) == (folder(run, "step-00000003"), 3)
    assert "step-00000006" in start.notes[0]
    assert message in start.notes[0]
    names = sorted(p.name for p in folder(run, ".").iterdir())
    assert names == ["step-00000003", "step-00000006.damaged"]
    assert choose(run).notes == []


def test_a_run_never_starts_anew_by_itself(run: RunConfig):
    for name in ("step-00000003", "step-00000006"):
        flip_a_bit(folder(run, name) / "model.safetensors")
    with pytest.raises(InputError, match=r"every checkpoint is damaged .*step-00000006.*sha256"):
        choose(run)
    names = sorted(p.name for p in folder(run, ".").iterdir())
    assert names == ["step-00000003", "step-00000006"]


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run: RunConfig, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(run.training.run_dir, other)
    flip_a_bit(other / "checkpoints/step-00000006/model.safetensors")
    shutil.rmtree(run.training.run_dir)
    with pytest.raises(checkpoint.DamagedError, match="sha256"):
        choose(run, str(other))


def test_what_changed_is_said_and_what_must_not_is_refused(run: RunConfig):
    start = choose(run, zero_stage=3, world_size=4, seed=5)
    assert start.notes == [
        "warning: zero_stage was 1, now it is 3: losses differ by rounding",
        "warning: world_size was 1, now it is 4: losses differ by rounding",
    ]
    with pytest.raises(InputError, match="seed was 5, now it is 6"):
        choose(run, seed=6)


def test_an_older_format_is_refused_by_its_number(run: RunConfig):
    path = folder(run, "step-00000006") / "checkpoint.json"
    state = json.loads(path.read_text()) | {"format_version": 2}
    del state["sha256"]
    path.write_text(json.dumps(state))
    with pytest.raises(InputError, match="format_version 2; this code resumes from 3"):
        choose(run)


def test_no_flipped_bit_of_the_description_goes_unseen(run: RunConfig):
    path = folder(run, "step-00000006") / "checkpoint.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(bytes(damaged))
        try:
            found = json.loads(bytes(damaged))
        except ValueError:
            found = None
        if found == json.loads(whole):  # white space
            continue
        with pytest.raises(checkpoint.DamagedError, match=r"checkpoint\.json"):
            checkpoint.read_state(path.parent)
    path.write_bytes(whole)
    assert choose(run).step == 6


def test_a_step_that_is_damaged_twice_is_put_aside_twice(run: RunConfig):
    newest = folder(run, "step-00000006")
    kept = newest.with_name("copy")
    shutil.copytree(newest, kept)
    for name in ("step-00000006.damaged", "step-00000006.damaged2"):
        (newest / "model.safetensors").unlink()
        assert choose(run).step == 3
        assert (newest.parent / name).is_dir()
        shutil.copytree(kept, newest)


def test_never_and_new_folders(run: RunConfig, tmp_path: Path):
    with pytest.raises(InputError, match=r"resume: never, but .* holds a run .*step-00000006"):
        choose(run, "never")
    fresh = dataclasses.replace(run.training, run_dir=str(tmp_path / "fresh"))
    for choice in ("never", "auto"):
        assert choose(dataclasses.replace(run, training=fresh), choice) == resume.Start()


def test_counts_come_back(run: RunConfig):
    start = choose(run)
    assert (start.step, start.optimizer_steps, start.skipped_steps) == (6, 6, 0)


def test_a_checkpoint_holds_no_pickle(run: RunConfig):
    names = {p.name for p in folder(run, "step-00000006").iterdir()}
    assert names == {
        "checkpoint.json", "model.json", "model.safetensors", "optimizer.safetensors",
        "tokenizer.model",
    }  # fmt: skip


def test_a_run_goes_on_from_the_one_before_a_damaged_one(runs: Runs, trained: Path):
    """The whole job: the warning is in the log, and the steps are there once."""
    run_dir = runs.folder / "run"
    shutil.copytree(trained, run_dir)
    flip_a_bit(run_dir / "checkpoints/step-00000006/optimizer.safetensors")
    out, _ = runs.train(runs.config(training__max_steps=7, training__validate_every=0))
    assert "warning" in out
    assert "step-00000003" in out
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert checkpoint.newest(run_dir).name == "step-00000007"
