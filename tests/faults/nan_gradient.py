"""train.py, but the gradient of rank 1 is NaN in steps FIRST to LAST:
torchrun -m tests.faults.nan_gradient FIRST LAST --config NAME.yaml

Each rank also writes the sum of its weights after every step to RUN/weights-RANK.jsonl.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

import train
from data.errors import run_cli
from training import distributed
from training.engine import Engine


def nan_gradient(first: int, last: int) -> None:
    """Alters the engine: a hook on the gradient of the output head's input."""
    build, undisturbed = Engine.__init__, Engine.train_step
    at = -1

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("nan") if first <= at <= last else gradient

    def watch(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            inputs[0].register_hook(poison)

    def built(self: Engine, *arguments: Any) -> None:
        build(self, *arguments)
        if distributed.rank() == 1:
            self.model.lm_head.register_forward_pre_hook(watch)

    def train_step(self: Engine, step: int, *rest: Any) -> Any:
        nonlocal at
        at = step
        result = undisturbed(self, step, *rest)
        report_weights(self, step)
        return result

    Engine.__init__ = built  # type: ignore[method-assign, assignment]
    Engine.train_step = train_step  # type: ignore[method-assign, assignment]


def report_weights(engine: Engine, step: int) -> None:
    """Appends the sha256 sum of this rank's weights; at stage 3 of what it gathers."""
    parameters = list(engine.model.parameters())
    whole = deepspeed.zero.GatheredParameters(parameters, enabled=engine.sharded)
    with whole, torch.no_grad():
        content = b"".join(p.float().contiguous().numpy().tobytes() for p in parameters)
    line = {"step": step + 1, "sha256": hashlib.sha256(content).hexdigest()}
    path = Path(engine.run.training.run_dir) / f"weights-{distributed.rank()}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    nan_gradient(int(sys.argv.pop(1)), int(sys.argv.pop(1)))
    run_cli(train.main, distributed.leave)
