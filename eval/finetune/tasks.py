"""Tasks: their columns, labels, metrics and splits. GLUE's, and those that a YAML defines."""

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from model.delta.base import check_type

Kind = Literal["classification", "regression", "lm"]
Split = Literal["halve_dev", "from_train", "given"]

METRICS: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "lm": ("exact_match", "rouge1", "rouge2", "rougeL", "bleu"),
}


@dataclass(frozen=True)
class Task:
    """What is read, predicted and measured.

    Attributes:
        name: Its name, which is its folder's.
        kind: "classification", "regression" or "lm" (a text that is written behind a prompt).
        columns: Columns of a JSON line with the text, or the two of a pair.
        label: Column of the label: a class 0 … classes - 1, a number, or the text to be written.
        classes: Number of classes.
        metrics: Metrics that are reported; the first one selects the best state.
        split: "halve_dev" (half of dev is val, half is test), "from_train" (1,000 examples of train
            are val, dev is test) or "given" (dev is val, a file test is test).
        prompt: Of an lm task: a text with columns in braces, such as "{question} Answer: ".
        max_new_tokens: Of an lm task: tokens that are generated at most.
    """

    name: str
    kind: Kind
    columns: tuple[str, ...] = ("sentence",)
    label: str = "label"
    classes: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    split: Split = "halve_dev"
    prompt: str = ""
    max_new_tokens: int = 32

    @property
    def outputs(self) -> int:
        """Width of the head."""
        return self.classes if self.kind == "classification" else 1

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that the prompt names. ValueError where it is no text with {COLUMN} parts."""
        found = []
        for _, name, spec, conversion in Formatter().parse(self.prompt):
            if name is None:
                continue
            if not name or name.isdigit() or set(name) & set(".[]") or spec or conversion:
                raise ValueError("the name of a column, and nothing else, is expected in braces")
            found.append(name)
        return tuple(dict.fromkeys(found))


PAIR = ("sentence1", "sentence2")
# Metrics in SoRA's order of choice: MRPC by F1, STS-B by Pearson, QQP by accuracy.
GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", "classification", metrics=("matthews", "accuracy")),
        Task("sst2", "classification", split="from_train"),
        Task("mrpc", "classification", PAIR, metrics=("f1", "accuracy")),
        Task(
            "qqp",
            "classification",
            ("question1", "question2"),
            metrics=("accuracy", "f1"),
            split="from_train",
        ),
        Task("stsb", "regression", PAIR, metrics=("pearson", "spearman")),
        Task("mnli", "classification", ("premise", "hypothesis"), classes=3),
        Task("qnli", "classification", ("question", "sentence"), split="from_train"),
        Task("rte", "classification", PAIR),
        Task("wnli", "classification", PAIR),
    )
}


@dataclass
class _Definition:
    """What a YAML says of a task of its own."""

    kind: Kind = "classification"
    columns: list[str] = field(default_factory=lambda: ["sentence"])
    label: str = "label"
    classes: int = 2
    metrics: list[str] = field(default_factory=list)
    split: Split = "halve_dev"
    prompt: str = ""
    max_new_tokens: int = 32


def find_task(name: str, defined: Mapping[str, Any]) -> Task:
    """A task by its name. ValueError where there is none, or its definition is wrong."""
    if name in defined:
        return _define(name, defined[name])
    if name not in GLUE:
        known = ", ".join([*GLUE, *defined])
        raise ValueError(f"tasks: {name!r}; known are {known}, and what `define` adds")
    return GLUE[name]


def _define(name: str, fields: Any) -> Task:
    where = f"define.{name}"
    known = [one.name for one in dataclasses.fields(_Definition)]
    if not isinstance(fields, dict) or set(fields) - set(known):
        unknown = sorted(map(str, set(fields) - set(known))) if isinstance(fields, dict) else []
        wrong = ", ".join(unknown) or fields
        raise ValueError(f"{where}: {wrong}; known are {', '.join(known)}")
    hints = typing.get_type_hints(_Definition)
    for key, value in fields.items():
        check_type(f"{where}.{key}", value, hints[key])
    one = _Definition(**fields)
    metrics = one.metrics or {"lm": ["exact_match"], "regression": ["pearson"]}.get(
        one.kind, ["accuracy"]
    )
    allowed = METRICS[one.kind]
    _require(where, "metrics", metrics, set(metrics) <= set(allowed), ", ".join(allowed))
    _require(where, "columns", one.columns, 1 <= len(one.columns) <= 2, "one or two names")
    _require(where, "classes", one.classes, one.classes >= 2, "at least 2")
    if "f1" in metrics or one.kind != "classification":
        _require(where, "classes", one.classes, one.classes == 2, "2, for F1 and without classes")
    _require(where, "max_new_tokens", one.max_new_tokens, one.max_new_tokens >= 1, "at least 1")
    task = Task(
        name, one.kind, tuple(one.columns), one.label, one.classes, tuple(metrics), one.split,
        one.prompt, one.max_new_tokens,
    )  # fmt: skip
    try:
        columns = task.prompt_columns
    except ValueError as error:
        raise ValueError(
            f"{where}.prompt: {one.prompt!r}: {error}; a brace of the text itself is doubled"
        ) from None
    allowed_prompt = "a text with a {COLUMN}"
    _require(where, "prompt", one.prompt, one.kind != "lm" or len(columns) > 0, allowed_prompt)
    return task


def _require(where: str, name: str, value: Any, valid: bool, allowed: str) -> None:
    if not valid:
        raise ValueError(f"{where}.{name}: {value!r}; allowed is {allowed}")
