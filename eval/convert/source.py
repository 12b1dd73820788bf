"""The dense model that is converted: read from a Hugging Face folder, or from ours."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import InputError
from data.shards import sha256_file
from data.tokenizer import Tokenizer
from eval.convert import llama
from eval.convert.options import ConvertConfig
from model import ModelConfig, Ranks, Transformer
from training import checkpoint

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
SEQ_LEN = 1024  # of a window, where nothing says how a model was trained


@dataclass
class Dense:
    """A dense model.

    Attributes:
        config: Its shape; no projection is low-dimensional.
        weights: Its tensors by our names, float32 on the CPU; a tied head is left out.
        tokenizer: The tokenizer that it was trained with.
        seq_len: Tokens of a window for scores.
        origin: What checkpoint.json says of where it is from.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    seq_len: int
    origin: dict[str, Any]


def open_source(options: ConvertConfig) -> Dense:
    """What --from_llama or --checkpoint means. InputError where it cannot be converted."""
    dense = _from_llama(options) if options.from_llama else _from_ours(Path(options.source))
    if dense.tokenizer.vocab_size > dense.config.vocab_size:
        raise InputError(
            f"{dense.tokenizer.path}: has {dense.tokenizer.vocab_size} ids, the model's vocab_size "
            f"is {dense.config.vocab_size}; it must be at least that of its tokenizer"
        )
    for name, value in dense.weights.items():
        if not bool(value.isfinite().all()):
            raise InputError(f"{options.source}: {name} has values that are not finite")
    if options.seq_len is not None:
        if options.seq_len > dense.config.max_seq_len:
            raise InputError(
                f"--seq_len: {options.seq_len} is over the model's max_seq_len "
                f"{dense.config.max_seq_len}"
            )
        dense.seq_len = options.seq_len
    return dense


def _from_llama(options: ConvertConfig) -> Dense:
    folder = Path(options.source)
    if not folder.is_dir():
        raise InputError(f"--from_llama {folder}: no such folder")
    config = llama.read_config(folder)
    files = _files(folder)
    weights = _read_tensors(folder, files, config)
    _check_shapes(folder, config, weights)
    sums = {name: sha256_file(folder / name) for name in files}
    origin = {"from": str(folder), "kind": "LlamaForCausalLM", "sha256": sums}
    seq_len = min(SEQ_LEN, config.max_seq_len)
    return Dense(config, weights, _tokenizer(folder, options), seq_len, origin)


def _tokenizer(folder: Path, options: ConvertConfig) -> Tokenizer:
    path = Path(options.tokenizer) if options.tokenizer else folder / "tokenizer.model"
    if options.tokenizer is None and not path.exists():
        raise InputError(
            f"{path}: no such file; give the SentencePiece model with --tokenizer (other kinds of "
            "tokenizers, such as tokenizer.json, cannot be used)"
        )
    return Tokenizer(path)


def _files(folder: Path) -> list[str]:
    """The safetensors files of a folder."""
    if (folder / WEIGHTS).exists():
        return [WEIGHTS]
    index = folder / INDEX
    if not index.exists():
        raise InputError(f"{folder}: has neither {WEIGHTS} nor {INDEX}; only safetensors are read")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index}: is not an index of safetensors ({error!r})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(f"{index}: names the file {name!r}; a plain name is expected")
        if not (folder / name).exists():
            raise InputError(f"{folder / name}: no such file, and {INDEX} names it")
    return names


def _read_tensors(folder: Path, files: list[str], config: ModelConfig) -> dict[str, Tensor]:
    """Our tensors, float32, from their files. InputError, naming it, where one is missing, or where
    there is one that our model has no place for.
    """
    wanted = llama.tensor_names(config)
    with ExitStack() as stack:
        places: dict[str, Any] = {}
        for name in files:
            try:
                file = stack.enter_context(safe_open(folder / name, "pt"))
            except (OSError, SafetensorError) as error:
                raise InputError(f"{folder / name}: not a safetensors file ({error})") from None
            places |= dict.fromkeys(file.keys(), file)
        for theirs in wanted.values():
            if theirs not in places:
                raise InputError(f"{folder}: the tensor {theirs} is missing")
        for name in sorted(set(places) - set(wanted.values())):
            if not llama.may_be_ignored(name, config):
                raise InputError(f"{folder}: our model has no place for the tensor {name}")
        return {ours: places[theirs].get_tensor(theirs).float() for ours, theirs in wanted.items()}


def _check_shapes(folder: Path, config: ModelConfig, weights: dict[str, Tensor]) -> None:
    names = llama.tensor_names(config)
    for name, shape in expected_shapes(config):
        if name in weights and weights[name].shape != shape:
            raise InputError(
                f"{folder}: the tensor {names[name]} has the shape {tuple(weights[name].shape)}; "
                f"config.json says {tuple(shape)}"
            )


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, torch.Size]]:
    """Name and shape of each tensor of a model."""
    with torch.device("meta"):
        model = Transformer(config)
    for name, tensor in model.state_dict().items():
        yield name, tensor.shape


def _from_ours(path: Path) -> Dense:
    folder = checkpoint.resolve(path)
    state = checkpoint.read_state(folder)
    model = checkpoint.load_model(folder, torch.device("cpu"), torch.float32)
    config = model.config
    if config.ranks != Ranks():
        raise InputError(
            f"--checkpoint {folder}: model.r is {config.r}, it is low-dimensional already; allowed "
            "is a vanilla one (model.r null)"
        )
    if config.family != "llama":
        raise InputError(
            f"--checkpoint {folder}: model.family is {config.family}, whose low-dimensional "
            "projections have their biases elsewhere; allowed is llama"
        )
    for key, allowed in (("latent_norm", False), ("latent_activation", "none")):
        if getattr(config, key) != allowed:
            raise InputError(
                f"--checkpoint {folder}: model.{key} is {getattr(config, key)}, which would stand "
                f"between the factors; allowed is {json.dumps(allowed)}"
            )
    weights = dict(model.state_dict())
    if config.tie_embeddings:
        del weights["lm_head.weight"]
    origin = {"from": str(folder), "kind": "checkpoint", "step": state["step"]}
    origin["sha256"] = {WEIGHTS: state["files"][WEIGHTS]["sha256"]}
    return Dense(config, weights, checkpoint.load_tokenizer(folder), state["seq_len"], origin)
