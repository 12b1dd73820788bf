"""Methods of the package peft in the loop, and the ranks that its AdaLoRA allocates on the way."""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.errors import InputError
from eval.finetune.config import fail_as_input

ADAPTER = "default"  # peft's name of the only one
_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # of its rank allocator, by parameter


def wrap(backbone: nn.Module, delta: dict[str, Any], steps: int, generates: bool) -> nn.Module:
    """The backbone in peft's wrapper. steps: optimizer steps of the run, which schedules of ranks
    follow. generates: the task is scored on what the backbone writes. InputError where peft is
    missing, or refuses.
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
        settings: Any = known[kind](**fields)
        if hasattr(settings, "target_r") and not settings.init_r > settings.target_r >= 1:
            raise ValueError(
                f"init_r {settings.init_r} is reduced to target_r {settings.target_r}; allowed is "
                "init_r > target_r >= 1"
            )
        wrapped: Any = peft.get_peft_model(backbone, settings)
    except (TypeError, ValueError, AttributeError, KeyError, NotImplementedError) as error:
        found = fail_as_input(error)
        raise InputError(f"delta: peft's {kind} does not fit this backbone: {found}") from None
    module: nn.Module = wrapped
    if generates and wrapped.peft_config[ADAPTER].is_prompt_learning:
        raise InputError(
            f"delta.peft_type: {kind}, whose prompt peft adds in its wrapper, out of sight where a "
            "task of kind lm generates; use soft_prompt or prefix of model.delta"
        )
    return module


def allocates_ranks(backbone: nn.Module) -> bool:
    """Whether a method of peft looks at the gradients of each step to allocate its ranks."""
    return hasattr(getattr(backbone, "base_model", None), "update_and_allocate")


def allocate(backbone: nn.Module, step: int) -> None:
    """AdaLoRA's allocation after optimizer step `step`, 0-based, while its gradients are there.

    Steps that were not finite are left out. If that one is among them in which peft makes the ranks
    final, the next one does.
    """
    tuner: Any = backbone.base_model
    config = tuner.peft_config[ADAPTER]
    final = config.total_step - config.tfinal
    # With tfinal 0 it would be the step behind the last one.
    if step >= min(final, config.total_step - 1) and not _is_final(tuner):
        step = final
        if not tuner.rankallocator.ipt:
            tuner.rankallocator.update_ipt(tuner.model)
    tuner.update_and_allocate(step)


def _is_final(tuner: Any) -> bool:
    """Whether ranks are final: there is a pattern, and peft has dropped the averages."""
    return bool(tuner.peft_config[ADAPTER].rank_pattern) and not tuner.rankallocator.ipt


def save(backbone: nn.Module, folder: Path) -> None:
    """Writes what peft loads. Until ranks are final closed ones may grow again, so all are kept."""
    wrapped: Any = backbone
    config = wrapped.peft_config[ADAPTER]
    tuner = wrapped.base_model
    if not allocates_ranks(backbone) or _is_final(tuner):
        wrapped.save_pretrained(str(folder))
        return
    pattern, config.rank_pattern = config.rank_pattern, None
    try:
        wrapped.save_pretrained(str(folder))
    finally:
        config.rank_pattern = pattern


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
