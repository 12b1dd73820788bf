"""AdamW over two groups of parameters: those that decay and those that do not."""

from typing import Any

import torch
from torch import nn

from training.config import TrainingConfig


def build_optimizer(model: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """torch's fused AdamW. Matrices and embeddings decay; biases and norm weights do not.

    torch's, not DeepSpeed's own: it compiles nothing at start, and every ZeRO stage takes it. The
    learning rate set here is replaced before each step (training/schedule.py).
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        # ds_shape: under ZeRO stage 3 a parameter at rest has the shape (0,).
        dimensions = len(getattr(parameter, "ds_shape", parameter.shape))
        (decay if dimensions >= 2 else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": decay, "weight_decay": config.weight_decay}]
    if rest:
        groups.append({"params": rest, "weight_decay": 0.0})
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
