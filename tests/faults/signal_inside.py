"""train.py, but rank 1 sends itself SIGUSR1 between two micro-batches of a step:
torchrun -m tests.faults.signal_inside STEP --config NAME.yaml
"""

import os
import signal
import sys
from typing import Any

import train
from data.errors import run_cli
from training import distributed
from training.engine import Engine


def signal_inside(at: int) -> None:
    """Alters the engine: the signal comes when the second forward pass of step `at` begins."""
    build, undisturbed = Engine.__init__, Engine.train_step
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    def built(self: Engine, *arguments: Any) -> None:
        build(self, *arguments)
        if distributed.rank() == 1:
            self.model.lm_head.register_forward_pre_hook(count)

    def train_step(self: Engine, step: int, *rest: Any) -> Any:
        nonlocal passes
        passes = 0 if step == at else 2
        return undisturbed(self, step, *rest)

    Engine.__init__ = built  # type: ignore[method-assign, assignment]
    Engine.train_step = train_step  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    signal_inside(int(sys.argv.pop(1)))
    run_cli(train.main, distributed.leave)
