"""The command line, the cells that it asks for, and the runs of a cell."""

import argparse
import dataclasses
import difflib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from data.command_line import parse_options
from data.errors import InputError, require_folder_of
from model.cache import CacheForm
from model.execution import Execution
from training.config import CONFIG_FOLDER, RunConfig

PROG = "python -m eval.throughput"
# What a step is in each mode, and how many make a round where --steps does not say.
MODES = {"train": 5, "evaluate": 1, "prefill": 3, "decode": 32}
COMPILE = {"true": "on", "false": "off", "on": "on", "off": "off", "auto": "auto"}
CACHES = ("full", "value_latent", "latent")
GRID = ("seq_lens", "micro_batch_sizes", "kernels", "compile", "caches")
_BLOCKS = ("--model.", "--deepspeed.", "--execution.")


@dataclass(frozen=True)
class Cell:
    """What one comparison of a sweep sets; None: as in the YAML files."""

    seq_len: int | None = None
    micro_batch_size: int | None = None
    kernels: str | None = None
    compile: str | None = None
    cache: CacheForm | None = None

    def form(self, side: str) -> CacheForm:
        """The form of a side's cache; the baseline has the full one."""
        return self.cache or "full" if side == "config" else "full"

    def options(self) -> list[str]:
        """As options of a run."""
        values = {
            "--training.seq_len": self.seq_len,
            "--training.micro_batch_size": self.micro_batch_size,
            "--execution.kernels": self.kernels,
            "--execution.compile": self.compile,
        }
        return [part for k, v in values.items() if v is not None for part in (k, str(v))]

    def name(self) -> str:
        """In a few words; empty where nothing is set."""
        parts = [f"{self.seq_len} tokens" if self.seq_len else ""]
        parts += [f"{self.micro_batch_size} sequences" if self.micro_batch_size else ""]
        parts += [f"kernels {self.kernels}" if self.kernels else ""]
        parts += [f"compile {self.compile}" if self.compile else ""]
        parts += [f"cache {self.cache}" if self.cache else ""]
        return ", ".join(filter(None, parts))


@dataclass
class Options:
    """The command line; docs/throughput.md describes each option, --help too."""

    config: str
    baseline: str
    mode: str
    rounds: int
    steps: int
    warm_up: int
    accumulation: int
    sequences: int
    precision: str | None
    device: str
    resident: str
    memory: bool
    allow_unequal: bool
    seed: int
    output: str | None
    sweep: bool
    cells: list[Cell]
    blocks: list[str]

    def new_tokens(self) -> int:
        """The longest that a round of mode decode is; 0 in the others."""
        return max(self.steps, self.warm_up) if self.mode == "decode" else 0

    def from_anywhere(self) -> "Options":
        """The same with the paths of the YAML files absolute, for a process in another folder."""

        def absolute(file: str) -> str:
            return str(Path(file).absolute()) if Path(file).is_file() else file

        return dataclasses.replace(
            self, config=absolute(self.config), baseline=absolute(self.baseline)
        )

    def measured(self) -> dict[str, Any]:
        """The settings that a result depends on, but for its cell."""
        fields = dataclasses.asdict(self)
        return {k: v for k, v in fields.items() if k not in ("output", "sweep", "cells")}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message.removeprefix("argument "))


def _boolean(value: str) -> bool:
    if value not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{value!r}; allowed is true or false")
    return value == "true"


def _at_least(least: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r}; allowed is a whole number from {least}")
        return int(value)

    return parse


def _parser() -> _Parser:
    execution = ", ".join(f"--execution.{f.name}" for f in dataclasses.fields(Execution))
    parser = _Parser(
        prog=PROG,
        description="Speed and memory of one model against another, side by side.",
        epilog="Keys of both YAML files can be set: --model.KEY VALUE, --deepspeed.KEY VALUE such "
        f"as --deepspeed.zero_stage 2, and {execution}. Exit codes: 0; 1 where a process that "
        "measures memory fails; 2 for input that cannot be compared.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    several: dict[str, Any] = {"nargs": "+", "metavar": "N", "type": _at_least(1)}
    flag: dict[str, Any] = {"nargs": "?", "const": True, "type": _boolean, "metavar": "true|false"}
    runs = "a path or the name of a file in configs/"
    one, many = _at_least(1), _at_least(2)
    kernels = ("auto", "reference", "triton")
    steps = ", ".join(f"{mode} {steps}" for mode, steps in MODES.items())
    text = {
        "mode": "what a step is: an optimizer step of the engine; a forward-only pass over "
        "--sequences; a prompt to its first token; a new token for each sequence",
        "seq_len": "tokens of a sequence; prefill: of a prompt; decode: in the cache at the start "
        "(default: the YAML's)",
        "cache": "what the first model's cache keeps, in modes prefill and decode (full); the "
        "baseline's is full",
        "resident": "whether both models stay in memory, or each is built for its turn; auto: both "
        "where they fit, by the formula of --dry-run",
    }
    add("--config", required=True, help=f"YAML of the one run, LPA say: {runs}")
    add("--baseline", required=True, help=f"YAML of the other, the vanilla twin say: {runs}")
    add("--mode", choices=MODES, default="train", help=text["mode"])
    add("--seq_len", type=one, help=text["seq_len"])
    add("--micro_batch_size", type=one, help="sequences at once (default: the YAML's)")
    add("--accumulation", type=one, default=1, help="train: micro-batches of a step (1)")
    add("--sequences", type=one, default=64, help="evaluate: sequences of a pass (64)")
    add("--cache", choices=CACHES, help=text["cache"])
    add("--precision", choices=("fp32", "bf16"), help="default: the YAML's")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU, if any")
    add("--rounds", type=many, default=10, help="turns of each model (10)")
    add("--steps", type=one, help=f"steps of a turn (default: {steps})")
    add("--warm_up", type=many, default=3, help="steps after building that are not timed (3)")
    add("--seed", type=_at_least(0), default=0, help="of the weights and the random tokens")
    add("--resident", choices=("auto", "both", "one"), default="auto", help=text["resident"])
    add("--memory", **flag, default=True, help="measure the peak memory of each")
    add("--allow_unequal", **flag, default=False, help="compare under unequal conditions too")
    add("--sweep", **flag, default=False, help="one comparison for each combination of the lists")
    add("--seq_lens", **several, help="sweep: values of --seq_len")
    add("--micro_batch_sizes", **several, help="sweep: values of --micro_batch_size")
    add("--kernels", nargs="+", choices=kernels, help="sweep: values of execution.kernels")
    add("--compile", nargs="+", choices=COMPILE, help="sweep: of execution.compile; true is on")
    add("--caches", nargs="+", choices=CACHES, help="sweep: values of --cache")
    add("--output", help="a JSON file for the result; .csv and .png go beside it")
    add("--local_rank", type=int, help="set by `deepspeed`")
    return parser


def parse(argv: Sequence[str]) -> Options:
    """The options; InputError, with one line, where they do not fit."""
    parser = _parser()
    found, rest = parser.parse_known_args(argv)
    known = [option for action in parser._actions for option in action.option_strings]
    for part in rest:
        if part.startswith("--") and not part.startswith(_BLOCKS):
            near = difflib.get_close_matches(part.partition("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise InputError(f"unknown option {part}; {hint}")
    values = vars(found)
    del values["local_rank"]
    values["cells"] = _cells(values)
    if found.mode not in ("prefill", "decode") and any(cell.cache for cell in values["cells"]):
        raise InputError(f"--cache: for modes prefill and decode; --mode is {found.mode}")
    for name in ("seq_len", "micro_batch_size", "cache", *GRID):
        values.pop(name)
    values["steps"] = values["steps"] or MODES[found.mode]
    if found.output is not None:
        _check_output(found.output)
    return Options(**values, blocks=rest)


def _check_output(output: str) -> None:
    """InputError where a result could not be written there, or CSV and plot beside it."""
    require_folder_of(output)
    path = Path(output)
    if path.suffix != ".json":
        raise InputError(f"--output {output}: the name must end in .json")
    for ending in (".csv", ".png"):
        if path.with_suffix(ending).is_dir():
            raise InputError(
                f"--output {output}: {path.with_suffix(ending)} is a folder; a file is expected"
            )


def _cells(values: dict[str, Any]) -> list[Cell]:
    """One cell, or with --sweep one for each combination of the lists."""
    given = [name for name in GRID if values[name]]
    if not values["sweep"]:
        if given:
            raise InputError(f"--{given[0]}: a list is for --sweep, which is not given")
        return [Cell(values["seq_len"], values["micro_batch_size"], cache=values["cache"])]
    if not given:
        names = ", ".join(f"--{name}" for name in GRID)
        raise InputError(f"--sweep: needs at least one of {names}")
    for name, plural in (
        ("seq_len", "seq_lens"),
        ("micro_batch_size", "micro_batch_sizes"),
        ("cache", "caches"),
    ):
        if values[name] and values[plural]:
            raise InputError(f"--{name} {values[name]}: --{plural} is given too; give one of them")
    lists = (
        values["seq_lens"] or [values["seq_len"]],
        values["micro_batch_sizes"] or [values["micro_batch_size"]],
        values["kernels"] or [None],
        [COMPILE[value] for value in values["compile"]] if values["compile"] else [None],
        values["caches"] or [values["cache"]],
    )
    return list(dict.fromkeys(Cell(*one) for one in itertools.product(*lists)))


def side_names(options: Options) -> dict[str, str]:
    """What the two sides are called: after their files."""
    names = {"config": Path(options.config).stem, "baseline": Path(options.baseline).stem}
    if names["config"] == names["baseline"]:
        names["baseline"] += " (baseline)"
    return names


def run_of(side: str, options: Options, cell: Cell, world_size: int) -> RunConfig:
    """The run of a side ("config" or "baseline") as it is measured: the YAML with the options, its
    learning rate without the decay, and a batch of world_size · micro_batch_size · accumulation.

    InputError where the YAML or an option does not fit.
    """
    file = options.config if side == "config" else options.baseline
    argv = ["--config", file, *options.blocks, *cell.options()]
    if options.precision:
        argv += ["--training.precision", options.precision]
    try:
        run, _ = parse_options(
            RunConfig, argv, prog=PROG, description="", config_folder=CONFIG_FOLDER
        )
    except InputError as error:
        raise InputError(f"--{side}: {error}") from None
    training = run.training
    micro = training.micro_batch_size or max(1, training.global_batch_size // world_size)
    new = options.new_tokens()
    if training.seq_len + new > run.model.max_seq_len:
        raise InputError(
            f"--steps: {new} tokens after {training.seq_len} are over model.max_seq_len "
            f"{run.model.max_seq_len} of {file}"
        )
    if options.mode == "evaluate" and options.sequences % micro:
        raise InputError(
            f"--sequences: {options.sequences}; it must be a multiple of the micro_batch_size "
            f"{micro} of {file}"
        )
    changed = dataclasses.replace(
        training,
        micro_batch_size=micro,
        global_batch_size=micro * world_size * options.accumulation,
        schedule="constant",
        decay_steps=0,
        max_steps=1_000_000,
        seed=options.seed,
    )
    return dataclasses.replace(run, training=changed)
