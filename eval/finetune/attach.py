"""What is trained of a backbone: a delta, everything, the head alone, or what peft adds."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.errors import InputError
from eval.finetune import peft_bridge
from eval.finetune.config import PEFT
from eval.finetune.heads import TaskModel
from model.delta import Deltas, config_from_dict
from model.delta.files import CONFIG, load_delta
from model.delta.prox import gate_parameters
from model.delta.target import whole_shape

NAME = "tuned"  # of the delta


def attach(
    model: TaskModel,
    delta: dict[str, Any],
    seed: int,
    steps: int,
    start: str | None = None,
    freeze_delta: bool = False,
    pruned: bool = False,
) -> None:
    """Adds the parameters that `delta` means, freezes what is not trained. steps: of the run.
    start: a delta's folder to take them from; freeze_delta: only a head is trained; pruned: it may
    have no rank left. InputError where it does not fit the backbone.
    """
    torch.manual_seed(seed)
    method = delta["method"]
    if method == "full":
        return
    if method == PEFT:
        model.backbone = peft_bridge.wrap(model.backbone, delta, steps, model.head is None)
        return
    for parameter in model.backbone.parameters():
        parameter.requires_grad_(False)
    if method == "head":
        if model.head is None:
            head = model.backbone.get_submodule(model.source.head_name)
            head.requires_grad_(True)
        return
    deltas = Deltas(model.backbone)
    try:
        if start is None and pruned:
            config = config_from_dict(delta)
            deltas.insert(NAME, config.build(model.backbone, config.find(model.backbone)))
        elif start is None:
            deltas.add(NAME, config_from_dict(delta))
    except ValueError as error:
        raise InputError(f"delta.{error}") from None
    if start is not None:
        _begin_from(model, deltas, delta, Path(start))
    model.deltas = deltas
    if freeze_delta:
        if model.head is None:
            raise InputError(f"freeze_delta: {model.task} has no head, so nothing would be trained")
        deltas.requires_grad_(False)


def _begin_from(model: TaskModel, deltas: Deltas, delta: dict[str, Any], start: Path) -> None:
    """The delta of a folder, and its head where it is one of this task."""
    try:
        loaded = load_delta(start, model.backbone)
    except ValueError as error:
        raise InputError(f"start: {error}") from None
    wanted = config_from_dict(delta)
    if loaded.delta.config != wanted:
        raise InputError(
            f"start {start}: its delta is {loaded.delta.config}, and `delta` says {wanted}; they "
            "must be the same"
        )
    deltas.insert(NAME, loaded.delta)
    head = loaded.extra.get("head.weight")
    if head is None or model.head is None or loaded.about.get("task") != model.task:
        return
    if head.shape != model.head.weight.shape:
        raise InputError(
            f"start {start}: its head is {tuple(head.shape)}, that of {model.task} here is "
            f"{tuple(model.head.weight.shape)}"
        )
    with torch.no_grad():
        model.head.weight.copy_(head)


def start_mark(start: str | None) -> str | None:
    """What tells a start from others: the sha256 of its tensors. InputError where it is none."""
    if start is None:
        return None
    path = Path(start) / CONFIG
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["tensors_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"start: {path}: not a delta's ({error})") from None


def groups(model: TaskModel, weight_decay: float, head_multiplier: float) -> list[dict[str, Any]]:
    """Groups of parameters for AdamW: gates by themselves, the head, vectors (no decay) and the
    rest. Each with the multiplier of its learning rate.
    """
    gates = {id(gate) for gate in gate_parameters(model)}
    found: dict[str, list[nn.Parameter]] = {"gates": [], "head": [], "vectors": [], "matrices": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gates:
            found["gates"].append(parameter)
        elif name.startswith("head."):
            found["head"].append(parameter)
        elif len(whole_shape(parameter)) < 2:
            found["vectors"].append(parameter)
        else:
            found["matrices"].append(parameter)
    decays = {"gates": 0.0, "head": weight_decay, "vectors": 0.0, "matrices": weight_decay}
    return [
        {
            "name": kind,
            "params": parameters,
            "weight_decay": decays[kind],
            "lr_multiplier": head_multiplier if kind == "head" else 1.0,
        }
        for kind, parameters in found.items()
        if parameters
    ]


def parameter_counts(model: TaskModel) -> dict[str, int]:
    """Trained elements by true shapes: of deltas, head and backbone, and in total."""
    found = {"delta": 0, "head": 0, "backbone": 0}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        size = 1
        for one in whole_shape(parameter):
            size *= one
        added = name.startswith("deltas.") or getattr(model.backbone, "peft_config", None)
        kind = "head" if name.startswith("head.") else "delta" if added else "backbone"
        found[kind] += size
    return found | {"total": sum(found.values())}
