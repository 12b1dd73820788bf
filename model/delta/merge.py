"""Deltas into the weights of their backbone, dense or factorised, and out of them again."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from model.delta.base import Delta
from model.delta.deltas import Deltas
from model.delta.methods.lora import LoraLayer
from model.delta.methods.tied_lora import TiedLoraLayer
from model.delta.target import Target, as_target


@dataclass
class Merged:
    """What `unmerge` needs: the parameters of the targets as they were, by path and leaf."""

    before: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def low_rank(delta: Delta) -> dict[str, tuple[Tensor, Tensor]]:
    """For each target B (d_out, r) and A (r, d_in), of which B A is what the delta adds to its
    weight. ValueError where a layer adds no such product.
    """
    found = {}
    for name, layer in delta.named_layers():
        if not isinstance(layer, LoraLayer | TiedLoraLayer):
            raise ValueError(
                f"{name}: {delta.config.method} adds no low-rank matrix to a weight; what can be "
                "merged are lora, sora and tied_lora"
            )
        found[name] = layer.factors()
    return found


@torch.no_grad()
def merge(deltas: Deltas, *names: str) -> Merged:
    """Adds deltas to the backbone's weights and drops them from `deltas`.

    A dense weight becomes W + B A. A factorised one becomes the product of [B, B_δ] and [A; A_δ],
    exactly, at the sum of the ranks; where that is no smaller than the dense weight it still is
    correct. Sums are in float64, rounded once to the weight's dtype. ValueError, with nothing
    changed, where a target cannot take a matrix: its factors have a norm or an activation between
    them, or its weight is shared with another module.
    """
    products = {name: low_rank(deltas[name]) for name in names}
    modules = dict(deltas.backbone.named_modules())
    paths = list(dict.fromkeys(path for found in products.values() for path in found))
    targets = {path: as_target(path, modules[path]) for path in paths}
    for target in targets.values():
        _check(target, deltas.backbone)
    merged = Merged()
    for path, target in targets.items():
        parts = [found[path] for found in products.values() if path in found]
        add = _add_factors if target.kind == "factorised" else _add_dense
        add(target, parts, merged)
    for name in names:
        deltas.remove(name)
    return merged


@torch.no_grad()
def unmerge(backbone: nn.Module, merged: Merged) -> None:
    """Puts the weights back that `merge` replaced, bit by bit."""
    modules = dict(backbone.named_modules())
    for (path, leaf), value in merged.before.items():
        _set(modules[path], leaf, value)


def _check(target: Target, backbone: nn.Module) -> None:
    """ValueError where a target cannot take a matrix."""
    module = target.module
    between = getattr(module, "latent_norm", None) is not None
    if target.kind == "factorised" and (between or getattr(module, "latent_silu", False)):
        raise ValueError(
            f"{target.name}: something stands between its factors, so no matrix can be added to "
            "their product"
        )
    leaf = "A" if target.kind == "factorised" else "weight"
    own = getattr(module, leaf)
    for name, other in backbone.named_modules():
        for parameter in other.parameters(recurse=False):
            if parameter is own and other is not module:
                raise ValueError(f"{target.name}: its weight is also that of {name}")


def _add_dense(target: Target, parts: list[tuple[Tensor, Tensor]], merged: Merged) -> None:
    weight = target.module.weight
    assert isinstance(weight, Tensor)
    total = weight.double()
    for up, down in parts:
        product = (up.double() @ down.double()).to(total.device)
        total = total + (product.T if target.kind == "transposed" else product)
    merged.before[target.name, "weight"] = weight.detach().clone()
    _set(target.module, "weight", total.to(weight.dtype))


def _add_factors(target: Target, parts: list[tuple[Tensor, Tensor]], merged: Merged) -> None:
    module = target.module
    A, B = module.A, module.B
    assert isinstance(A, Tensor)
    assert isinstance(B, Tensor)
    downs = [A, *(down.to(A.device, A.dtype) for _, down in parts)]
    ups = [B, *(up.to(B.device, B.dtype) for up, _ in parts)]
    new = {"A": torch.cat(downs), "B": torch.cat(ups, dim=1)}
    bias = getattr(module, "bias_A", None)
    if isinstance(bias, Tensor):  # the new latents have none
        new["bias_A"] = torch.cat([bias, bias.new_zeros(len(new["A"]) - len(A))])
    for leaf, value in new.items():
        merged.before[target.name, leaf] = getattr(module, leaf).detach().clone()
        _set(module, leaf, value)


def _set(module: nn.Module, leaf: str, value: Tensor) -> None:
    """Another value for a parameter, of another shape perhaps."""
    old = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(value, requires_grad=old.requires_grad))
    if leaf == "A" and hasattr(module, "rank"):
        setattr(module, "rank", value.size(0))  # noqa: B010 (the attribute is no module's)
