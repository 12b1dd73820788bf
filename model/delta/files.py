"""A delta on disk: delta.safetensors and delta.json, with a fingerprint of its backbone."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from model.delta.base import Delta, config_from_dict
from model.delta.target import matches

FORMAT_VERSION = 1
CONFIG, TENSORS = "delta.json", "delta.safetensors"


class Loaded(NamedTuple):
    """A delta read from a folder.

    Attributes:
        delta: It, built for the backbone that was given.
        extra: Tensors of the backbone that were trained with it, by their names there, such as a
            classification head; they are not put into the backbone.
        about: What the writer wrote beside it.
        backbone_fingerprint: Of the backbone that it was trained on.
        trained_modules: Patterns of modules that the fingerprint leaves out.
    """

    delta: Delta
    extra: dict[str, Tensor]
    about: dict[str, Any]
    backbone_fingerprint: str
    trained_modules: list[str]


@torch.no_grad()
def fingerprint(backbone: nn.Module, trained: Sequence[str] = ()) -> str:
    """sha256 over names, shapes and values of a backbone's parameters and buffers that it saves.

    Values are rounded to bfloat16, so that a backbone loaded in float32 and in bfloat16 has the
    same. trained: patterns of modules to leave out, because they are trained with the delta.
    """
    digest = hashlib.sha256()
    for name, value in sorted(backbone.state_dict().items()):
        owner = name.rpartition(".")[0].split(".")
        paths = [".".join(owner[:end]) for end in range(1, len(owner) + 1)]
        if any(matches(path, pattern) for path in paths for pattern in trained):
            continue
        digest.update(f"{name}{tuple(value.shape)}".encode())
        if value.is_floating_point():
            value = value.to(torch.bfloat16).view(torch.int16)
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_delta(
    delta: Delta,
    folder: Path,
    backbone_fingerprint: str,
    *,
    trained: Sequence[str] = (),
    extra: Mapping[str, Tensor] | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a delta's folder, whole or not at all, in the place of an older one.

    trained: the patterns that the fingerprint left out. extra: tensors of the backbone that were
    trained with the delta. about: anything of JSON, such as the task. FileExistsError where the
    folder holds something else; ValueError for a delta that its configuration does not describe.
    """
    if delta.described_by is not None:
        raise ValueError(f"{type(delta).__name__}: a file cannot hold it; {delta.described_by}")
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).is_file():
        raise FileExistsError(f"{folder}: it holds something else than a delta")
    tensors = {f"delta.{name}": value for name, value in delta.state_dict().items()}
    tensors |= {f"backbone.{name}": value for name, value in (extra or {}).items()}
    blob = save(_unshared({name: value.detach().cpu() for name, value in tensors.items()}))
    fields = {
        "format_version": FORMAT_VERSION,
        "config": delta.config.to_dict(),
        "targets": [name for name, _ in delta.named_layers()],
        "backbone_fingerprint": backbone_fingerprint,
        "trained_modules": list(trained),
        "tensors_sha256": hashlib.sha256(blob).hexdigest(),
        "about": dict(about or {}),
    }
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        (aside / TENSORS).write_bytes(blob)
        (aside / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    except OSError:  # a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(aside, folder)
        shutil.rmtree(old)
    else:
        os.replace(aside, folder)


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor with memory of its own: safetensors refuses shared ones, as tied factors are."""
    return {name: value.clone().contiguous() for name, value in tensors.items()}


def load_delta(folder: Path, backbone: nn.Module, any_backbone: bool = False) -> Loaded:
    """Reads a delta's folder and builds it for a backbone. Deltas.insert attaches it.

    ValueError, naming the file, where it is not one, was changed or cut short, or belongs to
    another backbone; any_backbone skips the last check. No pickle is ever read.
    """
    fields = _fields(folder)
    found = fingerprint(backbone, fields["trained_modules"])
    if not any_backbone and found != fields["backbone_fingerprint"]:
        raise ValueError(
            f"{folder / CONFIG}: the delta belongs to the backbone {fields['backbone_fingerprint']}"
            f", and this one is {found}"
        )
    tensors = _tensors(folder / TENSORS, fields["tensors_sha256"])
    try:
        config = config_from_dict(fields["config"])
        delta = config.build(backbone, config.find(backbone))
        own = {
            name.removeprefix("delta."): value
            for name, value in tensors.items()
            if name.startswith("delta.")
        }
        delta.load_state_dict(own)
    except (ValueError, RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{folder}: it does not fit this backbone: {text}") from None
    extra = {
        name.removeprefix("backbone."): value
        for name, value in tensors.items()
        if name.startswith("backbone.")
    }
    mark, trained = fields["backbone_fingerprint"], fields["trained_modules"]
    return Loaded(delta, extra, fields["about"], mark, trained)


def _fields(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder}: no {CONFIG} in it, so it is no delta's folder")
    wanted = {
        "format_version": int, "config": dict, "backbone_fingerprint": str,
        "trained_modules": list, "tensors_sha256": str, "about": dict,
    }  # fmt: skip
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        for key, kind in wanted.items():
            if not isinstance(fields[key], kind):
                raise ValueError(f"{key} is {fields[key]!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the description of a delta: {error}") from None
    if fields["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {fields['format_version']}; this code reads {FORMAT_VERSION}"
        )
    return dict(fields)


def _tensors(path: Path, sha256: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: it is missing")
    blob = path.read_bytes()
    if hashlib.sha256(blob).hexdigest() != sha256:
        raise ValueError(f"{path}: it was changed or cut short: its sha256 is not that of {CONFIG}")
    try:
        return load(blob)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from None
