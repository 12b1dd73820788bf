"""Writing the converted model as a checkpoint of ours, whole or not at all."""

import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from data.errors import InputError
from data.shards import sha256_file
from eval.convert.build import Converted
from eval.convert.source import Dense
from training import checkpoint
from training.saving import flush_to_disk, put_in_place


def require_new(output: Path) -> None:
    """InputError, before any work, where the result could not be written to this folder."""
    if output.exists():
        raise InputError(f"--output {output}: it exists; give a folder that does not")
    if not output.absolute().parent.is_dir():
        raise InputError(f"--output {output}: the folder {output.parent} does not exist")


def write(output: Path, dense: Dense, converted: Converted, how: dict[str, Any]) -> None:
    """Writes the checkpoint: as training/checkpoint.py reads it, of step 0, without optimizer
    state. how: the method, for checkpoint.json.
    """
    aside = output.with_name(output.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        converted.config.to_json(aside / "model.json")
        shutil.copyfile(dense.tokenizer.path, aside / "tokenizer.model")
        weights = {name: weight.contiguous() for name, weight in converted.weights.items()}
        safetensors.torch.save_file(weights, aside / "model.safetensors")
        checkpoint.write_state(aside, _state(aside, dense, how))
        for path in (*sorted(aside.iterdir()), aside):
            flush_to_disk(path)
        require_new(output)  # it may have come while we computed
        put_in_place(aside, output)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, SafetensorError):  # how it reports a full disk
            raise InputError(f"--output {output}: cannot be written ({error})") from None
        raise


def _state(aside: Path, dense: Dense, how: dict[str, Any]) -> dict[str, Any]:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(aside.iterdir())
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
