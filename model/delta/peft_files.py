"""LoRA in peft's file format, without peft: adapter_config.json and adapter_model.safetensors.

What peft 0.21 writes and reads; tests load the files in it.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.delta.base import Delta
from model.delta.methods.lora import LoraConfig, LoraLayer
from model.delta.methods.sora import SoraLayer
from model.delta.prune import compact
from model.delta.target import as_target

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Keys of peft's LoraConfig that this reads, and those that change nothing of what a LoRA computes.
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern"}
_READ |= {"use_rslora", "bias"}
_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "target_modules", "exclude_modules", "fan_in_fan_out", "init_lora_weights", "peft_version",
    "layers_to_transform", "layers_pattern", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
}  # fmt: skip


@torch.no_grad()
def export_peft(
    delta: Delta,
    folder: Path,
    backbone: nn.Module,
    backbone_name: str = "",
) -> None:
    """Writes a LoRA, or a SoRA as the LoRA that it comes to, for stock peft.

    backbone_name: what peft should load it onto. ValueError for other methods, for factorised
    targets, which peft has no adapter for (merge it instead), and where nothing is left of it.
    FileExistsError where the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: it is not empty")
    layers = _plain_layers(delta)
    modules = dict(backbone.named_modules())
    transposed = False
    for name in layers:
        target = as_target(name, modules[name])
        if target.kind == "factorised":
            raise ValueError(
                f"{name}: its weight is factorised, and peft has no adapter for that; merge the "
                "delta, or export one of other targets"
            )
        transposed |= target.kind == "transposed"
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = layer.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.lora_B.weight"] = layer.B.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    fields = _peft_config(layers) | {
        "base_model_name_or_path": backbone_name or None,
        "fan_in_fan_out": transposed,
    }
    (folder / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def _plain_layers(delta: Delta) -> dict[str, LoraLayer]:
    """The layers of a delta as LoRA's, those of rank 0 left out."""
    if any(isinstance(layer, SoraLayer) for _, layer in delta.named_layers()):
        delta = compact(delta)
    layers = {}
    for name, layer in delta.named_layers():
        if type(layer) is not LoraLayer:
            raise ValueError(
                f"{name}: a delta of method {delta.config.method}; what peft's LoRA can hold are "
                "lora and sora"
            )
        layers[name] = layer
    return layers


def _peft_config(layers: Mapping[str, LoraLayer]) -> dict[str, Any]:
    """peft scales by alpha / r at each module, so alpha = s · r there."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    alphas = {name: layer.scale * layer.rank for name, layer in layers.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(layers.values())).dropout,
        "use_rslora": False,
        "bias": "none",
        "target_modules": sorted(layers),
        "rank_pattern": {re.escape(k): v for k, v in ranks.items() if v != rank},
        "alpha_pattern": {re.escape(k): v for k, v in alphas.items() if v != alpha},
    }


@torch.no_grad()
def import_peft(folder: Path, backbone: nn.Module) -> Delta:
    """Reads a LoRA that peft wrote, for a backbone. Deltas.insert attaches it.

    ValueError, naming the file, where it is no plain LoRA (DoRA, trained biases, modules saved with
    it, ...), was cut short, or does not fit the backbone.
    """
    fields = _read_config(folder / CONFIG)
    path = folder / TENSORS
    if not path.is_file():
        raise ValueError(f"{path}: it is missing; only safetensors are read")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from None
    layers = {}
    for name, (down, up) in _pairs(tensors, path).items():
        layers[name] = _layer(name, down, up, fields, backbone, path)
    ranks = {name: layer.rank for name, layer in layers.items()}
    scales = {name: layer.scale for name, layer in layers.items()}
    config = LoraConfig(
        targets=list(layers),
        r=max(ranks.values()),
        alpha=float(fields.get("lora_alpha", 8)),
        dropout=float(fields.get("lora_dropout", 0.0)),
        ranks=ranks,
        scales=scales,
    )
    return Delta.of(config, layers)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: it is missing, so {path.parent} is no adapter of peft's")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        kind = fields.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not peft's configuration: {error}") from None
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type {kind}; allowed is LORA")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias {fields['bias']!r}; allowed is 'none'")
    for key, value in fields.items():
        if value and key not in _READ | _NO_EFFECT:
            raise ValueError(f"{path}: {key} {value!r}, which changes what a LoRA computes")
    return dict(fields)


def _pairs(tensors: Mapping[str, Tensor], path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each target."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f"{path}: {key}, which is no factor of a LoRA")
        found.setdefault(match[1], {})[match[2]] = value
    if not found or any(set(pair) != {"A", "B"} for pair in found.values()):
        raise ValueError(f"{path}: a factor is missing")
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _layer(
    name: str, down: Tensor, up: Tensor, fields: dict[str, Any], backbone: nn.Module, path: Path
) -> LoraLayer:
    try:
        target = as_target(name, backbone.get_submodule(name))
    except AttributeError:
        raise ValueError(f"{path}: the backbone has no module {name}") from None
    rank = down.size(0)
    if target.kind == "other" or (up.size(0), rank, down.size(1)) != (
        target.d_out,
        up.size(1),
        target.d_in,
    ):
        raise ValueError(
            f"{path}: {name} has factors {tuple(up.shape)} and {tuple(down.shape)}, and the module "
            f"is {target.d_in} -> {target.d_out}"
        )
    alpha = float(_pattern(fields.get("alpha_pattern"), name, fields.get("lora_alpha", 8)))
    scale = alpha / (math.sqrt(rank) if fields.get("use_rslora") else rank)
    layer = LoraLayer(*target.widths, rank, scale, float(fields.get("lora_dropout", 0.0)))
    layer.to(down.dtype)
    layer.A.copy_(down)
    layer.B.copy_(up)
    return layer


def _pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """What peft's rank_pattern or alpha_pattern says of a module: the first key that fits the end
    of its path, as a regular expression.
    """
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
