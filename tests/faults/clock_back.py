"""train.py under a clock that jumps back by a day when a step begins:
torchrun -m tests.faults.clock_back STEP --config NAME.yaml
"""

import sys
import time
from typing import Any

import train
from data.errors import run_cli
from training import distributed
from training.engine import Engine


def clock_back(at: int) -> None:
    """Alters time.time, which all parts of the run share, from step `at` on."""
    undisturbed, clock = Engine.train_step, time.time

    def train_step(self: Engine, step: int, *rest: Any) -> Any:
        if step == at:
            time.time = lambda: clock() - 86_400.0
        return undisturbed(self, step, *rest)

    Engine.train_step = train_step  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    clock_back(int(sys.argv.pop(1)))
    run_cli(train.main, distributed.leave)
