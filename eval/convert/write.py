"""Writing the converted model as a checkpoint of ours, whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch

from data.shards import sha256_file
from data.writing import new_folder
from eval.convert.build import Converted
from eval.convert.source import Dense
from training import checkpoint


def write(output: Path, dense: Dense, converted: Converted, how: dict[str, Any]) -> None:
    """Writes the checkpoint: as training/checkpoint.py reads it, of step 0, without optimizer
    state. how: the method, for checkpoint.json.
    """
    with new_folder(output) as folder:
        converted.config.to_json(folder / "model.json")
        shutil.copyfile(dense.tokenizer.path, folder / "tokenizer.model")
        weights = {name: weight.contiguous() for name, weight in converted.weights.items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        checkpoint.write_state(folder, _state(folder, dense, how))


def _state(folder: Path, dense: Dense, how: dict[str, Any]) -> dict[str, Any]:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    return {
        "format_version": checkpoint.FORMAT_VERSION,
        "step": 0,
        "tokens": 0,
        "seq_len": dense.seq_len,
        "tokenizer_sha256": dense.tokenizer.sha256,
        "converted": {**dense.origin, **how},
        "files": files,
    }
