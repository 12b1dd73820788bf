"""Finished runs of eval.finetune as sources: one a task, all of one backbone and one LoRA."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from data.command_line import parse_options
from data.errors import InputError
from eval.finetune.attach import start_mark
from eval.finetune.config import TuneConfig
from eval.finetune.results import RESULT, read_result
from eval.finetune.tasks import find_task
from model.delta import LoraConfig

RETIRED = ("save_best",)


@dataclass(frozen=True)
class Source:
    """A finished run.

    Attributes:
        task: Its task.
        folder: RUN_DIR/TASK/seed-N.
        config: How it was trained.
        delta: The folder of its trained delta.
        mark: sha256 of the delta's tensors.
        result: Its result.json.
    """

    task: str
    folder: Path
    config: TuneConfig
    delta: Path
    mark: str
    result: dict[str, Any]


def read_sources(folders: Sequence[str], seed: int | None) -> dict[str, Source]:
    """A source for each task that the run directories have. InputError where there are less than
    two, or they are not of one backbone and one LoRA.
    """
    found: dict[str, Source] = {}
    for folder in folders:
        for place in sorted(one for one in Path(folder).glob("*") if one.is_dir()):
            path = _run_of(place, seed)
            if path is None:
                continue
            source = _read(path)
            if source.task in found:
                where = found[source.task].folder
                raise InputError(f"{path}: {source.task} is in {where} too; one is allowed")
            found[source.task] = source
    if len(found) < 2:
        at = f" with seed {seed}" if seed is not None else ""
        raise InputError(
            f"{', '.join(folders)}: finished runs of {len(found)} tasks{at} "
            f"(TASK/seed-N/{RESULT}); at least two are needed"
        )
    _require_alike(list(found.values()))
    return found


def _run_of(place: Path, seed: int | None) -> Path | None:
    """The run of a task's folder that is asked for, if it is over; null: of the smallest seed."""
    runs = {
        int(path.parent.name.removeprefix("seed-")): path.parent
        for path in place.glob(f"seed-*/{RESULT}")
        if path.parent.name.removeprefix("seed-").isdigit()
    }
    return runs.get(min(runs, default=-1) if seed is None else seed)


def _options(path: Path) -> list[str]:
    """A run's config.yaml as options, without the keys that older runs had and none has now."""
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(fields, dict):
        raise InputError(f"{path}: it holds no keys")
    kept = {key: value for key, value in fields.items() if key not in RETIRED}
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in kept.items()
        if value is not None
    ]


def _read(folder: Path) -> Source:
    result = read_result(folder / RESULT)
    path = folder / "config.yaml"
    config, _ = parse_options(TuneConfig, _options(path), prog="ensemble", description="")
    if config.delta["method"] != LoraConfig.method:
        raise InputError(f"{path}: delta.method {config.delta['method']}; allowed is lora")
    task = str(result["task"])
    if find_task(task, config.define).kind == "lm":
        raise InputError(f"{path}: {task} writes texts; allowed are tasks with a head")
    delta = folder / "best" / "delta"
    mark = start_mark(str(delta))
    assert mark is not None
    return Source(task, folder, config, delta, mark, result)


def _require_alike(sources: list[Source]) -> None:
    """InputError where sources cannot be averaged, or do not read texts alike."""
    first, *others = sources
    for other in others:
        pairs = {
            "delta": (first.config.delta, other.config.delta),
            "texts": (first.config.texts, other.config.texts),
            "backbone_fingerprint": tuple(
                one.result["identity"]["backbone_fingerprint"] for one in (first, other)
            ),
        }
        for key, (a, b) in pairs.items():
            if a != b:
                raise InputError(f"{other.folder}: {key} is {b}, that of {first.folder} is {a}")
