"""Backbones by name: our checkpoints and Hugging Face's models, read and written."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from data.errors import InputError
from data.shards import sha256_file
from data.writing import new_folder
from model import ModelConfig, Transformer
from model.config import Ranks
from model.delta.files import Loaded
from model.delta.target import as_target
from model.export import register
from training import checkpoint

HUGGING_FACE = "hf:"
BESIDE = "trained_beside.safetensors"  # what was trained with a delta and is no part of a backbone


def load_backbone(name: str) -> nn.Module:
    """A run directory, a checkpoint's folder or hf:NAME_OR_FOLDER, in float32 on the CPU.

    Of Hugging Face's only safetensors are read, and no code of the model's repository is run.
    """
    if not name.startswith(HUGGING_FACE):
        folder = checkpoint.resolve(Path(name))
        return checkpoint.load_model(folder, torch.device("cpu"), torch.float32)
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise InputError(f"{name}: needs the package transformers") from None
    short = name.removeprefix(HUGGING_FACE)
    register()
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            short, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be loaded ({' '.join(str(error).split())})") from None
    return model


def put_in(
    backbone: nn.Module, paths: Sequence[Path], loaded: Sequence[Loaded]
) -> dict[str, Tensor]:
    """What was trained beside deltas, into the backbone; returned is what has no place there, such
    as a classification head. InputError where several bring a tensor of one name.
    """
    found: dict[str, tuple[Path, Tensor]] = {}
    for path, one in zip(paths, loaded, strict=True):
        for name, value in one.extra.items():
            if name in found:
                raise InputError(
                    f"--delta: {found[name][0]} and {path} both bring {name}; merge one of them"
                )
            found[name] = path, value
    tensors = {name: value for name, (_, value) in found.items()}
    beside = backbone.load_state_dict(tensors, strict=False).unexpected_keys
    return {name: tensors[name] for name in beside}


def write_backbone(
    name: str, backbone: nn.Module, output: Path, beside: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a changed backbone as what it was read from: a checkpoint of ours without optimizer
    state, which is evaluated and not resumed, or a folder of Hugging Face's with its tokenizer.
    beside: tensors for a file of their own.
    """
    with new_folder(output) as folder:
        if beside:
            safetensors.torch.save_file(dict(beside), folder / BESIDE)
        if isinstance(backbone, Transformer):
            _write_ours(checkpoint.resolve(Path(name)), backbone, folder)
        else:
            _write_hugging_face(name.removeprefix(HUGGING_FACE), backbone, folder)


def _write_ours(source: Path, backbone: Transformer, folder: Path) -> None:
    config = _equalised(backbone)
    config.to_json(folder / "model.json")
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    weights = {name: value.contiguous() for name, value in backbone.state_dict().items()}
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    state: dict[str, Any] = checkpoint.read_state(source)
    state["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.iterdir())
    }
    checkpoint.write_state(folder, state)


def _equalised(backbone: Transformer) -> ModelConfig:
    """The configuration of a model whose ranks have grown. A rank is that of a kind of projection,
    so where layers differ the smaller ones get latents of zero.
    """
    kinds = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
    found: dict[str, list[nn.Module]] = {}
    for name, module in backbone.named_modules():
        if as_target(name, module).kind == "factorised":
            found.setdefault(kinds.get(name.rpartition(".")[2], "ffn"), []).append(module)
    ranks: dict[str, int | None] = {}
    for kind, modules in found.items():
        largest = max(int(module.get_parameter("A").size(0)) for module in modules)
        ranks[kind] = largest
        for module in modules:
            _pad(module, largest)
    fields = {
        field: getattr(backbone.config, field) for field in backbone.config.__dataclass_fields__
    }
    return ModelConfig(**(fields | ({"r": Ranks(**ranks)} if ranks else {})))


@torch.no_grad()
def _pad(module: nn.Module, rank: int) -> None:
    A, B = module.get_parameter("A"), module.get_parameter("B")
    more = rank - A.size(0)
    if not more:
        return
    module.A = nn.Parameter(torch.cat([A, A.new_zeros(more, A.size(1))]))
    module.B = nn.Parameter(torch.cat([B, B.new_zeros(B.size(0), more)], dim=1))
    bias = getattr(module, "bias_A", None)
    if isinstance(bias, nn.Parameter):
        module.bias_A = nn.Parameter(torch.cat([bias, bias.new_zeros(more)]))


def _write_hugging_face(source: str, backbone: Any, folder: Path) -> None:
    from transformers import AutoTokenizer

    backbone.save_pretrained(folder, safe_serialization=True)
    try:
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    except (OSError, ValueError):  # a model without a tokenizer beside it
        return
