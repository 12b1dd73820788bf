"""Fine-tunes a pre-trained model on tasks, and scores it.

python -m eval.finetune --config glue_sora.yaml --backbone runs/lpa_130m --run_dir runs/tune/sora
"""

import sys

from jsonargparse import ArgumentParser

from data.command_line import parse_options
from data.errors import run_cli
from eval.finetune.config import TUNE_FOLDER, TuneConfig
from eval.finetune.run import run_all
from training import distributed
from training.signals import StopSignal


def parse(argv: list[str]) -> TuneConfig:
    """The configuration that options and YAML make."""

    def add_options(parser: ArgumentParser) -> None:
        parser.add_argument("--local_rank", type=int, default=-1, help="set by `deepspeed`")

    config, _ = parse_options(
        TuneConfig,
        argv,
        prog="python -m eval.finetune",
        description="Fine-tunes; --config takes a path or the name of a file in configs/tune/.",
        config_folder=TUNE_FOLDER,
        add_options=add_options,
    )
    return config


def main() -> int:
    """The command."""
    config = parse(sys.argv[1:])
    device = distributed.init_distributed()
    return 0 if run_all(config, device, StopSignal()) else distributed.STOPPED_EARLY


if __name__ == "__main__":
    run_cli(main, distributed.leave)
