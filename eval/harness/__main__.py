"""Tasks of lm-evaluation-harness on a model.

    python -m eval.harness --checkpoint RUN --tasks blimp sciq --task_data DIR --output o.json

Tasks named after a file in eval/harness/tasks read JSONL from --task_data and need no network; any
other name is one of lm-eval's own tasks, which takes its data from the hub.
"""

import json
import logging
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tabulate import tabulate

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from eval.harness import local
from eval.models import load
from eval.perplexity import DTYPES
from model.execution import Execution
from training import distributed


@dataclass
class HarnessConfig:
    """Tasks of lm-evaluation-harness on a model.

    Attributes:
        checkpoint: A run directory (its newest checkpoint), a checkpoint's folder, or hf: and the
            name or folder of a causal language model of Hugging Face.
        tasks: Names of tasks; null: all local ones that task_data has a folder for.
        task_data: A folder with a folder of JSONL for each local task; null: lm-eval's own tasks.
        num_fewshot: Examples before each question; null: what the task says.
        limit: Questions of each task to ask at most; null: all.
        batch_size: Texts in one forward pass.
        max_length: Tokens of context and continuation; null: the model's max_seq_len.
        cache: An SQLite file that remembers log-likelihoods; null: none. It knows texts and not
            models: use one for each checkpoint and precision.
        bootstrap_iters: Resamples for the standard errors of metrics that have no formula.
        precision: "fp32" or "bf16" weights and activations.
        device: "auto" (the GPU where there is one), "cpu" or "cuda".
        execution: Kernels, attention and compilation, as in a run's YAML.
        output: A JSON file for the result.
    """

    checkpoint: str
    tasks: list[str] | None = None
    task_data: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 16
    max_length: int | None = None
    cache: str | None = None
    bootstrap_iters: int = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    execution: Execution = field(default_factory=Execution)
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: {value}; it must be at least 1")
        if self.tasks is None and self.task_data is None:
            raise ValueError("--tasks: name at least one task, or give --task_data")


def find_tasks(config: HarnessConfig) -> list[str | dict[str, Any]]:
    """The tasks as lm-eval takes them: its own by name, ours as dictionaries."""
    ours = local.names()
    folder = Path(config.task_data) if config.task_data is not None else None
    if folder is not None and not folder.is_dir():
        raise InputError(f"--task_data {folder}: no such folder")
    wanted = config.tasks
    if wanted is None:
        assert folder is not None
        wanted = [name for name in ours if (folder / name).is_dir()]
        if not wanted:
            raise InputError(f"--task_data {folder}: has a folder for none of {', '.join(ours)}")
    return [
        local.load(name, folder) if folder is not None and name in ours else name for name in wanted
    ]


def evaluate(config: HarnessConfig) -> dict[str, Any]:
    """Runs the tasks. InputError on a task that lm-eval does not know."""
    if distributed.world_size() > 1:
        raise InputError("eval.harness runs in one process: start it with python, no launcher")
    tasks = find_tasks(config)
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from eval.harness.adapter import HarnessModel
    except ImportError as error:
        raise InputError(f"lm-eval is missing ({error}); pip install lm-eval") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    device = distributed.evaluation_device(config.device)
    model, _ = load(config.checkpoint, device, DTYPES[config.precision], config.execution)
    length = config.max_length or model.max_seq_len
    if length > model.max_seq_len:
        raise InputError(
            f"--max_length: {length} is over the model's max_seq_len {model.max_seq_len}"
        )
    theirs = [task for task in tasks if isinstance(task, str)]
    manager = TaskManager(include_defaults=bool(theirs))
    unknown = [task for task in theirs if not manager.match_tasks([task])]
    if unknown:
        raise InputError(
            f"--tasks: {', '.join(unknown)}: lm-eval {lm_eval.__version__} has no such task; with "
            f"--task_data the local ones are {', '.join(local.names())}"
        )
    found = lm_eval.simple_evaluate(
        model=HarnessModel(model, config.batch_size, length, device),
        tasks=tasks,
        task_manager=manager,
        num_fewshot=config.num_fewshot,
        limit=config.limit,
        use_cache=config.cache,
        bootstrap_iters=config.bootstrap_iters,
        log_samples=True,
    )
    result: dict[str, Any] = {
        "checkpoint": config.checkpoint,
        **model.about,
        "lm_eval": lm_eval.__version__,
        "precision": config.precision,
        "max_length": length,
        "limit": config.limit,
        "results": {name: _plain(values) for name, values in found["results"].items()},
        "questions": {name: n["effective"] for name, n in found["n-samples"].items()},
        "num_fewshot": found["n-shot"],
    }
    for task in tasks:
        if isinstance(task, dict) and "by" in task["metadata"]:
            samples, key = found["samples"][task["task"]], task["metadata"]["by"]
            result.setdefault("by", {})[task["task"]] = _by(samples, key)
    return result


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's "acc,none" as "acc"; its alias left out."""
    return {key.removesuffix(",none"): v for key, v in values.items() if key != "alias"}


def _by(samples: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Accuracy for each value of a field, such as BLiMP's paradigms."""
    groups: dict[str, list[float]] = defaultdict(list)
    for sample in samples:
        groups[sample["doc"][key]].append(sample["acc"])
    return {name: sum(found) / len(found) for name, found in sorted(groups.items())}


def describe(result: dict[str, Any]) -> str:
    """The table that the command prints."""
    rows = []
    for task, values in result["results"].items():
        for metric, value in values.items():
            if "_stderr" in metric or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr")
            shown = error if isinstance(error, int | float) else None
            rows.append([task, metric, value, shown, result["questions"].get(task)])
    headers = ["task", "metric", "value", "standard error", "questions"]
    return tabulate(rows, headers=headers, floatfmt=".4f", intfmt=",", missingval="-")


def main() -> int:
    """The command."""
    config, _ = parse_options(
        HarnessConfig,
        prog="python -m eval.harness",
        description="Tasks of lm-evaluation-harness on a model.",
    )
    require_folder_of(config.output)
    result = evaluate(config)
    print(describe(result))
    if config.output:
        Path(config.output).write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run_cli(main)
