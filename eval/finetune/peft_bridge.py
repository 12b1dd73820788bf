"""Methods of the package peft in the loop, and the ranks that its AdaLoRA allocates on the way."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import InputError
from eval.finetune.config import fail_as_input

ADAPTER = "default"  # peft's name of the only one
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of its rank allocator, by parameter


def wrap(backbone: nn.Module, delta: dict[str, Any], steps: int) -> nn.Module:
    """The backbone in peft's wrapper. steps: optimizer steps of the run, which schedules of ranks
    follow. InputError where peft is missing, or refuses.
    """
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
    if "total_step" in inspect.signature(known[kind]).parameters:
        given = fields.setdefault("total_step", steps)
        if given != steps:
            raise InputError(
                f"delta.total_step: {given}, but the run has {steps} steps; leave it out, and it "
                "is the run's"
            )
    try:
        wrapped: Any = peft.get_peft_model(backbone, known[kind](**fields))
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        found = fail_as_input(error)
        raise InputError(f"delta: peft's {kind} does not fit this backbone: {found}") from None
    module: nn.Module = wrapped
    return module


def allocates_ranks(backbone: nn.Module) -> bool:
    """Whether a method of peft looks at the gradients of each step to allocate its ranks."""
    return hasattr(getattr(backbone, "base_model", None), "update_and_allocate")


def allocate(backbone: nn.Module, step: int) -> None:
    """AdaLoRA's allocation after optimizer step `step`, 0-based, while its gradients are there."""
    tuner: Any = backbone.base_model
    tuner.update_and_allocate(step)


def allocation(backbone: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What allocation goes on from: its running averages by name, and the pattern of open ranks."""
    if not allocates_ranks(backbone):
        return {}, {}
    tuner: Any = backbone.base_model
    allocator = tuner.rankallocator
    tensors = {
        f"{kind}.{name}": value
        for kind in _AVERAGES
        for name, value in getattr(allocator, kind).items()
    }
    return tensors, dict(tuner.peft_config[ADAPTER].rank_pattern or {})


@torch.no_grad()
def set_allocation(
    backbone: nn.Module, tensors: dict[str, Tensor], pattern: dict[str, Any]
) -> None:
    """Takes up what `allocation` gave."""
    if not allocates_ranks(backbone):
        return
    tuner: Any = backbone.base_model
    device = next(backbone.parameters()).device
    for kind in _AVERAGES:
        own = {
            name.removeprefix(f"{kind}."): value.to(device)
            for name, value in tensors.items()
            if name.startswith(f"{kind}.")
        }
        setattr(tuner.rankallocator, kind, own)
    tuner.peft_config[ADAPTER].rank_pattern = pattern
