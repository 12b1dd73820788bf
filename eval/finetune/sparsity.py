"""SoRA in the loop: dropping closed ranks, the report of ranks by layer."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from model.delta import Delta
from model.delta.files import load_delta, save_delta
from model.delta.methods.lora import LoraConfig, LoraLayer
from model.delta.prune import RankRow, compact, prune, rank_report
from model.delta.target import layer_index
from training.run_dir import write_json


def prune_in_place(delta: Delta, optimizer: Optimizer) -> int:
    """Drops closed ranks, and layers that have none left, from the parameters, the optimizer and
    the delta's configuration, from which its layers can be built again. Returns how many ranks.
    """
    dropped = prune(delta, optimizer)
    if not dropped:
        return 0
    config = delta.config
    assert isinstance(config, LoraConfig)
    layers = {name: one for name, one in delta.named_layers() if isinstance(one, LoraLayer)}
    ranks = {name: layer.rank for name, layer in layers.items()}
    scales = {name: layer.scale for name, layer in layers.items()}
    for name, layer in layers.items():
        if layer.rank == 0:
            _forget(optimizer, layer)
            del delta.layers[name.replace(".", "/")]
    gone = {name: 0 for name, rank in config.ranks.items() if rank == 0}
    delta.config = dataclasses.replace(config, ranks=gone | ranks, scales=config.scales | scales)
    return dropped


def _forget(optimizer: Optimizer, layer: nn.Module) -> None:
    """Takes a layer's parameters out of the optimizer."""
    left = {id(parameter) for parameter in layer.parameters()}
    for group in optimizer.param_groups:
        group["params"] = [one for one in group["params"] if id(one) not in left]
    for parameter in layer.parameters():
        optimizer.state.pop(parameter, None)


def rank_rows(delta: Delta, first_ranks: dict[str, int]) -> list[dict[str, Any]]:
    """Kept and first rank of each target, also of those that pruning has removed."""
    found = {row.target: row for row in rank_report(delta)}
    rows = []
    for target, rank in first_ranks.items():
        row = found.get(target, RankRow(target, 0, 0, 0, 0))
        rows.append({"target": target, "layer": layer_index(target), "kept": row.kept, "of": rank})
    return rows


def write_report(run_dir: Path, backbone: nn.Module, first_ranks: dict[str, int]) -> dict[str, Any]:
    """Of best/: ranks.json, ranks.png, and compact/, the LoRA that computes the same. Rank 0."""
    loaded = load_delta(run_dir / "best" / "delta", backbone, any_backbone=True)
    delta = loaded.delta
    rows = rank_rows(delta, first_ranks)
    kept, of = sum(row["kept"] for row in rows), sum(row["of"] for row in rows)
    found: dict[str, Any] = {"ranks_kept": kept, "ranks": of, "delta_parameters": 0}
    if kept:
        small = compact(delta)
        found["delta_parameters"] = small.num_parameters()
        found["targets_kept"] = len(list(small.named_layers()))
        save_delta(
            small,
            run_dir / "compact",
            loaded.backbone_fingerprint,
            trained=loaded.trained_modules,
            extra=loaded.extra,
            about=loaded.about,
        )
    write_json(run_dir / "ranks.json", found | {"targets": rows})
    plot(rows, run_dir / "ranks.png")
    return found


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Kept ranks: a row for each kind of target, a column for each layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["target"].rpartition(".")[2] for row in rows))
    layers = sorted({row["layer"] or 0 for row in rows})
    table = torch.full((len(kinds), len(layers)), torch.nan)
    for row in rows:
        at = kinds.index(row["target"].rpartition(".")[2]), layers.index(row["layer"] or 0)
        table[at] = row["kept"]
    figure = Figure(figsize=(1.5 + 0.5 * len(layers), 1.2 + 0.4 * len(kinds)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(table.numpy(), vmin=0, vmax=max(row["of"] for row in rows), cmap="viridis")
    axes.set_xticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("layer")
    for (i, j), value in [
        ((i, j), table[i, j]) for i in range(len(kinds)) for j in range(len(layers))
    ]:
        if not torch.isnan(value):
            axes.text(j, i, f"{int(value)}", ha="center", va="center", color="white", fontsize=7)
    figure.colorbar(image, ax=axes, label="ranks kept")
    figure.savefig(path, dpi=120)
