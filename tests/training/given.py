"""Checkpoints for tests of what a run is given: a dense model, and its conversion to a rank."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from data.shards import PreparedData, sha256_file
from eval.convert.build import convert
from eval.convert.source import Dense
from eval.convert.write import write
from model import ModelConfig, Transformer, init_weights
from training import checkpoint


def dense_model(**changes: Any) -> Transformer:
    """A random model of the shape that tests.conftest.Runs trains, but vanilla. Its weights are
    four times as large as at a start, so that its blocks do something.
    """
    fields: dict[str, Any] = {
        "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2,
        "num_heads": 2, "max_seq_len": 64, "init_std": 0.08,
    }  # fmt: skip
    model = Transformer(ModelConfig(**(fields | changes)))
    init_weights(model, 3)
    return model


def write_checkpoint(
    folder: Path, prepared: Path, rank: int | None, model: Transformer | None = None
) -> Path:
    """The model as a checkpoint of this rank."""
    model = model or dense_model()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tokenizer = PreparedData.open(prepared).tokenizer
    dense = Dense(model.config, weights, tokenizer, 32, {"from": "a test"})
    config = dataclasses.replace(model.config, r=rank)
    found = convert(dense, config, {}, torch.device("cpu"), progress=False)
    write(folder, dense, found, {"method": "svd"})
    return folder


def write_run(run_dir: Path, prepared: Path, **record: Any) -> Path:
    """A run directory with a checkpoint of step 6 that can be gone on from, and what `record` adds
    to its checkpoint.json.
    """
    folder = run_dir / "checkpoints" / "step-00000006"
    folder.parent.mkdir(parents=True)
    write_checkpoint(folder, prepared, 8)
    safetensors.torch.save_file({"x": torch.zeros(1)}, folder / "optimizer.safetensors")
    state = json.loads((folder / "checkpoint.json").read_text())
    del state["sha256"]
    path = folder / "optimizer.safetensors"
    state["files"][path.name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    state |= {"step": 6, "optimizer_steps": 6, "skipped_steps": 0, "began_from": None}
    checkpoint.write_state(folder, state | record)
    return folder
