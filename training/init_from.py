"""Weights that a run is given: what it begins from (training.init_from), or its teacher."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from data.errors import InputError
from model import ModelConfig, Transformer
from training import checkpoint, full_state
from training.engine import Engine

WEIGHTS = "model.safetensors"
# How weights are drawn at a start, which says nothing where they are given.
STARTS = ("init", "init_std", "zero_init_outputs")


@dataclass(frozen=True)
class GivenWeights:
    """Weights of a checkpoint.

    Attributes:
        path: As the configuration names them.
        folder: The checkpoint.
        config: The model that they are of.
        sha256: Of model.safetensors.
    """

    path: str
    folder: Path
    config: ModelConfig
    sha256: str

    def record(self) -> dict[str, str]:
        """What checkpoint.json says of them."""
        return {"path": self.path, "folder": str(self.folder), "sha256": self.sha256}


def find(path: str, key: str, tokenizer_sha256: str | None = None) -> GivenWeights:
    """The weights of a run directory (its newest checkpoint) or of a checkpoint's folder.

    key: of the configuration, for the message. InputError where there is no whole checkpoint, or it
    was trained with another tokenizer (None: that is not compared).
    """
    try:
        folder = checkpoint.resolve(Path(path))
        state = checkpoint.read_state(folder)
        config = ModelConfig.from_json(folder / "model.json")
        _check_tensors(folder, config)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{key}: {error}") from None
    theirs = state.get("tokenizer_sha256")
    if tokenizer_sha256 not in (None, theirs):
        raise InputError(
            f"{key}: {folder}: tokenizer_sha256 is {theirs}, that of data.path is "
            f"{tokenizer_sha256}; weights need the tokenizer that they were trained with"
        )
    return GivenWeights(path, folder, config, state["files"][WEIGHTS]["sha256"])


def _check_tensors(folder: Path, config: ModelConfig) -> None:
    """ValueError where model.safetensors has not the tensors of model.json."""
    with torch.device("meta"):
        wanted = {name: list(p.shape) for name, p in Transformer(config).named_parameters()}
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"{folder / WEIGHTS}: {name} has the shape {found.get(name)}, model.json says "
                f"{wanted.get(name)}"
            )


def beginning(
    path: str, model: ModelConfig, tokenizer_sha256: str | None = None, verify: bool = True
) -> GivenWeights:
    """The weights of training.init_from, for this model. InputError, naming the key, where the
    model is another one. verify: compare the files with their sha256 sums.
    """
    found = find(path, "training.init_from", tokenizer_sha256)
    for name in (field.name for field in dataclasses.fields(model)):
        attribute = "ranks" if name == "r" else name  # r: 8 and {q: 8, k: 8, ...} are the same
        theirs, ours = getattr(found.config, attribute), getattr(model, attribute)
        if name not in STARTS and theirs != ours:
            raise InputError(
                f"training.init_from: {found.folder}: model.{name} is {theirs} there, {ours} in "
                "this configuration; they must be the same"
            )
    if verify:
        checkpoint.verify(found.folder, ("model.json", WEIGHTS))
    return found


def same_beginning(was: dict[str, Any] | None, now: str | None, folder: Path) -> list[str]:
    """What the log should say where a run goes on from its own checkpoint: `was` is in it, `now` in
    the configuration. InputError where the run did not begin from given weights.
    """
    if now is None:
        return []
    if was is None:
        raise InputError(
            f"{folder}: training.init_from was null, now it is {now}; a run is resumed with what "
            "it began with (or use another training.run_dir)"
        )
    if was["path"] == now:
        return []
    return [f"warning: training.init_from {now} has no effect: the run began from {was['path']}"]


def load(engine: Engine, folder: Path) -> None:
    """Sets the engine's weights at any ZeRO stage; every rank calls it, rank 0 alone reads."""
    with safe_open(folder / WEIGHTS, "pt") as weights:
        full_state.restore_weights(engine, weights.get_tensor)
