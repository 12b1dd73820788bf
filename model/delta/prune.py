"""Removing the ranks that SoRA's gates have closed, from the parameters and the optimizer."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from model.delta.base import Delta
from model.delta.methods.lora import LoraConfig, LoraLayer
from model.delta.methods.sora import SoraLayer


class RankRow(NamedTuple):
    """A target in the rank report."""

    target: str
    kept: int
    rank: int
    parameters: int  # of A, B and gate
    parameters_kept: int


def rank_report(delta: Delta) -> list[RankRow]:
    """For each SoRA layer its ranks with an open gate, and parameters by true shapes."""
    rows = []
    for name, layer in delta.named_layers():
        if isinstance(layer, SoraLayer):
            kept, each = layer.num_kept(), layer.A.size(1) + layer.B.size(0) + 1
            rows.append(RankRow(name, kept, layer.rank, layer.rank * each, kept * each))
    return rows


@torch.no_grad()
def prune(delta: Delta, optimizer: Optimizer | None = None) -> int:
    """Drops every rank whose gate is 0, and its part of the optimizer's state; returns how many.

    Outputs do not change, but for rounding. The layers get new parameters, which take the places of
    the old ones in the optimizer. A layer may come to rank 0 and adds nothing then. Not under ZeRO
    stages 1 to 3, where the optimizer holds flat copies: prune after training there.
    """
    dropped = 0
    for _, layer in delta.named_layers():
        if not isinstance(layer, SoraLayer):
            continue
        kept = layer.gate.detach().nonzero().flatten()
        dropped += layer.rank - len(kept)
        if len(kept) == layer.rank:
            continue
        for leaf, axis in (("A", 0), ("B", 1), ("gate", 0)):
            old = getattr(layer, leaf)
            new = _selected(old, axis, kept)
            setattr(layer, leaf, new)
            if optimizer is not None:
                _replace(optimizer, old, new, axis, kept)
    return dropped


def _selected(parameter: nn.Parameter, axis: int, kept: Tensor) -> nn.Parameter:
    """Some rows or columns of a parameter and of its gradient. A new one: graphs that are alive
    still know the shape of the old.
    """
    value = parameter.detach().index_select(axis, kept).contiguous()
    new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        new.grad = parameter.grad.index_select(axis, kept).contiguous()
    return new


def _replace(
    optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, axis: int, kept: Tensor
) -> None:
    """Puts a parameter into the place of another, with the kept part of its state."""
    for group in optimizer.param_groups:
        group["params"] = [new if one is old else one for one in group["params"]]
    state: dict[str, Any] = optimizer.state.pop(old, {})
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            state[key] = value.index_select(axis, kept).contiguous()
    if state:
        optimizer.state[new] = state


@torch.no_grad()
def compact(delta: Delta) -> Delta:
    """A LoRA that computes what a SoRA computes: closed ranks dropped, each at its own rank, gates
    and scale folded so that s is 1 everywhere. Layers of rank 0 are left out.

    ValueError where the delta is no SoRA, or every gate is closed.
    """
    layers: dict[str, LoraLayer] = {}
    for name, layer in delta.named_layers():
        if not isinstance(layer, SoraLayer):
            raise ValueError(f"{name}: a {type(layer).__name__}; only SoRA layers have gates")
        kept = layer.gate.detach().nonzero().flatten()
        if not len(kept):
            continue
        new = LoraLayer(layer.A.size(1), layer.B.size(0), len(kept), 1.0, layer.dropout)
        up, down = layer.factors()
        new.to(layer.A.device, layer.A.dtype)
        new.A.copy_(down[kept])
        new.B.copy_(up[:, kept])
        layers[name] = new
    if not layers:
        raise ValueError("every gate is closed: nothing is left of the delta")
    old = delta.config
    assert isinstance(old, LoraConfig)
    ranks = {name: layer.rank for name, layer in layers.items()}
    config = LoraConfig(
        targets=list(layers),
        r=max(ranks.values()),
        alpha=old.alpha,
        dropout=old.dropout,
        ranks=ranks,
        scales=dict.fromkeys(layers, 1.0),
    )
    return Delta.of(config, dict(layers))
