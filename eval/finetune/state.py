"""What a run leaves on disk while it works: checkpoints to go on from, and its best state.

RUN/checkpoints/step-00000100/
  checkpoint.json         progress, and the files with their sums
  weights.safetensors     the trained parameters in fp32
  optimizer.safetensors   AdamW's moments
  allocation.safetensors  running averages of peft's AdaLoRA
RUN/best/
  trained.safetensors     the trained parameters
  delta/                  the delta with the head, as model.delta.files writes it
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from data.errors import InputError
from data.shards import sha256_file
from data.writing import flush_to_disk, put_in_place, recover
from eval.finetune import peft_bridge
from eval.finetune.engine import TuneEngine
from eval.finetune.heads import TaskModel
from model.delta import Delta, config_from_dict
from model.delta.files import load_delta, save_delta
from training import checkpoint, distributed, full_state

FORMAT_VERSION = 1
KEEP = 2
MOMENTS, WEIGHTS = "optimizer.safetensors", "weights.safetensors"
ALLOCATION = "allocation.safetensors"
TRAINED = "trained.safetensors"


def save(engine: TuneEngine, run_dir: Path, progress: Mapping[str, Any]) -> Path:
    """Writes a checkpoint, whole or not at all, and drops old ones; every rank calls it."""
    folder = run_dir / "checkpoints" / f"step-{progress['step']:08d}"
    tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in full_state.KINDS}
    for kind, name, value in full_state.gather(engine):
        tensors[kind][name] = value
    steps = full_state.steps_taken(engine)
    if distributed.rank() != 0:
        return folder
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    moments = {
        f"{kind}.{name}": value
        for kind in full_state.MOMENTS
        for name, value in tensors[kind].items()
    }
    averages, pattern = peft_bridge.allocation(engine.model.backbone)
    blobs = {WEIGHTS: tensors["weight"], MOMENTS: moments}
    blobs |= {ALLOCATION: averages} if averages or pattern else {}
    files = {}
    for name, blob in blobs.items():
        safetensors.torch.save_file(blob, aside / name)
        flush_to_disk(aside / name)
        size = (aside / name).stat().st_size
        files[name] = {"bytes": size, "sha256": sha256_file(aside / name)}
    state = {"format_version": FORMAT_VERSION, "optimizer_steps": steps, **progress}
    state |= {"rank_pattern": pattern} if pattern else {}
    checkpoint.write_state(aside, state | {"files": files})
    flush_to_disk(aside / "checkpoint.json")
    flush_to_disk(aside)
    put_in_place(aside, folder)
    checkpoint.prune(run_dir, KEEP)
    return folder


def newest(run_dir: Path, identity: Mapping[str, Any]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a run and its state; None where there is none. Rank 0 alone.

    InputError where it belongs to another configuration. A damaged one is passed over.
    """
    checkpoint.clean(run_dir)
    recover(run_dir / "best")
    for folder in checkpoint.candidates(run_dir):
        try:
            state = checkpoint.read_state(folder)
            for name, written in state["files"].items():
                if sha256_file(folder / name) != written["sha256"]:
                    raise checkpoint.DamagedError(f"{folder / name}: its sha256 has changed")
        except checkpoint.DamagedError:
            continue
        require_same(folder, state["identity"], identity)
        return folder, state
    return None


def require_same(where: Path, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """InputError where a run began with something else than it has now."""
    for key, value in now.items():
        if key not in was and value is not None:
            raise InputError(
                f"{where}: it says nothing of {key}, an older version wrote it; use another run_dir"
            )
        if was.get(key) != value:
            raise InputError(
                f"{where}: {key} was {was.get(key)}, now it is {value}; a run goes on with what it "
                "began with: use another run_dir"
            )


def load(engine: TuneEngine, folder: Path, state: Mapping[str, Any]) -> None:
    """Sets weights and optimizer from a checkpoint and its state; every rank calls it, rank 0
    reads.
    """
    steps, first = int(state["optimizer_steps"]), distributed.rank() == 0
    averages: dict[str, Tensor] = {}
    if first and ALLOCATION in state["files"]:
        averages = safetensors.torch.load_file(folder / ALLOCATION)
    averages = distributed.from_rank_0(averages)
    peft_bridge.set_allocation(engine.model.backbone, averages, state.get("rank_pattern", {}))
    if not first:
        full_state.restore(engine, None, steps)
        return
    tensors = {
        "weight": safetensors.torch.load_file(folder / WEIGHTS),
        "moments": safetensors.torch.load_file(folder / MOMENTS),
    }

    def read(kind: str, name: str) -> Tensor:
        if kind == "weight":
            return tensors["weight"][name]
        return tensors["moments"][f"{kind}.{name}"]

    full_state.restore(engine, read, steps)


def save_best(
    engine: TuneEngine, run_dir: Path, fingerprint: str, about: Mapping[str, Any]
) -> None:
    """Writes best/ in the place of an older one; every rank calls it."""
    tensors = {name: value for _, name, value in full_state.gather(engine, ("weight",))}
    if distributed.rank() != 0:
        return
    aside = run_dir / "best.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    safetensors.torch.save_file(tensors, aside / TRAINED)
    model = engine.model
    delta = model.delta
    if delta is not None:
        whole = _whole(model, delta, tensors) if engine.sharded else delta
        extra = {name: value for name, value in tensors.items() if name.startswith("head.")}
        left_out = [model.source.head_name] if model.head is not None else []
        save_delta(whole, aside / "delta", fingerprint, trained=left_out, extra=extra, about=about)
    elif hasattr(model.backbone, "peft_config") and not engine.sharded:
        peft_bridge.save(model.backbone, aside / "peft")
    (aside / "best.json").write_text(json.dumps(dict(about), indent=2) + "\n", encoding="utf-8")
    for path in (*sorted(aside.rglob("*")), aside):
        flush_to_disk(path)
    put_in_place(aside, run_dir / "best")


def _whole(model: TaskModel, delta: Delta, tensors: Mapping[str, Tensor]) -> Delta:
    """The delta with whole tensors, where ZeRO stage 3 has taken its own apart."""
    config = config_from_dict(delta.config.to_dict())
    found = config.build(model.backbone, config.find(model.backbone))
    assert model.deltas is not None
    prefix = f"deltas.deltas.{model.deltas.names()[0]}."
    own = {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
    found.load_state_dict(own, strict=False)  # a tied factor is there once
    return found


@torch.no_grad()
def load_best(engine: TuneEngine, run_dir: Path) -> None:
    """Sets the trained parameters to those of best/; every rank calls it, and none trains on."""
    tensors: dict[str, Tensor] = {}
    path = run_dir / "best" / TRAINED
    pruned = engine.model.delta is not None and engine.run.deepspeed.zero_stage == 0
    if distributed.rank() == 0 or pruned:
        try:
            tensors = safetensors.torch.load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error})") from None
    now = {name: parameter.shape for name, parameter in full_state.trained(engine)}
    if pruned and now != {name: value.shape for name, value in tensors.items()}:
        _take_delta(engine.model, run_dir)  # it had ranks then that were dropped since
    full_state.restore_weights(engine, lambda name: tensors[name])


def _take_delta(model: TaskModel, run_dir: Path) -> None:
    """Puts the delta of best/ into the place of the one that was trained."""
    assert model.deltas is not None
    name = model.deltas.names()[0]
    loaded = load_delta(run_dir / "best" / "delta", model.backbone, any_backbone=True)
    model.deltas.remove(name)
    model.deltas.insert(name, loaded.delta)
