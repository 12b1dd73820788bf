"""What must be equal for a comparison to be fair, as it ran and not as it was asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from data.errors import InputError
from model.execution import Execution, Plan, plan
from training.config import RunConfig

Conditions = dict[str, Any]


def expected_plan(run: RunConfig, device: torch.device, training: bool) -> Plan:
    """What a run's execution will come to, before anything is built. InputError where it cannot be
    had.
    """
    try:
        return plan(run.model, run.execution, device, run.training.torch_dtype, training)
    except ValueError as error:
        raise InputError(str(error)) from None


def conditions(run: RunConfig, chosen: Plan, training: bool) -> Conditions:
    """Each key that must be equal, with what it came to. Of a forward pass alone, what concerns
    gradients and the optimizer is left out.
    """
    found = {
        f"training.{name}": getattr(run.training, name)
        for name in ("precision", "micro_batch_size", "seq_len")
    }
    found["execution.kernels"] = _kernels(chosen)
    lines = [line.partition(": ") for line in chosen.lines]
    found["execution.attention"] = "; ".join(text for what, _, text in lines if what == "attention")
    found["execution.compile"] = "compiled" if chosen.compiled else "not compiled"
    for field in dataclasses.fields(Execution):
        key = f"execution.{field.name}"
        if key not in found and (training or not field.name.startswith("recompute")):
            found[key] = getattr(run.execution, field.name)
    if training:
        found["training.gradient_clipping"] = run.training.gradient_clipping
        for name, value in dataclasses.asdict(run.deepspeed).items():
            found[f"deepspeed.{name}"] = value
    return found


def _kernels(chosen: Plan) -> str:
    """What computes the layers, without the names of the operators: those of LPA and vanilla are
    not the same.
    """
    if not chosen.fused:
        return "plain torch"
    triton = any(line.startswith("kernels: fused operators; Triton:") for line in chosen.lines)
    plain = any(line.startswith("kernels: fused operators; plain") for line in chosen.lines)
    inside = [name for name, there in (("Triton", triton), ("plain torch", plain)) if there]
    return f"fused operators by {' and '.join(inside)}"


def differences(found: Mapping[str, Conditions]) -> dict[str, list[Any]]:
    """The keys in which two sides differ, with the value of each."""
    first, second = found.values()
    return {k: [first[k], second[k]] for k in first if first[k] != second[k]}


def require_equal(
    found: Mapping[str, Conditions], names: Mapping[str, str], allowed: bool
) -> dict[str, list[Any]]:
    """The differences; InputError, naming each key and both values, where none are allowed."""
    unequal = differences(found)
    if unequal and not allowed:
        first, second = (names[side] for side in found)
        parts = [f"{k} is {a} of {first} and {b} of {second}" for k, (a, b) in unequal.items()]
        raise InputError(
            f"unequal conditions: {'; '.join(parts)}; make them equal, or give --allow_unequal"
        )
    return unequal


def model_differences(runs: Mapping[str, RunConfig]) -> dict[str, list[Any]]:
    """The keys of `model` in which two runs differ: of twins, r alone."""
    first, second = (dataclasses.asdict(run.model) for run in runs.values())
    return {f"model.{k}": [first[k], second[k]] for k in first if first[k] != second[k]}
