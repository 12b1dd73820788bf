"""TuneConfig: what the YAML of python -m eval.finetune says, and its validation."""

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from data.errors import InputError
from eval.finetune.blocks import SparsityConfig, TextConfig, TuningConfig
from model.delta import METHODS, SoraConfig, config_from_dict
from model.delta.base import check_type
from model.delta.methods import SoftPromptConfig
from training.config import CONFIG_FOLDER, DeepSpeedConfig

TUNE_FOLDER = CONFIG_FOLDER / "tune"
BASELINES = ("full", "head")  # what delta.method takes beside the registered methods
PEFT = "peft"


@dataclass
class TuneConfig:
    """Fine-tunes a backbone on tasks, each with several seeds, and scores it.

    Attributes:
        backbone: A run directory (its newest checkpoint), a checkpoint's folder, or hf:FOLDER.
        run_dir: Where results go: TASK/seed-N/ in it.
        delta: What is trained: {method: …} with the fields of a method of model.delta, or the
            method "full" (all parameters), "head" (the head alone) or "peft" (with peft_type and
            the fields of peft's configuration).
        start: A delta's folder (such as best/delta of another run) to begin from in place of new
            parameters, with the configuration `delta`; its head is taken where it is of the same
            task. null: new parameters.
        freeze_delta: Train the head alone, on what the delta, new or of `start`, makes of the
            backbone.
        tasks: Names: of GLUE, or of `define`.
        data: A folder with TASK/train.jsonl and TASK/dev.jsonl (.xz, .gz, .bz2, .zst, too), or
            datasets:NAME, of which the task is the configuration.
        define: Tasks of one's own by name; docs/finetuning.md has their fields.
        seeds: Each task is trained once with each.
        texts: How examples become token ids.
        tuning: Optimizer, schedule, validations.
        overrides: For tasks by name, fields of `tuning` that differ.
        sparsity: SoRA's gates.
        deepspeed: What is sharded.
    """

    backbone: str
    run_dir: str
    delta: dict[str, Any]
    tasks: list[str]
    start: str | None = None
    freeze_delta: bool = False
    data: str = "data/glue"
    define: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    texts: TextConfig = field(default_factory=TextConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    overrides: dict[str, Any] = field(default_factory=dict)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=lambda: DeepSpeedConfig(zero_stage=0))

    def __post_init__(self) -> None:
        check_delta(self.delta)
        for name in ("tasks", "seeds"):
            given = getattr(self, name)
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name}: {given}; allowed is at least one, each once")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds: {self.seeds}; allowed are numbers of at least 0")
        for task in self.overrides:
            if task not in self.tasks:
                raise ValueError(f"overrides: {task} is none of tasks {', '.join(self.tasks)}")
            self.tuning_of(task)
        self._check_sparsity()
        if (self.start is not None or self.freeze_delta) and self.delta["method"] not in METHODS:
            name = "start" if self.start is not None else "freeze_delta"
            allowed = ", ".join(sorted(METHODS))
            raise ValueError(f"{name}: with delta.method {self.delta['method']}; {allowed} have it")

    def _check_sparsity(self) -> None:
        if self.sparsity != SparsityConfig() and self.delta["method"] != SoraConfig.method:
            raise ValueError(
                f"sparsity: delta.method {self.delta['method']} has no gates; use sora"
            )
        if self.sparsity != SparsityConfig() and self.freeze_delta:
            raise ValueError(
                "sparsity: freeze_delta is true, and gates of a frozen delta are not trained; "
                "leave one of them out"
            )
        if self.sparsity.l1 and self.deepspeed.zero_stage == 3:
            raise ValueError("sparsity.l1: ZeRO stage 3 takes gates apart; allowed is 0")
        if self.sparsity.prune_every and self.deepspeed.zero_stage:
            raise ValueError(
                f"sparsity.prune_every: {self.sparsity.prune_every} with ZeRO stage "
                f"{self.deepspeed.zero_stage}, whose optimizer holds flat copies; allowed is 0"
            )

    def tuning_of(self, task: str) -> TuningConfig:
        """`tuning` with what `overrides` changes for a task. ValueError on unknown fields."""
        changes = self.overrides.get(task, {})
        known = {one.name for one in dataclasses.fields(TuningConfig)}
        if not isinstance(changes, dict) or set(changes) - known:
            unknown = sorted(map(str, set(changes) - known)) if isinstance(changes, dict) else []
            wrong = ", ".join(unknown)
            raise ValueError(
                f"overrides.{task}: {wrong or changes}; known are {', '.join(sorted(known))}"
            )
        hints = typing.get_type_hints(TuningConfig)
        for key, value in changes.items():
            check_type(f"overrides.{task}.{key}", value, hints[key])
        try:
            return dataclasses.replace(self.tuning, **changes)
        except ValueError as error:
            raise ValueError(f"overrides.{task}: {error}") from None

    def soft_tokens(self) -> int:
        """Positions of the backbone that the delta takes: those of a soft prompt, or of peft's."""
        if self.delta["method"] == PEFT:
            ids = self.delta.get("cpt_token_ids") or []
            return int(self.delta.get("num_virtual_tokens") or len(ids))
        if METHODS.get(self.delta["method"]) is not SoftPromptConfig:
            return 0
        config = config_from_dict(self.delta)
        assert isinstance(config, SoftPromptConfig)
        return config.soft_tokens

    def folder(self, task: str, seed: int) -> Path:
        """Of one run."""
        return Path(self.run_dir) / task / f"seed-{seed}"

    def to_yaml(self) -> str:
        """The resolved configuration; --config reads it back to an equal one."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def check_delta(delta: dict[str, Any]) -> None:
    """ValueError where a block `delta` names no method, or has what its method lacks."""
    method = delta.get("method")
    if not isinstance(method, str):
        raise ValueError(f"delta.method: {method!r}; a name is expected")
    if method in BASELINES:
        if len(delta) > 1:
            rest = ", ".join(key for key in delta if key != "method")
            raise ValueError(f"delta: {rest}; method {method} takes no other field")
    elif method == PEFT:
        if not isinstance(delta.get("peft_type"), str):
            raise ValueError("delta.peft_type: the name of one of peft's types is missing")
        for key, hint in (("num_virtual_tokens", int), ("cpt_token_ids", list[int])):
            if delta.get(key) is not None:
                check_type(f"delta.{key}", delta[key], hint)
        if int(delta.get("num_virtual_tokens") or 1) < 1:
            tokens = delta["num_virtual_tokens"]
            raise ValueError(f"delta.num_virtual_tokens: {tokens}; allowed is at least 1")
    elif method in METHODS:
        try:
            config_from_dict(delta)
        except ValueError as error:
            raise ValueError(f"delta.{error}") from None
    else:
        allowed = (*sorted(METHODS), *BASELINES, PEFT)
        raise ValueError(f"delta.method: {method!r}; allowed are {', '.join(allowed)}")


def fail_as_input(error: Exception) -> InputError:
    """An error about what the user gave, as one line."""
    return InputError(" ".join(str(error).split()))
