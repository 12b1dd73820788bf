"""Several runs of train.py one after the other in one process, whose start takes seconds:

python -m tests.training.several FIRST.yaml SECOND.yaml ...
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import train
from data.errors import run_cli
from training import distributed, run_dir


def main() -> int:
    """What train.main does, once for each configuration."""
    configs = sys.argv[1:]
    distributed.join_environment()
    for config in configs:
        sys.argv = ["train.py", "--config", config]
        run, _ = train.parse()
        data, loader = train.open_data(run)
        first = distributed.rank() == 0
        with run_dir.lock(Path(run.training.run_dir)) if first else nullcontext():
            assert train.run_job(train.setup(run, data, loader), None) == 0
    distributed.leave(0)


if __name__ == "__main__":
    run_cli(main, distributed.leave)
