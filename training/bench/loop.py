"""train.py as a user runs it, one process, against the least loop with DeepSpeed.

The two run as processes of their own, one after the other in turn; each times its own steps, in
windows of log_every, and the windows up to step SKIPPED are left out. The minimal loop has the
same model, DeepSpeed configuration and tokens (in memory beforehand), the losses must agree. Saving
and validation are off. What train.py does beside the loop of DeepSpeed is in its time: reading
batches, the checks of gradients and tokens, the signal, metrics.jsonl and TensorBoard.
"""

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from training.bench import processes
from training.bench.corpus import prepare
from training.bench.measure import (
    Row,
    check_losses,
    measurement,
    merge,
    ratio,
    tokens_per_second,
)

TOLERANCE = 1e-5
GOAL = 0.98
SEED = 0
SKIPPED = 10  # steps; train.py's own untimed_steps end before
SIDES = ("train.py", "minimal loop")


@dataclass
class Case:
    """A LPA model, a batch, and how many pairs of processes of how many steps."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    r: int
    vocab_size: int
    batch: int
    seq_len: int
    steps: int
    log_every: int
    rounds: int
    stage: int

    def name(self) -> str:
        return (
            f"d={self.hidden_size} L={self.num_layers} r={self.r} {self.batch}×{self.seq_len}, "
            f"ZeRO stage {self.stage}, 1 process"
        )

    def blocks(self, data: Path, run_dir: Path) -> dict[str, Any]:
        """The run's YAML."""
        return {
            "model": {
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_layers": self.num_layers,
                "num_heads": max(2, self.hidden_size // 64),
                "max_seq_len": self.seq_len,
                "r": self.r,
            },
            "data": {"path": str(data), "final_split": None},
            "training": {
                "run_dir": str(run_dir),
                "max_steps": self.steps,
                "global_batch_size": self.batch,
                "seq_len": self.seq_len,
                "learning_rate": 1e-3,
                "schedule": "constant",
                "log_every": self.log_every,
                "seed": SEED,
            },
            "deepspeed": {"zero_stage": self.stage},
        }


def cases(quick: bool) -> list[Case]:
    """What is measured: the demo's model with a quarter of its batch, so that what a step costs
    beside the model shows.
    """
    if quick:
        return [Case(32, 48, 2, 8, 4096, 4, 32, SKIPPED + 4, 2, 2, stage) for stage in (0, 1)]
    return [Case(192, 512, 4, 32, 4096, 4, 256, SKIPPED + 40, 10, 3, stage) for stage in (0, 1)]


def measure(quick: bool = False, data: Path | None = None) -> Row:
    """All cases, on the embedded corpus unless a prepared folder is given."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = data or prepare(folder / "data")
        parts = [measure_case(case, folder, data) for case in cases(quick)]
    return merge(parts) | {"seed": SEED}


def measure_case(case: Case, folder: Path, data: Path) -> Row:
    """Pairs of processes, one after the other, with their files in `folder`."""
    windows: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    losses: dict[str, list[float]] = {}
    for number in range(case.rounds):
        for side in SIDES:
            place = folder / f"{side} {case.stage} {number}"
            place.mkdir()
            records = run_side(side, case, place, data)
            late = [r for r in records if r["step"] > SKIPPED]
            windows[side].append([r["seconds_per_step"] for r in late])
            losses[side] = [r["loss"] for r in late]
    name = case.name()
    checked = check_losses(name, losses, TOLERANCE)
    rows = [measurement(name, s, [x for run in windows[s] for x in run]) for s in SIDES]
    ours, minimal = (windows[side] for side in SIDES)
    return {
        "measurements": tokens_per_second(rows, case.batch * case.seq_len),
        "ratios": [ratio(name, "tokens/s of train.py against minimal loop", minimal, ours, GOAL)],
        "losses": [checked | {"case": name}],
        "settings": [{"case": name, "processes_a_side": case.rounds} | asdict(case)],
    }


def run_side(side: str, case: Case, folder: Path, data: Path) -> list[dict[str, Any]]:
    """Step, loss and seconds_per_step of each logged step of one process."""
    config, output = folder / "run.yaml", folder / "records.json"
    config.write_text(yaml.safe_dump(case.blocks(data, folder / "run")))
    if side == "train.py":
        processes.run(processes.python("train.py", "--config", str(config)))
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]
    module = ("-m", "training.bench.minimal_loop")
    processes.run(processes.python(*module, str(config), str(output)))
    found: list[dict[str, Any]] = json.loads(output.read_text())
    return found
