"""Weights, AdamW's moments and its step count as whole fp32 tensors, whatever ZeRO made of them.

This is what a checkpoint holds, so a run may go on with another number of ranks, another ZeRO stage
or with the optimizer on the CPU. At a step's end there is no other state: gradients are spent, and
learning rate, data order and dropout are functions of the step.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from training import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = ("weight", *MOMENTS)
# Where ZeRO keeps the flat fp32 tensors that AdamW steps on: stage 3, stages 1 and 2, bf16 at 1.
_FLAT = (
    "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups",
    "fp32_groups_flat_partition",
)


def _adamw(engine: Any) -> torch.optim.AdamW:
    """The optimizer inside of DeepSpeed's."""
    found: torch.optim.AdamW = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return found


def _stepped(engine: Any) -> list[Tensor]:
    """The tensors that AdamW steps on: ZeRO's flat ones, or (stage 0) the parameters."""
    for name in _FLAT:
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [p for group in engine.optimizer.param_groups for p in group["params"]]


def _ensure_moments(engine: Any) -> None:
    """Makes AdamW's state where no step has been taken yet, and lets DeepSpeed find it."""
    state = _adamw(engine).state
    for tensor in _stepped(engine):
        if not state[tensor]:
            # As torch.optim.AdamW does at its first step; fused, it counts steps on the device.
            state[tensor]["step"] = torch.zeros((), dtype=torch.float32, device=tensor.device)
            for moment in MOMENTS:
                state[tensor][moment] = torch.zeros_like(tensor)
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        # DeepSpeed links once, after the step of the first group, and misses the second's state.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def steps_taken(engine: Any) -> int:
    """AdamW's step count: optimizer steps without those left out."""
    _ensure_moments(engine)
    state = _adamw(engine).state
    counts = {int(state[tensor]["step"].item()) for tensor in _stepped(engine)}
    assert len(counts) == 1, f"groups disagree on the number of steps: {counts}"
    return counts.pop()


def trained(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and parameters of the model that are not frozen."""
    for name, parameter in engine.model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def gather(engine: Any, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, str, Tensor]]:
    """(kind, parameter's name, whole fp32 tensor on the CPU) for every kind and trained parameter;
    only rank 0 gets them, and every rank must go through all: collective.
    """
    _ensure_moments(engine)
    for name, parameter in trained(engine):
        for kind in kinds:
            value = read_whole(engine, parameter, kind)
            if distributed.rank() == 0:
                # A copy, also on the CPU: at stage 0 this is the live tensor.
                yield kind, name, value.detach().to("cpu", torch.float32, copy=True).contiguous()


def read_whole(engine: Any, parameter: Tensor, kind: str) -> Tensor:
    """A parameter's weight or moment, whole, on every rank; at stage 0 the live tensor. Collective
    at stages 1 to 3.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if engine.run.deepspeed.zero_stage == 0:
        return parameter if kind == "weight" else _adamw(engine).state[parameter][kind]
    value: Tensor
    if kind == "weight":
        value = safe_get_full_fp32_param(parameter)
    else:
        value = safe_get_full_optimizer_state(parameter, kind)
    return value


def restore(engine: Any, read: Callable[[str, str], Tensor] | None, steps: int) -> None:
    """Sets the whole state; every rank calls it. read(kind, name) is called on rank 0 alone and
    gives what `gather` gave; the others receive it.
    """
    _ensure_moments(engine)
    state = _adamw(engine).state
    for name, parameter in trained(engine):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        for kind in KINDS:
            value = torch.empty(shape, dtype=torch.float32, device=engine.device)
            if distributed.rank() == 0:
                assert read is not None
                value.copy_(read(kind, name))
            if distributed.world_size() > 1:
                dist.broadcast(value, src=0)
            write_whole(engine, parameter, kind, value)
    for tensor in _stepped(engine):
        state[tensor]["step"].fill_(steps)


def restore_weights(engine: Any, read: Callable[[str], Tensor]) -> None:
    """Sets the trained weights alone; every rank calls it. read(name) is called on rank 0."""
    for name, parameter in trained(engine):
        shape = getattr(parameter, "ds_shape", parameter.shape)
        value = torch.empty(shape, dtype=torch.float32, device=engine.device)
        if distributed.rank() == 0:
            value.copy_(read(name))
        if distributed.world_size() > 1:
            dist.broadcast(value, src=0)
        write_whole(engine, parameter, "weight", value)


@torch.no_grad()
def write_whole(engine: Any, parameter: Tensor, kind: str, value: Tensor) -> None:
    """Writes one whole tensor, which all ranks have, to where it belongs on this rank."""
    if engine.run.deepspeed.zero_stage == 0:
        read_whole(engine, parameter, kind).copy_(value)
        return
    set_fp32(engine, parameter, kind, value)
    if kind == "weight":  # what the model computes with, beside the fp32 weight
        with engine.gather(parameter) if engine.sharded else nullcontext():
            parameter.copy_(value)


@torch.no_grad()
def set_fp32(engine: Any, parameter: Tensor, kind: str, value: Tensor) -> None:
    """Writes this rank's part of ZeRO's fp32 weight, or of a moment, from the whole value."""
    key = None if kind == "weight" else kind
    if not engine.sharded:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        return
    # DeepSpeed's own function takes equal parts, and fails where the last one is padded.
    zero = engine.optimizer
    part, _ = zero._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=key
    )
    start = part.numel() * zero._get_param_partition_rank(parameter)
    mine = value.flatten()[start : start + part.numel()]
    part[: mine.numel()].copy_(mine)
