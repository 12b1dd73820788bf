"""The least training loop with DeepSpeed: python -m training.bench.minimal_loop RUN.yaml OUTPUT.

The model, initial weights, optimizer, DeepSpeed configuration and data are those of train.py with
the same YAML; the learning rate is constant. Every log_every steps it reads the loss and the time.
"""

import json
import sys
import time
from pathlib import Path

import deepspeed
import torch
import yaml

from data.loader import WindowLoader
from data.shards import PreparedData
from model import ModelConfig, Transformer, init_weights
from training import distributed
from training.config import DataConfig, DeepSpeedConfig, RunConfig, TrainingConfig
from training.engine import deepspeed_config
from training.optimizer import build_optimizer


def read(path: str) -> RunConfig:
    """The run that a YAML written by the benchmark describes."""
    blocks = yaml.safe_load(Path(path).read_text())
    model, training = ModelConfig(**blocks["model"]), TrainingConfig(**blocks["training"])
    return RunConfig(
        model, training, DataConfig(**blocks["data"]), DeepSpeedConfig(**blocks["deepspeed"])
    )


def main(config: str, output: str) -> None:
    """Trains."""
    run = read(config)
    training, batch = run.training, run.training.global_batch_size
    distributed.init_distributed()
    distributed.prepare_deepspeed()
    deepspeed.init_distributed(dist_backend=None)
    model = Transformer(run.model)
    init_weights(model, training.seed)
    optimizer = build_optimizer(model, training)
    settings = deepspeed_config(run, world_size=1)
    settings["gradient_clipping"] = training.gradient_clipping  # at stage 0 train.py clips itself
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]
    stream = PreparedData.open(run.data.path).split("train")
    loader = WindowLoader(stream, training.seq_len, training.seed)
    steps = range(training.max_steps)
    batches = [torch.from_numpy(loader.batch(step * batch, batch)) for step in steps]
    records, begun = [], time.perf_counter()
    for step, tokens in enumerate(batches, start=1):
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        if step % training.log_every == 0:
            value, now = loss.item(), time.perf_counter()
            seconds = (now - begun) / training.log_every
            records.append({"step": step, "loss": value, "seconds_per_step": seconds})
            begun = now
    Path(output).write_text(json.dumps(records))
    distributed.leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
