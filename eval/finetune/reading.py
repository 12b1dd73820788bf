"""Examples of a task from JSONL files or `datasets`, and the split protocol."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from data.errors import InputError
from data.text_files import COMPRESSIONS, decoded_lines, open_bytes
from eval.finetune.tasks import Task

DATASETS = "datasets:"  # what `data` begins with that is no folder
SPLIT_SEED = 42
VAL_FROM_TRAIN = 1000
# What `datasets` calls a split; of MNLI the dev set of the genres that are trained on.
_HUB_NAMES: dict[str | tuple[str, str], str] = {
    "dev": "validation",
    ("mnli", "dev"): "validation_matched",
}


@dataclass(frozen=True)
class Example:
    """An example: its text, or two, or a prompt; a class, a number, or the text to be written."""

    texts: tuple[str, ...]
    label: int | float | str


@dataclass
class Splits:
    """What is trained on, what selects, and what is reported."""

    train: list[Example]
    val: list[Example]
    test: list[Example]


@lru_cache(maxsize=4)  # the seeds of a task share it
def read_splits(task: Task, data: str) -> Splits:
    """The splits of a task. InputError, with file and line, where examples are missing or wrong."""
    train, dev = read(task, data, "train"), read(task, data, "dev")
    if task.split == "given":
        return Splits(train, dev, read(task, data, "test"))
    if task.split == "from_train":
        if len(train) <= VAL_FROM_TRAIN:
            raise InputError(
                f"{data}: {task.name} has {len(train)} training examples, of which "
                f"{VAL_FROM_TRAIN} become val; more are needed"
            )
        order = permutation(len(train))
        val = [train[i] for i in order[:VAL_FROM_TRAIN]]
        return Splits([train[i] for i in order[VAL_FROM_TRAIN:]], val, dev)
    if len(dev) < 2:
        raise InputError(
            f"{data}: {task.name} has {len(dev)} example in dev; at least 2 are needed"
        )
    order, half = permutation(len(dev)), len(dev) // 2
    return Splits(train, [dev[i] for i in order[:half]], [dev[i] for i in order[half:]])


def permutation(count: int) -> list[int]:
    """The order by which splits are cut, SoRA's: torch's randperm with the seed 42."""
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    return [int(i) for i in torch.randperm(count, generator=generator)]


def read(task: Task, data: str, split: str) -> list[Example]:
    """All examples of a file train, dev or test."""
    if data.startswith(DATASETS):
        rows = _from_datasets(data.removeprefix(DATASETS), task, split)
        where = f"{data}, {task.name}, {split}"
    else:
        path = find_file(Path(data), task.name, split)
        rows, where = _from_file(path), str(path)
    examples = [_example(task, row, f"{where}: row {number}") for number, row in rows]
    if not examples:
        raise InputError(f"{where}: it is empty; at least one example is needed")
    return examples


def find_file(folder: Path, task: str, split: str) -> Path:
    """FOLDER/TASK/SPLIT.jsonl, or one file SPLIT_*.jsonl, packed or not; the folder may be TASK_*
    where there is one such. InputError where there is none, or several.
    """
    places = [folder / task] if (folder / task).is_dir() else sorted(folder.glob(f"{task}_*"))
    ends = [".jsonl", *(".jsonl" + packed for packed in COMPRESSIONS)]
    for stem in (split, f"{split}_*"):
        found = sorted(path for place in places for end in ends for path in place.glob(stem + end))
        if len(found) > 1:
            raise InputError(f"{', '.join(map(str, found))}: one file of {task} {split} is allowed")
        if found:
            return found[0]
    raise InputError(
        f"{folder / task}: no file {split}.jsonl in it (or {split}.jsonl.xz, .gz, .bz2, .zst)"
    )


def _from_file(path: Path) -> list[tuple[int, Any]]:
    rows = []
    with open_bytes(path) as file:
        for number, line in decoded_lines(file, path):
            if not line.strip():
                continue
            try:
                rows.append((number, json.loads(line)))
            except ValueError as error:
                raise InputError(f"{path}: row {number} is not JSON ({error})") from None
    return rows


def _from_datasets(name: str, task: Task, split: str) -> list[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        of_hub = _HUB_NAMES.get((task.name, split)) or _HUB_NAMES.get(split, split)
        found = load_dataset(name, task.name, split=of_hub)
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"{DATASETS}{name}: {task.name}, {split}: cannot be loaded ({text})"
        ) from None
    return list(enumerate(found, start=1))


def _example(task: Task, row: Any, where: str) -> Example:
    if not isinstance(row, dict):
        raise InputError(f"{where} is {type(row).__name__}; an object with columns is expected")
    columns = task.prompt_columns if task.kind == "lm" else task.columns
    for column in (*columns, task.label):
        if column not in row:
            raise InputError(f"{where} has no column {column}; it has {', '.join(map(str, row))}")
    for column in columns:
        if not isinstance(row[column], str):
            raise InputError(f"{where}: {column} is {row[column]!r}; a text is expected")
    label = _label(task, row[task.label], f"{where}: {task.label}")
    if task.kind == "lm":
        return Example((task.prompt.format(**{name: row[name] for name in columns}),), label)
    return Example(tuple(row[column] for column in columns), label)


def _label(task: Task, value: Any, where: str) -> int | float | str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if task.kind == "lm":
        if isinstance(value, str) and value:
            return value
        raise InputError(f"{where} is {value!r}; a text that is not empty is expected")
    if task.kind == "regression":
        if number and math.isfinite(value):
            return float(value)
        raise InputError(f"{where} is {value!r}; a finite number is expected")
    if number and math.isfinite(value) and value == int(value) and 0 <= value < task.classes:
        return int(value)
    raise InputError(f"{where} is {value!r}; allowed are classes 0 to {task.classes - 1}")
