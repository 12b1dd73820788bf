"""Checkpoints: written aside, named when whole; model.safetensors for every tool, ZeRO's for
resume.

RUN/checkpoints/step-00001000/
  checkpoint.json    step, position in the data, what the run was, and the files with their sizes
  model.json         the shape of the model
  model.safetensors  its weights, whole, in fp32: all that evaluation and export read
  tokenizer.model    the tokenizer of its data
  deepspeed/         ZeRO's shards, for resume alone
"""

import dataclasses
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from data.errors import InputError
from data.shards import sha256_file
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer
from training import distributed
from training.engine import Engine
from training.run_dir import write_json

TAG = "deepspeed"
# How torch.save reports that the file system refused its bytes.
FAILED_WRITE = re.compile(r"PytorchStreamWriter|inline_container|file write|No space|iostream")
# What DeepSpeed's files pickle besides tensors. It reads them with weights_only=False, which runs
# whatever a file names, so a file that names anything else is refused before DeepSpeed sees it.
ALLOWED_PICKLES = {
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
}


def save(engine: Engine, run_dir: Path, tokenizer: Tokenizer, state: dict[str, Any]) -> Path:
    """Writes the checkpoint of `state["step"]`; every rank calls it. Returns its folder.

    InputError where it cannot be written, for example because the disk is full: what was begun is
    removed and earlier checkpoints stay.
    """
    folder = run_dir / "checkpoints" / f"step-{state['step']:08d}"
    aside = folder.with_name(folder.name + ".partial")
    first = distributed.rank() == 0
    try:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            _require_space(engine, aside)
        distributed.barrier()
        engine.deepspeed.save_checkpoint(str(aside), tag=TAG, save_latest=False)
        weights = engine.full_weights()
        if first:
            for script in ("zero_to_fp32.py", "zero_to_torch.py"):  # model.safetensors has it all
                (aside / script).unlink(missing_ok=True)
            _write_own_files(aside, engine, tokenizer, weights, state)
            replaced = folder.with_name(folder.name + ".replaced")
            if folder.exists():  # saved once more: the old one goes when the new one is there
                folder.rename(replaced)
            aside.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        distributed.barrier()
    except (OSError, RuntimeError, SafetensorError) as error:
        text = " ".join(str(error).split())
        if isinstance(error, RuntimeError) and not FAILED_WRITE.search(text):
            raise  # not the disk: another rank is gone, or a defect
        if first:
            shutil.rmtree(aside, ignore_errors=True)
        refused = InputError(
            f"{folder}: the checkpoint could not be written ({text}); free space and start again: "
            "the run goes on from the checkpoint before it"
        )
        refused.any_rank = True
        raise refused from error
    return folder


def _require_space(engine: Engine, aside: Path) -> None:
    """OSError where the disk has no room, before anything is written."""
    count = engine.run.model.num_parameters()
    # fp32 weights in model.safetensors, fp32 master weights and two moments, the module's weights.
    needed = count * 4 * 4 + count * (2 if engine.run.training.precision == "bf16" else 4)
    free = shutil.disk_usage(aside).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"no space left: {needed:,} bytes are needed, {free:,} are free"
        )


def _write_own_files(
    aside: Path,
    engine: Engine,
    tokenizer: Tokenizer,
    weights: dict[str, Any],
    state: dict[str, Any],
) -> None:
    engine.run.model.to_json(aside / "model.json")
    shutil.copyfile(tokenizer.path, aside / "tokenizer.model")
    safetensors.torch.save_file(weights, aside / "model.safetensors")
    files = sorted(p for p in aside.rglob("*") if p.is_file())
    listed = {}
    for path in files:
        _flush_to_disk(path)
        name = path.relative_to(aside).as_posix()
        listed[name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    write_json(aside / "checkpoint.json", {"format_version": 1, **state, "files": listed})
    _flush_to_disk(aside / "checkpoint.json")


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prune(run_dir: Path, keep: int | None) -> None:
    """Removes all but the newest `keep` checkpoints (None: keeps all). Rank 0 alone calls it."""
    whole = [folder for folder, _ in _newest_first(run_dir)]
    for folder in whole[keep:] if keep is not None else []:
        shutil.rmtree(folder, ignore_errors=True)


def clean(run_dir: Path) -> None:
    """Removes what a killed save left. Rank 0 alone calls it, holding the run directory."""
    for left in (run_dir / "checkpoints").glob("step-*.replaced"):
        folder = left.with_suffix("")
        if not folder.exists():  # killed between the two renames: this is the whole one
            left.rename(folder)
    for pattern in ("step-*.partial", "step-*.replaced"):
        for left in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _newest_first(run_dir: Path) -> Iterator[tuple[Path, int]]:
    found = []
    for folder in (run_dir / "checkpoints").glob("step-*"):
        digits = folder.name.removeprefix("step-")
        if digits.isdigit() and (folder / "checkpoint.json").exists():
            found.append((folder, int(digits)))
    return iter(sorted(found, key=lambda item: -item[1]))


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


def read_state(folder: Path) -> dict[str, Any]:
    """checkpoint.json, once every file is there with its size; InputError where one is not."""
    try:
        state: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text())
        files = state["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'checkpoint.json'}: unreadable ({error})") from None
    for name, written in files.items():
        found = (folder / name).stat().st_size if (folder / name).exists() else None
        if found != written["bytes"]:
            size = f"has {found} bytes, {written['bytes']} were written"
            what = "is missing" if found is None else size
            raise InputError(f"{folder / name}: {what}; the checkpoint is damaged, use another")
    return state


def _verify(folder: Path, names: Iterable[str]) -> None:
    """InputError where a file is not the one that was written, by its sha256 sum."""
    files = read_state(folder)["files"]
    for name in names:
        found, written = sha256_file(folder / name), files[name]["sha256"]
        if found != written:
            raise InputError(
                f"{folder / name}: sha256 {found}, {written} was written; the checkpoint is "
                "damaged, use another"
            )


def load_model(folder: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """The model of a checkpoint, ready for evaluation. Reads model.json and model.safetensors."""
    _verify(folder, ("model.json", "model.safetensors"))
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


def check(folder: Path, model: ModelConfig, expected: dict[str, Any]) -> dict[str, Any]:
    """The state that `save` was given, once it is certain that a run may go on from it.

    `expected` holds what must be as it was (world size, ZeRO stage, data and so on). InputError
    where it is not, or where the files are damaged or not what DeepSpeed writes.
    """
    state = read_state(folder)
    if distributed.local_rank() == 0:
        _verify(folder, state["files"])
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
    for key, value in now.items():
        if was.get(key) != value:
            raise InputError(
                f"{folder}: {key} was {was.get(key)}, now it is {value}; a run is resumed with "
                "what it began with (or use another training.run_dir)"
            )
    _refuse_foreign_pickles(folder / TAG)
    return state


def load(engine: Engine, folder: Path) -> None:
    """Loads weights and optimizer from a folder that passed `check`; every rank calls it.

    The optimizer's settings stay those of the configuration, not of the checkpoint.
    """
    groups = engine.optimizer.param_groups
    settings = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    loaded, _ = engine.deepspeed.load_checkpoint(str(folder), tag=TAG)
    if loaded is None:
        raise InputError(f"{folder}: DeepSpeed found nothing to load in {TAG}/")
    for group, setting in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(setting)


def _refuse_foreign_pickles(folder: Path) -> None:
    for path in sorted(folder.glob("*.pt")):
        named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if named - ALLOWED_PICKLES:
            raise InputError(
                f"{path}: names {sorted(named - ALLOWED_PICKLES)[0]}, which no checkpoint of ours "
                "holds; it was not loaded"
            )
