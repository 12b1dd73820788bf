"""Runs, their checkpoints, and the text that they are analysed on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from eval.compare.names import relative_names
from eval.models import load
from eval.perplexity import PerplexityConfig, load_stream
from model.execution import Execution
from training import checkpoint

# Every module is called, so that hooks see what flows through it.
REFERENCE = Execution(kernels="reference", compile="off")


@dataclass
class Source:
    """A run, or one checkpoint of it.

    Attributes:
        name: What it is called on the page.
        path: As it was given.
        checkpoints: Folders of whole checkpoints, by rising step, at least one.
        states: Their checkpoint.json.
        damaged: Names of checkpoints that are not what was written.
    """

    name: str
    path: Path
    checkpoints: list[Path] = field(default_factory=list)
    states: list[dict[str, Any]] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def open_sources(arguments: Sequence[str]) -> list[Source]:
    """The runs of a command line, each RUN or NAME=RUN; InputError where one is none, is given
    twice or shares its name with another.
    """
    named = [_split(argument) for argument in arguments]
    shown = relative_names([path for _, path in named])
    sources: list[Source] = []
    for (name, path), other in zip(named, shown, strict=True):
        source = _open(name or other, path)
        for before in sources:
            if before.path.resolve() == path.resolve():
                raise InputError(f"{path}: given twice")
            if before.name == source.name:
                raise InputError(f"{source.name}: the name of two runs; give each its own")
        sources.append(source)
    return sources


def _split(argument: str) -> tuple[str, Path]:
    name, equals, path = argument.partition("=")
    if Path(argument).exists() or not equals:  # a folder may have an = in its name
        return "", Path(argument)
    if not name:
        raise InputError(f"{argument}: the name before = is missing; NAME=RUN is expected")
    return name, Path(path)


def _open(name: str, path: Path) -> Source:
    source = Source(name, path)
    newest = checkpoint.resolve(path)  # InputError where there is none
    folders = [newest] if newest == path else checkpoint.candidates(path)[::-1]
    problem = ""
    for folder in folders:
        if not (folder / "checkpoint.json").exists():  # a save that was cut off
            continue
        try:
            state = checkpoint.read_state(folder)
        except checkpoint.DamagedError as error:
            source.damaged.append(folder.name)
            problem = str(error)
            continue
        source.checkpoints.append(folder)
        source.states.append(state)
    if not source.checkpoints:
        raise InputError(f"{path}: no whole checkpoint in it ({problem})")
    return source


def read_tokens(source: Source, data: str, split: str, max_tokens: int) -> Tensor:
    """The first tokens of a text or of a prepared folder's split, int64 (N,), as the run's own
    tokenizer has them. InputError where the folder has another, or there are none.
    """
    newest = str(source.checkpoints[-1])
    # The model that comes with the tokenizer is not used.
    scorable, sha256 = load(newest, torch.device("cpu"), torch.float32, REFERENCE)
    config = PerplexityConfig(newest, [data], split=split)
    stream = load_stream(config, data, scorable, sha256)
    count = min(len(stream), max_tokens)
    if not count:
        raise InputError(f"{data}: has no tokens")
    return torch.from_numpy(stream.read(0, count))
