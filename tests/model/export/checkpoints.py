"""Checkpoints of random tiny models, without training."""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from data.shards import sha256_file
from data.tokenizer import Tokenizer
from model import ModelConfig, Transformer, init_weights
from training import checkpoint

SHAPE: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4,
    "max_seq_len": 64, "r": 8,
}  # fmt: skip


def random_model(**changes: Any) -> Transformer:
    """A model whose logits differ a lot between tokens; norms and biases are not trivial either."""
    config = ModelConfig.from_dict(SHAPE | changes)
    model = Transformer(config)
    init_weights(model, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif "bias" in name:
                parameter.copy_(0.1 * noise)
            elif not name.endswith(".A"):  # a product keeps unit scale, a table or head gets it
                parameter.copy_(noise / parameter.size(1) ** 0.5)
    return model.eval()


def write_checkpoint(model: Transformer, tokenizer: Path, folder: Path, **state: Any) -> Path:
    """The folder of a checkpoint, as training leaves it but for the optimizer's state."""
    folder.mkdir(parents=True)
    weights = dict(model.state_dict())
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    model.config.to_json(folder / "model.json")
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    seal(folder, **state)
    return folder


def seal(folder: Path, **state: Any) -> None:
    """checkpoint.json, for the files as they are."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
        if path.name != "checkpoint.json"
    }
    about = {"format_version": 3, "step": 7, "tokens": 1234, "seq_len": 32, "files": files}
    sums = {"tokenizer_sha256": Tokenizer(folder / "tokenizer.model").sha256}
    checkpoint.write_state(folder, about | sums | state)


def bound(model: Transformer, logits: torch.Tensor) -> float:
    """How far two orders of the same fp32 sums may lie apart.

    A token passes 8 products a layer (q, k, v, scores, weighted sum, o, two of the FFN), each a sum
    of at most max(d, f) terms, whose rounding is about √terms · 2⁻²³ of its size. Rotary angles in
    float32 are off by up to 2⁻²³ of the position, as ours are not.
    """
    config = model.config
    terms = max(config.hidden_size, config.intermediate_size) ** 0.5
    roundings = 8 * config.num_layers * terms + config.max_seq_len
    return float(logits.detach().abs().max()) * roundings * 2.0**-23
