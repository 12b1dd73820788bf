"""Checkpoints: whole tensors in safetensors, written aside, named when they are complete.

RUN/checkpoints/step-00001000/
  checkpoint.json        step, position in the data, what the run was, and the files with their sums
  model.json             the shape of the model
  model.safetensors      its weights in fp32: all that evaluation and export read
  optimizer.safetensors  AdamW's moments in fp32, for resume
  tokenizer.model        the tokenizer of its data

Nothing in it depends on the number of ranks or the ZeRO stage, and nothing is a pickle.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import InputError
from data.shards import sha256_file
from data.tokenizer import Tokenizer
from data.writing import recover
from model import ModelConfig, Transformer
from training import distributed, full_state
from training.engine import Engine
from training.run_dir import write_json

FORMAT_VERSION = 3
# What a run may change when it goes on: the same state, computed in another way.
MAY_CHANGE = ("world_size", "zero_stage", "precision")


class DamagedError(InputError):
    """A checkpoint that is not what was written."""


def prune(run_dir: Path, keep: int | None, every: int | None = None) -> None:
    """Removes all but the newest `keep` checkpoints (None: keeps all) and those of a step that
    `every` divides. Rank 0 alone calls it.
    """
    whole = list(_newest_first(run_dir))
    for folder, step in whole[keep:] if keep is not None else []:
        if every is None or step % every:
            shutil.rmtree(folder, ignore_errors=True)


def clean(run_dir: Path) -> None:
    """Removes what a killed save left. Rank 0 alone calls it, holding the run directory."""
    for left in (run_dir / "checkpoints").glob("step-*.replaced"):
        recover(left.with_suffix(""))
    for left in (run_dir / "checkpoints").glob("step-*.partial"):
        shutil.rmtree(left, ignore_errors=True)


def _newest_first(run_dir: Path) -> Iterator[tuple[Path, int]]:
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        digits = folder.name.removeprefix("step-")
        if digits.isdigit() and (folder / "checkpoint.json").exists():
            found.append((folder, int(digits)))
    return iter(sorted(found, key=lambda item: -item[1]))


def candidates(run_dir: Path) -> list[Path]:
    """Folders of a run that are named as checkpoints, newest first, whole or not."""
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        digits = folder.name.removeprefix("step-")
        if digits.isdigit():
            found.append((int(digits), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def newest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run; None where there is none."""
    return next((folder for folder, _ in _newest_first(run_dir)), None)


def resolve(path: Path) -> Path:
    """The checkpoint that a run directory or checkpoint folder means. InputError where none."""
    if not path.exists():
        raise InputError(f"{path}: no such folder; a run directory or a checkpoint is expected")
    if (path / "checkpoint.json").exists():
        return path
    folder = newest(path)
    if folder is None:
        raise InputError(f"{path}: no whole checkpoint in it (checkpoints/step-*/checkpoint.json)")
    return folder


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Writes checkpoint.json, with the sha256 sum of what it says."""
    write_json(folder / "checkpoint.json", {**state, "sha256": _sum(state)})


def _sum(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def read_state(folder: Path) -> dict[str, Any]:
    """checkpoint.json, once it is what was written and every file is there with its size;
    DamagedError where that is not so.
    """
    try:
        state: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text())
        expected = state.pop("sha256", None)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise DamagedError(f"{folder / 'checkpoint.json'}: unreadable ({error})") from None
    unsummed = expected is None and state.get("format_version") in (1, 2)
    if expected != _sum(state) and not unsummed:
        raise DamagedError(
            f"{folder / 'checkpoint.json'}: is not what was written; the checkpoint is damaged, "
            "use another"
        )
    for name, written in state["files"].items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != written["bytes"]:
            size = f"has {found} bytes, {written['bytes']} were written"
            what = "is missing" if found is None else size
            raise DamagedError(f"{folder / name}: {what}; the checkpoint is damaged, use another")
    return state


def verify(folder: Path, names: Iterable[str]) -> None:
    """DamagedError where a file is not the one that was written, by its sha256 sum."""
    files = read_state(folder)["files"]
    for name in names:
        found, written = sha256_file(folder / name), files[name]["sha256"]
        if found != written:
            raise DamagedError(
                f"{folder / name}: sha256 {found}, {written} was written; the checkpoint is "
                "damaged, use another"
            )


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model of a checkpoint, ready for evaluation. Reads model.json and model.safetensors."""
    verify(folder, ("model.json", "model.safetensors"))
    try:
        config = ModelConfig.from_json(folder / "model.json")
        weights = safetensors.torch.load_file(folder / "model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable checkpoint ({error})") from None
    with torch.device("meta"):
        model = Transformer(config)
    try:
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights["token_embedding.weight"]
        model.load_state_dict(weights, assign=True)
    except (RuntimeError, KeyError) as error:
        text = " ".join(str(error).split())
        raise InputError(f"{folder}: weights do not fit model.json ({text})") from None
    if config.tie_embeddings:
        model.lm_head.weight = model.token_embedding.weight
    return model.to(device=device, dtype=dtype).eval()


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint, checked to be the one that it was trained with."""
    tokenizer = Tokenizer(folder / "tokenizer.model")
    expected = read_state(folder).get("tokenizer_sha256")
    if tokenizer.sha256 != expected:
        raise InputError(
            f"{folder / 'tokenizer.model'}: sha256 {tokenizer.sha256}, the checkpoint was trained "
            f"with {expected}"
        )
    return tokenizer


def check(
    folder: Path, model: ModelConfig, expected: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The state that `save` was given, once it is certain that a run may go on from it, and what
    is not as it was.

    `expected` holds what must be as it was (data, batch, seed and so on), and what may change:
    MAY_CHANGE. DamagedError where the files are not those written, InputError where the run
    differs.
    """
    state = read_state(folder)
    if "optimizer.safetensors" not in state["files"]:
        raise InputError(
            f"{folder}: holds weights alone, no optimizer state, so no run can go on from it; to "
            "begin from its weights use training.init_from"
        )
    version = state.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{folder}: format_version {version}; this code resumes from {FORMAT_VERSION} (its "
            "model.safetensors can still be evaluated)"
        )
    verify(folder, state["files"])
    try:
        saved = ModelConfig.from_json(folder / "model.json")
    except ValueError as error:
        raise InputError(str(error)) from None
    was, now = dict(state), dict(expected)
    for name in (field.name for field in dataclasses.fields(model)):
        # Ranks written out: r: 8 and r: {q: 8, k: 8, v: 8, o: 8} are the same model.
        attribute = "ranks" if name == "r" else name
        was[f"model.{name}"] = getattr(saved, attribute)
        now[f"model.{name}"] = getattr(model, attribute)
    changed = []
    for key, value in now.items():
        if was.get(key) == value:
            continue
        difference = f"{key} was {was.get(key)}, now it is {value}"
        if key not in MAY_CHANGE:
            raise InputError(
                f"{folder}: {difference}; a run is resumed with what it began with (or use another "
                "training.run_dir)"
            )
        changed.append(difference)
    return state, changed


def load(engine: Engine, folder: Path | None, steps: int) -> None:
    """Loads weights and optimizer from a folder that passed `check`; every rank calls it, rank 0
    reads the files (the others may give None) and sends what is in them.

    steps: AdamW's count. Its settings are those of the configuration, not of the checkpoint.
    """
    if distributed.rank() != 0:
        full_state.restore(engine, None, steps)
        return
    assert folder is not None
    with (
        safe_open(folder / "model.safetensors", "pt") as weights,
        safe_open(folder / "optimizer.safetensors", "pt") as moments,
    ):

        def read(kind: str, name: str) -> Tensor:
            value: Tensor = (
                weights.get_tensor(name)
                if kind == "weight"
                else moments.get_tensor(f"{kind}.{name}")
            )
            return value

        full_state.restore(engine, read, steps)
