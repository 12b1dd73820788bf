"""Reads what train.py left in a run directory."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from data.command_line import parse_options
from data.errors import InputError
from eval.compare.names import arm_names
from training.config import RunConfig

# Settings of `training` and `data` in which the runs of an arm may differ: they change what is
# reported and kept, never what is trained.
NO_EFFECT = {
    "training.run_dir", "training.log_every", "training.untimed_steps", "training.gc_every",
    "training.validate_every", "training.eval_micro_batch_size", "training.checkpoint_every",
    "training.keep_checkpoints", "training.keep_every", "training.async_checkpoint",
    "training.resume", "data.verify",
}  # fmt: skip
REQUIRED = ("config.yaml", "environment.json", "metrics.jsonl", "status.json")


class ValidationPoint(NamedTuple):
    """One validation: after `step` steps and `tokens` tokens; None where it was not finite."""

    step: int
    tokens: int
    loss: float | None  # nats/token
    bits_per_byte: float | None


@dataclass(frozen=True)
class Run:
    """A run directory of train.py.

    Attributes:
        path: The run directory.
        config: config.yaml, resolved.
        environment: environment.json: commit, versions, hardware.
        metrics: The objects of metrics.jsonl, one a logged step, steps rising.
        status: status.json.
        final: final.json, the score of the final split; None before the end of the run.
        throughput: throughput.json; None before the end of the run.
        checkpoint: checkpoint.json of the newest checkpoint, for the sums of data and tokenizer;
            None where there is none.
    """

    path: Path
    config: RunConfig
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    status: dict[str, Any]
    final: dict[str, Any] | None
    throughput: dict[str, Any] | None
    checkpoint: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        """training.seed."""
        return self.config.training.seed

    @property
    def completed(self) -> bool:
        """Whether training went to its last step and the final split was scored."""
        return bool(self.status["state"] == "completed")

    @property
    def steps(self) -> list[int]:
        """Optimizer steps done at each logged step."""
        return [record["step"] for record in self.metrics]

    @property
    def tokens(self) -> list[int]:
        """Training tokens read at each logged step."""
        return [record["tokens"] for record in self.metrics]

    @property
    def losses(self) -> list[float | None]:
        """Training loss of each logged step in nats/token; None where it was not finite."""
        return [record["loss"] for record in self.metrics]

    @property
    def validation_points(self) -> list[ValidationPoint]:
        """Every validation after a step; train.py logs the one before training elsewhere."""
        return [
            ValidationPoint(
                record["step"],
                record["tokens"],
                record["validation_loss"],
                record.get("validation_bits_per_byte"),
            )
            for record in self.metrics
            if "validation_loss" in record
        ]

    @cached_property
    def training_seconds(self) -> list[float]:
        """Seconds of training up to each logged step: the sum of seconds_per_step × steps since the
        logged step before. Validations and waiting for saves are not in them, compilation is.
        """
        total, before, found = 0.0, 0, []
        for record in self.metrics:
            total += record["seconds_per_step"] * (record["step"] - before)
            before = record["step"]
            found.append(total)
        return found

    @property
    def flops_per_token(self) -> float:
        """FLOPs of a forward pass per token (ModelConfig.flops_per_token)."""
        return self.config.model.flops_per_token(self.config.training.seq_len)

    @property
    def training_flops(self) -> list[float]:
        """FLOPs up to each logged step: 3 × forward × tokens."""
        return [3 * self.flops_per_token * tokens for tokens in self.tokens]

    @property
    def last_validation_loss(self) -> float | None:
        """Loss of the last validation in nats/token; None where there is none or not finite."""
        points = self.validation_points
        return points[-1].loss if points else None

    @property
    def diverged(self) -> bool:
        """Whether the run ended not finite, worse than it began, or dead.

        True where train.py stopped because steps stayed without a finite loss or gradient, and of a
        completed run whose newest loss (the final score, else a validation after the last logged
        step, else that step's training loss) is not finite, is over both the first training loss
        and that of guessing uniformly, ln(vocab_size), or is the latter to 0.001, as weights that
        have died give it. A run that ended for another reason, such as a full disk, has not
        diverged, whatever its losses.
        """
        if self.status["state"] == "failed":
            return "not finite" in str(self.status.get("message"))
        if not self.completed:
            return False
        last = self.metrics[-1]
        newest = last.get("validation_loss", last["loss"])
        if self.final is not None:
            newest = self.final["loss_nats_per_token"]
        if newest is None or not math.isfinite(newest):
            return True
        guessing = math.log(self.config.model.vocab_size)
        return newest > max(self.losses[0] or 0.0, guessing) or abs(newest - guessing) < 1e-3

    @property
    def data_sha256(self) -> str | None:
        """The sum of the training split; None where no checkpoint says it."""
        return self.checkpoint.get("data_sha256") if self.checkpoint else None

    @property
    def tokenizer_sha256(self) -> str | None:
        """The sum of the tokenizer; None where no checkpoint says it."""
        return self.checkpoint.get("tokenizer_sha256") if self.checkpoint else None


def read_run(path: Path) -> Run:
    """A run directory. InputError, in one line, for what is none, and for a file that is empty,
    broken or not of train.py. A torn last line of metrics.jsonl is left out.
    """
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; a run directory of train.py is expected")
    for name in REQUIRED:
        if not (path / name).is_file():
            raise InputError(f"{path}: not a run directory of train.py: it has no {name}")
    config, _ = parse_options(
        RunConfig, ["--config", str(path / "config.yaml")], prog="eval.compare", description=""
    )
    status = _read_object(path / "status.json")
    if not isinstance(status.get("state"), str):
        raise InputError(f"{path / 'status.json'}: has no state")
    return Run(
        path=path,
        config=config,
        environment=_read_object(path / "environment.json"),
        metrics=_read_metrics(path / "metrics.jsonl"),
        status=status,
        final=_optional(path / "final.json", "loss_nats_per_token"),
        throughput=_optional(path / "throughput.json", "tokens_per_second"),
        checkpoint=_newest_checkpoint(path),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: a JSON object is expected, found {type(found).__name__}")
    return found


def _optional(path: Path, key: str) -> dict[str, Any] | None:
    """A file that a run may lack, with a number under this key."""
    if not path.exists():
        return None
    found = _read_object(path)
    if not isinstance(found.get(key), int | float):
        raise InputError(f"{path}: {key} is {found.get(key)!r}; a number is expected")
    return found


def _newest_checkpoint(path: Path) -> dict[str, Any] | None:
    # Not training.checkpoint, which imports DeepSpeed. Names have the step in eight digits or more.
    found = sorted(
        path.glob("checkpoints/step-*/checkpoint.json"),
        key=lambda file: (len(file.parent.name), file.parent.name),
    )
    whole = [file for file in found if file.parent.name.removeprefix("step-").isdigit()]
    return _read_object(whole[-1]) if whole else None


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # the process was killed while it wrote
                break
            raise InputError(f"{path}, line {number}: not valid JSON") from None
        _check_record(record, f"{path}, line {number}", records)
        records.append(record)
    if not records:
        raise InputError(f"{path}: has no logged step yet")
    return records


def _check_record(record: Any, where: str, before: list[dict[str, Any]]) -> None:
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON object is expected, found {type(record).__name__}")
    for key in ("step", "tokens", "seconds_per_step"):
        value = record.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: {key} is {value!r}; a number is expected")
    for key in ("loss", *(["validation_loss"] if "validation_loss" in record else [])):
        if not isinstance(record.get(key, ""), int | float | None):
            raise InputError(f"{where}: {key} is {record.get(key)!r}; a number or null is expected")
    if before and record["step"] <= before[-1]["step"]:
        raise InputError(
            f"{where}: step {record['step']} comes after step {before[-1]['step']}; steps must rise"
        )


def settings(run: Run) -> dict[str, Any]:
    """The configuration under dotted keys, without the seed and what has no effect on the result.

    model.r is written out, a rank for each kind of projection. data.path is the folder's name.
    """
    nested = dataclasses.asdict(run.config)
    nested["model"]["r"] = dataclasses.asdict(run.config.model.ranks)
    found = _flat(nested)
    found["data.path"] = Path(run.config.data.path).name
    return {k: v for k, v in found.items() if k not in NO_EFFECT | {"training.seed"}}


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in nested.items():
        name = prefix + key
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def difference(a: Run, b: Run) -> str | None:
    """What keeps two runs from being of one arm, in words; None where nothing does.

    Data are the same by their sums where both are known, else by the name of their folder.
    """
    left, right = settings(a), settings(b)
    sums = [(run.data_sha256, run.tokenizer_sha256) for run in (a, b)]
    if all(data is not None for data, _ in sums):
        left["data.path"], right["data.path"] = sums
    for key in {**left, **right}:
        if left.get(key) != right.get(key):
            return f"{key} is {left.get(key)} and {right.get(key)}"
    return None


def group(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by arm: those whose settings differ in the seed alone. Arms come in the order of their
    first run, named after the folders of their runs.
    """
    arms: list[list[Run]] = []
    for run in runs:
        mine = next((arm for arm in arms if difference(arm[0], run) is None), None)
        if mine is None:
            arms.append([run])
        else:
            mine.append(run)
    names = arm_names([[(run.path, run.seed) for run in arm] for arm in arms])
    return dict(zip(names, arms, strict=True))
