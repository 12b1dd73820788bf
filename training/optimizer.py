"""AdamW and its groups of parameters: which decay, and at which multiple of the learning rate."""

from typing import Any

import torch
from torch import nn

from model.norm import RMSNorm
from model.projection import LowDim
from training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """torch's fused AdamW, one group for each pair of weight decay and learning-rate multiplier.

    A group's "lr_multiplier" is what its learning rate is multiplied by, at every step (see
    set_learning_rate). torch's AdamW, not DeepSpeed's own: it compiles nothing at start, and every
    ZeRO stage takes it.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
        # By module and name: under ZeRO stage 3 a parameter at rest has the shape (0,).
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        key = _weight_decay(module, leaf, config), _multiplier(module, leaf, config)
        groups.setdefault(key, []).append(parameter)
    described: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "lr_multiplier": multiplier}
        for (decay, multiplier), parameters in groups.items()
    ]
    return torch.optim.AdamW(
        described,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Gives each group its learning rate: the schedule's, times the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_multiplier"]


def _kinds(module: nn.Module, leaf: str) -> set[str]:
    """Of what training.no_decay names, what a parameter is: the bias of a LayerNorm is two."""
    found = set()
    if isinstance(module, RMSNorm | nn.LayerNorm):
        found.add("norms")
    if leaf.startswith("bias"):
        found.add("biases")
    if isinstance(module, nn.Embedding):
        found.add("embeddings")
    return found


def _is_factor(module: nn.Module, leaf: str) -> bool:
    return isinstance(module, LowDim) and leaf in ("A", "B")


def _weight_decay(module: nn.Module, leaf: str, config: TrainingConfig) -> float:
    """AdamW's decay of a parameter; factors whose product decays have none of their own."""
    if _kinds(module, leaf) & set(config.no_decay):
        return 0.0
    if _is_factor(module, leaf) and config.factor_decay == "product":
        return 0.0
    return config.weight_decay


def _multiplier(module: nn.Module, leaf: str, config: TrainingConfig) -> float:
    if not _is_factor(module, leaf):
        return 1.0
    return config.lr_multiplier_A if leaf == "A" else config.lr_multiplier_B
