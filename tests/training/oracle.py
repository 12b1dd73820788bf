"""A training loop in plain torch, written from the documentation: what train.py must reproduce."""

from typing import Any

import torch
from torch import Tensor, nn

from data.loader import WindowLoader
from data.shards import PreparedData
from model import Transformer, init_weights
from training.config import RunConfig, TrainingConfig
from training.schedule import learning_rate


def plain_training(run: RunConfig, steps: int) -> list[dict[str, Any]]:
    """Loss, learning rate and gradient norm of each step on whole batches, without DeepSpeed."""
    return plain_run(run, steps)[0]


def plain_run(run: RunConfig, steps: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What plain_training gives, and the weights after the last step."""
    training = run.training
    model = Transformer(run.model)
    init_weights(model, training.seed)
    named = dict(model.named_parameters())
    # One group a parameter, so that nothing here depends on how parameters are grouped.
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": decay(n, training)} for n, p in named.items()],
        betas=(training.beta1, training.beta2),
        eps=training.eps,
    )
    stream = PreparedData.open(run.data.path).split("train")
    loader = WindowLoader(stream, training.seq_len, training.seed)
    size, records = training.global_batch_size, []
    for step in range(steps):
        lr = learning_rate(training, step)
        for group, name in zip(optimizer.param_groups, named, strict=True):
            group["lr"] = lr * multiplier(name, training)
        tokens = torch.from_numpy(loader.batch(step * size, size))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
        if training.factor_decay == "product":
            decay_products(named, lr, training)
        optimizer.step()
        records.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": lr})
    return records, {name: p.detach() for name, p in named.items()}


def decay(name: str, training: TrainingConfig) -> float:
    """AdamW's weight decay of a parameter, by its name."""
    words = {"norms": "norm", "biases": "bias", "embeddings": "embedding"}
    if any(words[kind] in name for kind in training.no_decay):
        return 0.0
    if name.endswith((".A", ".B")) and training.factor_decay == "product":
        return 0.0
    return training.weight_decay


def multiplier(name: str, training: TrainingConfig) -> float:
    """What the learning rate of a parameter is multiplied by, by its name."""
    factors = {"A": training.lr_multiplier_A, "B": training.lr_multiplier_B}
    return factors.get(name.rpartition(".")[2], 1.0)


@torch.no_grad()
def decay_products(named: dict[str, nn.Parameter], lr: float, training: TrainingConfig) -> None:
    """The decoupled step on (weight_decay / 2) · ‖B A‖², through the dense W = B A."""
    for name in [n.removesuffix(".A") for n in named if n.endswith(".A")]:
        A, B = named[f"{name}.A"], named[f"{name}.B"]
        W = B @ A
        step_A, step_B = B.T @ W, W @ A.T
        A -= lr * training.lr_multiplier_A * training.weight_decay * step_A
        B -= lr * training.lr_multiplier_B * training.weight_decay * step_B
