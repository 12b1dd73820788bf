"""From the start of the process to the end of the first optimizer step of lpa_tiny.yaml, under
plain `python` and under `deepspeed` with one rank.

Nothing in train.py is changed: the phases are read off what a run leaves behind, the times of its
files and of the lines in log.txt. The first start of each launcher is left out; it fills the page
cache and writes compiled Python files.

  imports, checks   interpreter, imports, configuration, prepared data: until the run's lock is
                    taken (under `deepspeed` with the launcher's own start)
  engine            importing DeepSpeed, building the model and the engine
  reports           environment.json, TensorBoard: until the log's first line
  validation        of the untrained model, which lpa_tiny.yaml asks for: to "before training"
  first step        to the line of step 1
"""

import re
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from training.bench import processes
from training.bench.corpus import prepare
from training.bench.measure import Row, measurement, ratio

GOAL_SECONDS = 12.0
SEED = 0  # of lpa_tiny.yaml
STAMP = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) (.*)")
# What a run of train.py imports on its way to the first step.
IMPORTS = "import train, training.engine, deepspeed; from torch.utils import tensorboard"
LISTED_PACKAGES = 15


def command(launcher: str, config: str, data: Path, run_dir: Path) -> list[str]:
    """train.py for two steps; with one, the first would wait for the validation at the end."""
    options = ["--config", config, "--data.path", str(data), "--training.run_dir", str(run_dir)]
    options += ["--training.max_steps", "2", "--training.warmup_steps", "1"]
    options += ["--data.final_split", "null"]
    if launcher == "python":
        return processes.python("train.py", *options)
    program = str(Path(sys.executable).with_name("deepspeed"))
    port = f"--master_port={processes.free_port()}"
    return [program, "--num_gpus=1", port, "train.py", *options]


def phases(started: float, run_dir: Path) -> dict[str, float]:
    """Seconds of each phase of a run that started at `started` (Unix time)."""
    lines = [
        (datetime.strptime(m[1], "%Y-%m-%d %H:%M:%S").timestamp() + int(m[2]) / 1000, m[3])
        for m in map(STAMP.match, (run_dir / "log.txt").read_text().splitlines())
        if m
    ]

    def first(beginning: str) -> float:
        return next(at for at, text in lines if text.startswith(beginning))

    marks = {
        "imports, checks": (run_dir / ".owner").stat().st_mtime,
        "engine": (run_dir / "config.yaml").stat().st_mtime,
        "reports": lines[0][0],
        "validation": first("before training"),
        "first step": first("step "),
    }
    begins = [started, *list(marks.values())[:-1]]
    found = {name: end - begin for begin, (name, end) in zip(begins, marks.items(), strict=True)}
    return found | {"total": marks["first step"] - started}


def import_seconds(code: str = IMPORTS) -> dict[str, float]:
    """Seconds that `code` takes to import, all and by package, each without what it imports from
    others; the slowest packages. -X importtime makes imports slower than they are.
    """
    report = processes.run(processes.python("-X", "importtime", "-c", code))
    found: dict[str, float] = {}
    for line in report.splitlines():
        match = re.match(r"import time:\s+(\d+) \|\s+\d+ \| +([\w.]+)", line)
        if match:
            package = match[2].partition(".")[0]
            found[package] = found.get(package, 0.0) + int(match[1]) / 1e6
    slowest = sorted(found.items(), key=lambda item: -item[1])[:LISTED_PACKAGES]
    return {"all": sum(found.values())} | dict(slowest)


def measure(quick: bool = False, data: Path | None = None, config: str = "lpa_tiny.yaml") -> Row:
    """Both launchers in turn."""
    rounds = 1 if quick else 3
    runs: dict[str, list[dict[str, float]]] = {"python": [], "deepspeed": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = data or prepare(folder / "data")
        for number in range(rounds + 1):
            for launcher, found in runs.items():
                run_dir = folder / f"{launcher}-{number}"
                started = time.time()
                processes.run(command(launcher, config, data, run_dir))
                found.append(phases(started, run_dir))
    return {
        "measurements": [
            measurement(f"{launcher} train.py", phase, [run[phase] for run in found[1:]])
            for launcher, found in runs.items()
            for phase in found[0]
        ],
        "ratios": [
            ratio(
                f"{launcher} train.py",
                "12 s against start to the end of the first step",
                [GOAL_SECONDS] * rounds,
                [run["total"] for run in found[1:]],
                goal=1.0,
            )
            for launcher, found in runs.items()
        ],
        "import_seconds": import_seconds(),
        "seed": SEED,
    }
