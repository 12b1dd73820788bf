"""A training loop in plain torch, written from the documentation: what train.py must reproduce."""

from typing import Any

import torch

from data.loader import WindowLoader
from data.shards import PreparedData
from model import Transformer, init_weights
from training.config import RunConfig
from training.schedule import learning_rate


def plain_training(run: RunConfig, steps: int) -> list[dict[str, Any]]:
    """Loss, learning rate and gradient norm of each step on whole batches, without DeepSpeed."""
    training = run.training
    model = Transformer(run.model)
    init_weights(model, training.seed)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        betas=(training.beta1, training.beta2),
        eps=training.eps,
    )
    stream = PreparedData.open(run.data.path).split("train")
    loader = WindowLoader(stream, training.seq_len, training.seed)
    size, records = training.global_batch_size, []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step)
        tokens = torch.from_numpy(loader.batch(step * size, size))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clipping)
        optimizer.step()
        lr = optimizer.param_groups[0]["lr"]
        records.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": lr})
    return records
