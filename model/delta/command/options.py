"""The command line."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

import yaml

from data.errors import InputError
from model.delta.base import METHODS, DeltaConfig, config_from_dict

BENCH = "Times of deltas on chains of layers, against frozen layers and peft's LoRA, in turn."
BACKBONE = "a run directory, a checkpoint's folder, or hf: and a name or folder of Hugging Face"


class Parser(argparse.ArgumentParser):
    """Errors are of the user, in one line."""

    def error(self, message: str) -> NoReturn:
        """InputError."""
        raise InputError(f"{self.prog}: {message}")


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = Parser(
        prog="python -m model.delta",
        description="Deltas of a backbone, as files.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)

    def command(name: str, text: str, delta: bool = True, output: bool = True) -> Parser:
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("--backbone", required=True, help=BACKBONE)
        if delta:
            one.add_argument("--delta", required=True, type=Path, help="a delta's folder")
            one.add_argument(
                "--any_backbone", action="store_true", help="do not compare fingerprints"
            )
        if output:
            one.add_argument("--output", required=True, type=Path, help="a folder to write")
        return one

    for name, text in {
        "explain": "The module tree, with what a delta adapts or would adapt.",
        "count": "Parameters of a delta, and of what its pruning leaves.",
    }.items():
        one = command(name, text, delta=False, output=False)
        one.add_argument("--delta", type=Path, help="a delta's folder")
        one.add_argument("--any_backbone", action="store_true", help="do not compare fingerprints")
        one.add_argument("--config", type=Path, help="a YAML or JSON file: method and its keys")
        one.add_argument("--method", choices=sorted(METHODS), help="a method")
        one.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="its keys")
        one.add_argument("--output", type=Path, help="a JSON file for the result")
    merged = command("merge", "Multiplies deltas into the weights.", delta=False)
    merged.add_argument("--delta", required=True, type=Path, nargs="+", help="deltas' folders")
    merged.add_argument("--any_backbone", action="store_true", help="do not compare fingerprints")
    command("prune", "A SoRA as the LoRA that its open gates leave.")
    command("export", "A LoRA or SoRA in peft's format.")
    imported = command("import", "A LoRA of peft as a delta.", delta=False)
    imported.add_argument("--adapter", required=True, type=Path, help="a folder that peft wrote")
    mixed = command("ensemble", "One delta of several, by weights.", delta=False)
    mixed.add_argument("--delta", required=True, type=Path, nargs="+", help="deltas' folders")
    mixed.add_argument("--any_backbone", action="store_true", help="do not compare fingerprints")
    mixed.add_argument("--weights", type=float, nargs="+", help="one a delta; default: equal")
    mixed.add_argument(
        "--how", choices=["exact", "average"], default="exact",
        help="exact: the sum of what the deltas add; average: of their parameters",
    )  # fmt: skip
    mixed.add_argument("--rank", type=int, help="the best approximation of this rank (exact)")
    timed = commands.add_parser(
        "bench",
        help=BENCH,
        description=BENCH,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    timed.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 768], help="widths d")
    timed.add_argument("--rows", type=int, nargs="+", default=[8, 512], help="rows of the input")
    timed.add_argument("--layers", type=int, default=8, help="layers of a chain")
    timed.add_argument("--rank", type=int, default=8, help="rank of the deltas")
    timed.add_argument(
        "--seconds",
        type=float,
        default=4.0,
        help="about, for a case in a mode; never under 20 rounds",
    )
    timed.add_argument(
        "--clock", choices=["cpu", "wall"], default="cpu",
        help="cpu: time of this process on a core, without what others take of it; wall: elapsed",
    )  # fmt: skip
    timed.add_argument("--threads", type=int, default=1, help="of torch")
    timed.add_argument("--output", type=Path, help="a JSON file for the result")
    top.epilog = "\n".join(one.format_usage() for one in commands.choices.values())
    return top


def delta_config(options: argparse.Namespace) -> DeltaConfig:
    """The configuration that --config, --method and --set give. InputError where it is none."""
    fields: dict[str, Any] = {}
    if options.config is not None:
        try:
            fields = yaml.safe_load(options.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            raise InputError(f"--config {options.config}: not readable ({text})") from None
        if not isinstance(fields, dict):
            raise InputError(f"--config {options.config}: it holds no keys")
    if options.method is not None:
        fields["method"] = options.method
    for part in options.set:
        key, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--set {part}: allowed is KEY=VALUE")
        try:
            fields[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            text = " ".join(str(error).split())
            raise InputError(f"--set {part}: {value} is not YAML ({text})") from None
    if "method" not in fields:
        raise InputError("--delta, --config or --method: one of them is needed")
    return config_from_dict(fields)
