"""What is trained of a backbone: a delta, everything, the head alone, or what peft adds."""

from typing import Any

import torch
from torch import nn

from data.errors import InputError
from eval.finetune.config import PEFT, fail_as_input
from eval.finetune.heads import TaskModel
from model.delta import Deltas, config_from_dict
from model.delta.prox import gate_parameters
from model.delta.target import whole_shape

NAME = "tuned"  # of the delta


def attach(model: TaskModel, delta: dict[str, Any], seed: int) -> None:
    """Adds the parameters that `delta` means, freezes what is not trained. InputError where it
    does not fit the backbone.
    """
    torch.manual_seed(seed)
    method = delta["method"]
    if method == "full":
        return
    if method == PEFT:
        _attach_peft(model, delta)
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
        deltas.add(NAME, config_from_dict(delta))
    except ValueError as error:
        raise InputError(f"delta.{error}") from None
    model.deltas = deltas


def _attach_peft(model: TaskModel, delta: dict[str, Any]) -> None:
    try:
        import peft
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError:
        raise InputError("delta.method: peft needs the package peft; pip install peft") from None
    known = {str(kind.value): one for kind, one in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = delta["peft_type"]
    if kind not in known:
        raise InputError(f"delta.peft_type: {kind!r}; allowed are {', '.join(sorted(known))}")
    fields = {key: value for key, value in delta.items() if key not in ("method", "peft_type")}
    try:
        wrapped: Any = peft.get_peft_model(model.backbone, known[kind](**fields))
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        found = fail_as_input(error)
        raise InputError(f"delta: peft's {kind} does not fit this backbone: {found}") from None
    model.backbone = wrapped


def after_step(model: TaskModel, step: int) -> None:
    """What a peft method wants after each optimizer step: AdaLoRA allocates its ranks."""
    tuner = getattr(model.backbone, "base_model", None)
    allocate = getattr(tuner, "update_and_allocate", None)
    if allocate is not None:
        allocate(step)


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
