"""Format safetensors: a checkpoint of ours without optimizer state, in the precision asked for."""

import shutil
from pathlib import Path

import safetensors.torch
import torch

from data.shards import sha256_file
from model.export.source import Source
from training import checkpoint


def write_ours(source: Source, dtype: torch.dtype, folder: Path) -> int:
    """Writes model.safetensors, model.json, tokenizer.model and the checkpoint.json with which our
    own commands read them; the model's parameters.
    """
    model = source.model()
    weights = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    if model.config.tie_embeddings:
        del weights["lm_head.weight"]  # the file has no place for a tensor with two names
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    source.config.to_json(folder / "model.json")
    shutil.copyfile(source.folder / "tokenizer.model", folder / "tokenizer.model")
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    # Where its run began, and from what, are paths of this machine; the sums stay.
    state = {**source.state, "began_from": None, "files": files}
    for key, paths in (("init_from", ("path", "folder")), ("converted", ("from",))):
        if isinstance(state.get(key), dict):
            state[key] = {k: v for k, v in state[key].items() if k not in paths}
    checkpoint.write_state(folder, state)
    return source.config.num_parameters()
