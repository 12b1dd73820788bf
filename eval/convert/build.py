"""The converted model: which ranks, its weights, and what each projection lost."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from data.errors import InputError
from eval.convert import factorise
from eval.convert.budget import Kind, choose_ranks
from eval.convert.options import ConvertConfig
from eval.convert.source import Dense
from model import ModelConfig, Ranks
from model.shape import Shape

Scales = dict[str, Tensor]  # weights of the columns of a projection (d_in,), by its weight's name


@dataclass
class Converted:
    """The model that comes out.

    Attributes:
        config: Its shape.
        weights: Its tensors, float32 on the CPU; a tied head is left out.
        projections: A row for each projection, for the report.
    """

    config: ModelConfig
    weights: dict[str, Tensor]
    projections: list[dict[str, Any]]


def paths(config: ModelConfig) -> dict[str, tuple[str, Shape]]:
    """Each projection of a model, "layers.N.attention.q_proj": its name in a block and its shape
    there.
    """
    owners = {"attention": config.attention_projections()}
    owners["feed_forward"] = config.feed_forward_projections()
    return {
        f"layers.{number}.{owner}.{name}": (name, shape)
        for number in range(config.num_layers)
        for owner, shapes in owners.items()
        for name, shape in shapes.items()
    }


def ranks_of(
    options: ConvertConfig, dense: Dense, scales: Scales, device: torch.device
) -> int | Ranks | None:
    """What model.r becomes: --rank, or the ranks that --parameter_budget leads to."""
    if options.parameter_budget is None:
        return options.rank
    kinds = {}
    shapes = dense.config.attention_projections()
    for name, shape in tqdm(shapes.items(), unit="kind", disable=None, leave=False):
        energies = []
        for number in range(dense.config.num_layers):
            path = f"layers.{number}.attention.{name}.weight"
            weight, columns = dense.weights[path].to(device), _on(scales.get(path), device)
            energies.append(factorise.singular_values(weight, columns).square().cpu())
        energy = torch.stack(energies).sum(dim=0)
        kinds[name[0]] = Kind(shape.d_in, shape.d_out, dense.config.num_layers, energy)
    return Ranks(**choose_ranks(kinds, options.parameter_budget))


def new_config(dense: Dense, r: int | Ranks | None, option: str) -> ModelConfig:
    """The shape with these ranks. InputError, naming the option, where they do not fit."""
    try:
        return dataclasses.replace(dense.config, r=r)
    except ValueError as error:
        raise InputError(str(error).replace("model.r", option)) from None


def warnings(config: ModelConfig, option: str) -> list[str]:
    """Ranks that save nothing: r · (d_in + d_out) >= d_in · d_out."""
    found = []
    for name, shape in config.block_projections().items():
        whole = shape.d_in * shape.d_out
        if shape.rank is not None and shape.matmul_parameters() >= whole:
            found.append(
                f"{option}: rank {shape.rank} of {name} saves nothing: its factors have "
                f"{shape.matmul_parameters():,} parameters, the dense weight {whole:,}"
            )
    if config.ranks == Ranks():
        found.append(f"{option}: no projection is factorised, the result is dense")
    return found


def convert(
    dense: Dense, config: ModelConfig, scales: Scales, device: torch.device, progress: bool = True
) -> Converted:
    """The weights of the model `config`, which differs from the dense one in its ranks alone."""
    weights = dict(dense.weights)
    rows = []
    places = paths(config).items()
    for path, (name, shape) in tqdm(places, disable=None if progress else True, leave=False):
        row = _row(path, name, shape)
        if shape.rank is not None:
            weight = weights.pop(f"{path}.weight").to(device)
            columns = _on(scales.get(f"{path}.weight"), device)
            factors = factorise.factorise(weight, shape.rank, columns)
            weights[f"{path}.A"], weights[f"{path}.B"] = factors.A.cpu(), factors.B.cpu()
            row |= {
                "relative_error": factorise.relative_error(weight, factors),
                "weighted_relative_error": None
                if columns is None
                else factorise.relative_error(weight, factors, columns),
                "kept_energy": factorise.kept_energy(factors),
            }
        rows.append(row)
    return Converted(config, weights, rows)


def _row(path: str, name: str, shape: Shape) -> dict[str, Any]:
    """What a projection was and is; a dense one loses nothing."""
    before, after = shape.d_in * shape.d_out, shape.matmul_parameters()
    return {
        "layer": int(path.split(".")[1]),
        "projection": name,
        "d_in": shape.d_in,
        "d_out": shape.d_out,
        "rank": shape.rank,
        "relative_error": 0.0,
        "weighted_relative_error": None,
        "kept_energy": 1.0,
        "parameters_before": before,
        "parameters_after": after,
        "flops_per_token_before": 2 * before,
        "flops_per_token_after": 2 * after,
    }


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
