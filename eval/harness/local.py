"""Our task files: tasks of lm-evaluation-harness over JSONL in a folder of the user's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from data.errors import InputError
from data.text_files import COMPRESSIONS, decoded_lines, open_bytes

TASKS = Path(__file__).parent / "tasks"
# Of several files in a task's folder the first of these that one is named after is taken.
SPLITS = ("test", "validation", "dev", "")


def names() -> list[str]:
    """The tasks that read local files."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def load(name: str, folder: Path) -> dict[str, Any]:
    """A task with the file FOLDER/NAME/*.jsonl (also compressed) as its only split.

    InputError where the file is missing, or its first line lacks a field.
    """
    task: dict[str, Any] = yaml.safe_load((TASKS / f"{name}.yaml").read_text())
    file = _file(name, folder / name)
    fields = task["metadata"]["fields"]
    first = next(_lines(file), {})
    missing = [field for field in fields if field not in first]
    if missing:
        raise InputError(
            f"{file}: line 1 has no {', '.join(missing)}; task {name} needs {', '.join(fields)} "
            f"({TASKS.name}/{name}.yaml says what they hold)"
        )

    def read(**_: Any) -> dict[str, Dataset]:
        return {"test": Dataset.from_list([{f: row[f] for f in fields} for row in _lines(file)])}

    task["custom_dataset"] = read  # lm-eval's own reader would keep a copy in a cache
    return task


def _file(name: str, folder: Path) -> Path:
    endings = [f".jsonl{compression}" for compression in ("", *COMPRESSIONS)]
    there = sorted(
        path for path in folder.glob("*") if any(path.name.endswith(end) for end in endings)
    )
    for split in SPLITS:
        for path in there:
            if path.name.startswith(split):
                return path
    raise InputError(
        f"{folder}: no .jsonl file in it for task {name}; allowed endings are {' '.join(endings)}"
    )


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file. InputError on a line that is none."""
    with open_bytes(file) as opened:
        for number, line in decoded_lines(opened, file):
            try:
                found = json.loads(line)
            except ValueError as error:
                raise InputError(f"{file}: line {number} is not JSON ({error})") from None
            if not isinstance(found, dict):
                raise InputError(f"{file}: line {number} is not a JSON object")
            yield found
