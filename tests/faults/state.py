"""What a run directory holds after a fault, judged without the code under test."""

import hashlib
import json
from pathlib import Path
from typing import Any

SAME = ("step", "loss", "grad_norm", "lr", "tokens", "skipped_steps")


def checkpoints(run_dir: Path) -> dict[int, Path]:
    """Folders that are named as complete checkpoints, by their step."""
    found = (run_dir / "checkpoints").glob("step-*")
    return {int(p.name[5:]): p for p in sorted(found) if p.name[5:].isdigit()}


def is_whole(folder: Path) -> bool:
    """Whether every file has the size and the sha256 sum that checkpoint.json gives it."""
    try:
        files = json.loads((folder / "checkpoint.json").read_text())["files"]
        return {"model.safetensors", "optimizer.safetensors", "model.json", "tokenizer.model"} == {
            *files
        } and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == written["sha256"]
            and (folder / name).stat().st_size == written["bytes"]
            for name, written in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def assert_all_whole(run_dir: Path, at_least: set[int] | dict[int, Path]) -> dict[int, Path]:
    """Every folder with a checkpoint's name is whole, those of the steps `at_least` among them."""
    found = checkpoints(run_dir)
    assert {*at_least} <= {*found}, f"lost: {sorted({*at_least} - {*found})}"
    for folder in found.values():
        assert is_whole(folder), f"{folder} is not whole"
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The values of each step that must repeat, in the order of the file."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{key: json.loads(line)[key] for key in SAME} for line in lines]


def assert_same_run(run_dir: Path, undisturbed: Path) -> None:
    """Each step is there once, with the numbers of a run that nothing befell, bit for bit; so are
    the weights and the moments of the last checkpoint.
    """
    assert metrics(run_dir) == metrics(undisturbed)
    last, expected = max(checkpoints(run_dir).items()), max(checkpoints(undisturbed).items())
    assert last[0] == expected[0]
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (last[1] / name).read_bytes() == (expected[1] / name).read_bytes(), name
