"""What the starts came to: JSON, and a table in Markdown."""

from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from eval.finetune.ensemble.config import BEST, HEAD, TUNED, EnsembleConfig
from eval.finetune.ensemble.work import Work
from eval.finetune.results import RESULT, mean_sd, read_result
from eval.finetune.table import HEADLINES


def report(config: EnsembleConfig, every: Sequence[Work]) -> dict[str, Any]:
    """Of finished work: for each task and start both metrics over seeds; scores and weights."""
    tasks: dict[str, Any] = {}
    for task in dict.fromkeys(work.task for work in every):
        mine = [work for work in every if work.task == task]
        first = read_result(mine[0].result_folder(config.starts[0], TUNED) / RESULT)
        tasks[task] = {
            "metric": first["metric"],
            "examples": first["examples"],
            "sources": {name: one.mark for name, one in mine[0].sources.items()},
            "starts": {arm: _start(mine, arm) for arm in config.starts},
            "seeds": {str(work.seed): _scores(work) for work in mine},
        }
    return tasks


def _start(mine: Sequence[Work], arm: str) -> dict[str, Any]:
    """Test metrics of a start, with the head alone trained and after tuning, over seeds."""
    values = {phase: [_test(work, arm, phase) for work in mine] for phase in (HEAD, TUNED)}
    return {phase: mean_sd(found) for phase, found in values.items()}


def _test(work: Work, arm: str, phase: str) -> float:
    if arm == BEST and phase == HEAD:  # its head is that of the source it is
        arm = f"source-{work.best()}"
    result = read_result(work.result_folder(arm, phase) / RESULT)
    return float(result["test"][result["metric"]])


def _scores(work: Work) -> dict[str, Any]:
    if not (work.folder / "scores.json").exists():  # nothing but fresh was asked for
        return {}
    found = work.scores()
    return {key: found[key] for key in ("scores", "weights", "best")}


def table(tasks: dict[str, Any], config: EnsembleConfig) -> str:
    """Markdown: a row for each start, for each task the metric with the head alone and tuned."""
    names = [
        f"{task} ({HEADLINES.get(one['metric'], one['metric'])})" for task, one in tasks.items()
    ]
    header = ["start", *(f"{name}, {phase}" for name in names for phase in (HEAD, TUNED))]
    header += [f"mean, {phase}" for phase in (HEAD, TUNED)]
    body = []
    for arm in config.starts:
        cells = [one["starts"][arm][phase] for one in tasks.values() for phase in (HEAD, TUNED)]
        means = [sum(one["mean"] for one in cells[at::2]) / len(tasks) for at in (0, 1)]
        body.append([arm, *map(_cell, cells), *(f"{100 * mean:.1f}" for mean in means)])
    aligned = ("left", *["right"] * (len(header) - 1))
    text = tabulate(body, header, tablefmt="pipe", colalign=aligned, disable_numparse=True)
    return (
        f"{text}\n\nMetrics on test in %, mean ± standard deviation, seeds: {len(config.seeds)}. "
        f"{HEAD}: {config.head_steps} steps of the head alone, the start frozen. {TUNED}: "
        f"{config.steps} more of delta and head. Training examples at most "
        f"{config.train_examples}, in batches of {config.batch_size}; temperature "
        f"{config.temperature:g}.\n"
    )


def _cell(found: dict[str, Any]) -> str:
    deviation = "" if found["sd"] is None else f" ± {100 * found['sd']:.1f}"
    return f"{100 * found['mean']:.1f}{deviation}"
