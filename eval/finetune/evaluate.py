"""Predictions of a tuned model for a split, made by all ranks together, and their metrics."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from eval.finetune.engine import TuneEngine
from eval.finetune.metrics import measure
from eval.finetune.reading import Example
from eval.finetune.tasks import Task
from eval.finetune.texts import Encoded, Encoder, collate
from training import distributed


def evaluate(
    engine: TuneEngine,
    task: Task,
    encoder: Encoder,
    examples: Sequence[Example],
    rows: Sequence[Encoded],
    batch_size: int,
) -> dict[str, float]:
    """The metrics of a task on examples, which `rows` are as ids; every rank calls it."""
    if task.kind == "lm":
        texts = generated(engine, task, encoder, examples)
        return measure(task, texts, [example.label for example in examples])
    outputs = predict(engine, rows, batch_size, task.outputs)
    predictions = outputs[:, 0] if task.kind == "regression" else outputs.argmax(axis=1)
    return measure(task, predictions, [example.label for example in examples])


def predict(
    engine: TuneEngine, rows: Sequence[Encoded], batch_size: int, outputs: int
) -> np.ndarray:
    """The head's outputs for rows, (n, outputs), on every rank.

    Rows of like length share a batch. Each rank makes the same number of forward passes, which ZeRO
    stage 3 needs: where batches do not divide, some ranks repeat one.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    world, rank = distributed.world_size(), distributed.rank()
    found = torch.zeros(len(rows), outputs, dtype=torch.float32, device=engine.device)
    for first in range(0, len(batches), world):
        mine = first + rank
        indices = batches[min(mine, len(batches) - 1)]
        batch = collate([rows[i] for i in indices], engine.device)
        result = engine.outputs(batch)
        if mine < len(batches):
            found[indices] = result
    return distributed.sum_over_ranks(found).cpu().numpy()


@torch.no_grad()
def generated(
    engine: TuneEngine, task: Task, encoder: Encoder, examples: Sequence[Example]
) -> list[str]:
    """What the model writes behind each prompt, greedily, on every rank."""
    source = engine.model.source
    engine.deepspeed.eval()
    world, rank = distributed.world_size(), distributed.rank()
    mine: dict[int, str] = {}
    room = encoder.prompt_room(task.max_new_tokens)
    for index in range(rank, len(examples), world):
        prompt = encoder.tokenizer.encode(examples[index].texts[0])
        ids = [encoder.tokenizer.bos_id, *prompt[max(0, len(prompt) - room) :]]
        new = source.greedy(ids, task.max_new_tokens, encoder.end, encoder.taken)
        mine[index] = encoder.tokenizer.decode(new).strip()
    parts: list[Any] = [mine]
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, mine)
    every = {index: text for part in parts for index, text in part.items()}
    return [every[index] for index in range(len(examples))]
