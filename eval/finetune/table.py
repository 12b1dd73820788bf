"""The table of results, in markdown: methods × tasks.

python -m eval.finetune.table runs/tune/small --output docs/results/small.md

A row is a folder under the given ones that holds TASK/seed-N/result.json, named by its path. Runs
with a schedule of stages have a second table, of what each stage came to. Beside the markdown file
is a .json with the values of all seeds.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from tabulate import tabulate

from data.errors import InputError, require_folder_of, run_cli
from eval.finetune.results import RESULT, over_seeds, read_result

HEADLINES = {
    "matthews": "Matthews", "accuracy": "accuracy", "f1": "F1", "pearson": "Pearson",
    "spearman": "Spearman", "exact_match": "exact match",
}  # fmt: skip


@dataclass
class Row:
    """A method: for each task what its seeds came to together."""

    name: str
    tasks: dict[str, dict[str, Any]]


def collect(folders: list[Path]) -> list[Row]:
    """Rows of all results in some folders, in the order of their paths. InputError where there is
    none, or the seeds of a row and task were not trained in one way.
    """
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        for path in sorted(folder.glob(f"**/seed-*/{RESULT}")):
            result, arm = read_result(path), path.parent.parent.parent
            name = str(arm.relative_to(folder)) if arm != folder else folder.name
            if len(folders) > 1 and arm != folder:
                name = f"{folder.name}/{name}"
            found[name][result["task"]].append(result)
    if not found:
        raise InputError(f"{', '.join(map(str, folders))}: no TASK/seed-N/{RESULT} in it")
    for name, tasks in found.items():
        for task, results in tasks.items():
            _require_one_way(f"{name}/{task}", results)
    return [
        Row(name, {task: over_seeds(results) for task, results in tasks.items()})
        for name, tasks in found.items()
    ]


def _require_one_way(where: str, results: list[dict[str, Any]]) -> None:
    """InputError where results differ in more than their seed."""
    identities = [{k: v for k, v in one["identity"].items() if k != "seed"} for one in results]
    for key, value in identities[0].items():
        if any(one.get(key) != value for one in identities):
            raise InputError(f"{where}: {key} differs between seeds; they make no mean")


def table(rows: list[Row]) -> str:
    """Markdown. Metrics in %, mean ± sample standard deviation over the seeds."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    metric = {task: row.tasks[task]["metric"] for row in rows for task in row.tasks}
    names = [f"{task} ({HEADLINES.get(metric[task], metric[task])})" for task in tasks]
    header = ["method", "trained parameters", *names, "mean", "CPU s", "s", "seeds"]
    body = []
    for row in rows:
        values = [_cell(row.tasks.get(task)) for task in tasks]
        seconds = [_seconds(row, tasks, f"{kind}seconds_training") for kind in ("cpu_", "")]
        body.append([row.name, _parameters(row), *values, _mean(row, tasks), *seconds, _seeds(row)])
    aligned = ("left", *["right"] * (len(header) - 1))
    text = tabulate(body, header, tablefmt="pipe", colalign=aligned, disable_numparse=True)
    return (
        f"{text}\n\nMetrics on test in %, mean ± standard deviation over seeds. Seconds: of "
        "training, all tasks, one seed, by the CPU time of rank 0 and by the clock. Parameters: "
        "all that are trained, of the task with most; "
        "after → the mean that is left when closed ranks are dropped.\n"
    )


def stages(rows: list[Row]) -> str:
    """Markdown, a line for each stage of each row and task with more than one; empty without."""
    header = ["method", "task", "stage", "λ", "ranks", "memorisation", "generalisation", "test"]
    body = []
    for row in rows:
        for task, found in row.tasks.items():
            for number, stage in enumerate(found.get("stages", [])):
                shares = [
                    _share(stage.get(f"{name}_percent"))
                    for name in ("memorisation", "generalisation")
                ]
                kept = f"{stage['ranks_kept']['mean']:.1f} of {stage['ranks']['mean']:.0f}"
                strength = f"{stage['strength']['mean']:g}"
                test = _share(stage["test"], 100)
                body.append([row.name, task, number, strength, kept, *shares, test])
    if not body:
        return ""
    text = tabulate(body, header, tablefmt="pipe", disable_numparse=True)
    return (
        f"\n{text}\n\nMemorisation and generalisation: the metric on training examples and on val, "
        "in % of the first stage's. Ranks, metrics: means, ± standard deviation over seeds.\n"
    )


def _share(value: dict[str, Any] | None, times: float = 1.0) -> str:
    if value is None:
        return "–"
    deviation = "" if value["sd"] is None else f" ± {times * value['sd']:.1f}"
    return f"{times * value['mean']:.1f}{deviation}"


def _cell(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return _share(found["test"][found["metric"]], 100)


def _parameters(row: Row) -> str:
    every = row.tasks.values()
    text = f"{max(one['trained_parameters']['total'] for one in every):,}"
    after = [one["parameters_after_pruning"]["mean"] for one in every if _pruned(one)]
    return f"{text} → {sum(after) / len(after):,.0f}" if after else text


def _pruned(one: dict[str, Any]) -> bool:
    return "parameters_after_pruning" in one


def _mean(row: Row, tasks: list[str]) -> str:
    """Over all tasks; none where one is missing."""
    if any(task not in row.tasks for task in tasks):
        return "–"
    found = [row.tasks[task] for task in tasks]
    return f"{100 * sum(one['test'][one['metric']]['mean'] for one in found) / len(found):.1f}"


def _seconds(row: Row, tasks: list[str], key: str) -> str:
    if any(task not in row.tasks for task in tasks):
        return "–"
    return f"{sum(row.tasks[task][key]['mean'] for task in tasks):,.0f}"


def _seeds(row: Row) -> str:
    counts = sorted({len(one["seeds"]) for one in row.tasks.values()})
    return " to ".join(map(str, sorted({counts[0], counts[-1]})))


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = ArgumentParser(prog="python -m eval.finetune.table", exit_on_error=False)
    parser.add_argument("folders", nargs="+", help="run directories of eval.finetune, or of a grid")
    parser.add_argument(
        "--output",
        help="a markdown file, with a .json of all seeds beside it; left out: the table is printed",
    )
    try:
        options = parser.parse_args(sys.argv[1:] if argv is None else argv)
    except ArgumentError as error:
        raise InputError(" ".join(str(error).split())) from None
    require_folder_of(options.output)
    if options.output is not None:
        if Path(options.output).suffix == ".json":
            raise InputError(f"--output {options.output}: a markdown file; a .json goes beside it")
        require_folder_of(Path(options.output).with_suffix(".json"))
    rows = collect([Path(folder) for folder in options.folders])
    text = table(rows) + stages(rows)
    if options.output:
        path = Path(options.output)
        path.write_text(text, encoding="utf-8")
        numbers = json.dumps({row.name: row.tasks for row in rows}, indent=1)
        path.with_suffix(".json").write_text(numbers + "\n", encoding="utf-8")
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    run_cli(main)
