"""Deltas to begin a new task with, of weighted sources."""

from collections.abc import Mapping

import torch

from eval.finetune.ensemble.config import EXACT
from model.delta import Delta, LoraConfig
from model.delta.ensemble import HIGHER_IS_BETTER, Method, average, combine, weights
from model.delta.methods.lora import LoraLayer


def all_weights(
    scores: Mapping[Method, Mapping[str, float]], names: list[str], temperature: float
) -> dict[str, dict[str, float]]:
    """Weights of the named sources: equal ones, and by each score."""
    found = {"equal": dict.fromkeys(names, 1 / len(names))}
    for method, values in scores.items():
        found[method] = weights(values, temperature, HIGHER_IS_BETTER[method])
    return found


def start(kind: str, parts: Mapping[str, Delta], by: Mapping[str, float]) -> Delta:
    """The start of a kind: the average of parameters, or after exact_ the average of ΔW."""
    return exact(parts, by) if kind.startswith(EXACT) else average(parts, by)


@torch.no_grad()
def exact(parts: Mapping[str, Delta], by: Mapping[str, float]) -> Delta:
    """The LoRA of the parts' configuration whose ΔW is nearest to Σ weight · ΔW.

    `combine` has the scale inside of the factors, half in each; here it is divided out of both, so
    that a step of an optimizer means what it means for the parts.
    """
    first = next(iter(parts.values()))
    config = first.config
    assert isinstance(config, LoraConfig)
    layers: dict[str, LoraLayer] = {}
    for path, like in first.named_layers():
        assert isinstance(like, LoraLayer)
        only = {name: Delta.of(config, {path: _layer(one, path)}) for name, one in parts.items()}
        found = combine(only, by, like.rank).layer(path)
        assert isinstance(found, LoraLayer)
        layer = LoraLayer(found.A.size(1), found.B.size(0), like.rank, like.scale, like.dropout)
        layer.to(found.A.device, found.A.dtype)
        for name in ("A", "B"):
            layer.get_parameter(name).copy_(found.get_parameter(name) / like.scale**0.5)
        layers[path] = layer
    return Delta.of(config, layers)


def _layer(delta: Delta, path: str) -> LoraLayer:
    found = delta.layer(path)
    assert isinstance(found, LoraLayer)
    return found
