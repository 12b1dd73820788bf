"""Perplexity and bits per byte of the dense model and of the converted one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from data.shards import PreparedData
from eval.convert.options import ConvertConfig
from eval.convert.source import Dense
from eval.scoring import score
from model import ModelConfig, Transformer


def open_data(options: ConvertConfig, dense: Dense) -> PreparedData | None:
    """The folder of --data. InputError where it has another tokenizer than the model."""
    if options.data is None:
        return None
    data = PreparedData.open(Path(options.data))
    if data.tokenizer.sha256 != dense.tokenizer.sha256:
        raise InputError(
            f"--data {options.data}: its tokenizer (sha256 {data.tokenizer.sha256}) is not that of "
            f"the model ({dense.tokenizer.sha256}); prepare it with --tokenizer "
            f"{dense.tokenizer.path}"
        )
    data.split(options.split)
    if options.method == "fwsvd":
        data.split(options.calibration_split)
    return data


def build_model(
    config: ModelConfig, weights: dict[str, Tensor], device: torch.device
) -> Transformer:
    """A model with these weights, in evaluation mode. A tied head is left out of `weights`."""
    with torch.device("meta"):
        model = Transformer(config)
    whole = dict(weights)
    if config.tie_embeddings:
        whole["lm_head.weight"] = whole["token_embedding.weight"]
    model.load_state_dict(whole, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.token_embedding.weight
    return model.to(device).eval()


def score_model(
    model: Transformer, data: PreparedData, options: ConvertConfig, dense: Dense
) -> dict[str, Any]:
    """Of --split, as eval.perplexity counts it: the same function, tokens and windows."""

    @torch.no_grad()
    def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = model(inputs, targets, reduction="none")
        return losses

    found = score(
        token_losses,
        data.split(options.split),
        dense.tokenizer.token_bytes(),
        seq_len=dense.seq_len,
        micro_batch_size=options.micro_batch_size,
        max_tokens=options.max_tokens,
        device=model.lm_head.weight.device,
        progress=True,
    )
    return found.to_dict()
