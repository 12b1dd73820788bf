"""Deltas of a backbone, as files: explain, count, prune, merge, export, import, ensemble, bench.

python -m model.delta explain --backbone runs/lpa_130m --method lora --set r=8
python -m model.delta merge --backbone runs/lpa_130m --delta deltas/sst2 --output merged
"""

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from data.errors import InputError, require_folder_of, run_cli
from data.writing import new_folder, require_new
from model.delta import Deltas
from model.delta.base import Delta
from model.delta.bench.command import bench
from model.delta.command.backbones import (
    BESIDE,
    load_backbone,
    put_in,
    write_backbone,
)
from model.delta.command.options import delta_config, parser
from model.delta.ensemble import average, combine
from model.delta.explain import explain, planned, to_json, tree
from model.delta.files import Loaded, fingerprint, load_delta, save_delta
from model.delta.merge import merge
from model.delta.peft_files import export_peft, import_peft
from model.delta.prune import compact, rank_report


def _of_options(options: argparse.Namespace, backbone: nn.Module) -> Delta:
    """The delta of --delta, or a new one of --config, --method and --set."""
    if options.delta is None:
        return planned(backbone, delta_config(options))
    if options.config or options.method or options.set:
        raise InputError("--delta: it has its configuration; leave --config, --method, --set out")
    return load_delta(options.delta, backbone, options.any_backbone).delta


def _explain(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    some = options.delta or options.config or options.method or options.set
    delta = _of_options(options, backbone) if some else None
    root = explain(backbone, delta)
    Console().print(tree(root, delta.config.method if delta else "delta"))
    if options.output is not None:
        options.output.write_text(json.dumps(to_json(root), indent=2) + "\n")


def _count(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    delta = _of_options(options, backbone)
    whole = sum(p.numel() for p in backbone.parameters())
    found: dict[str, Any] = {
        "method": delta.config.method,
        "backbone_parameters": whole,
        "delta_parameters": delta.num_parameters(),
        "trained_parameters": delta.num_parameters(trained=True),
        "share_of_backbone": delta.num_parameters() / whole,
    }
    rows = rank_report(delta) if options.delta is not None else []
    if rows:
        found["parameters_after_pruning"] = sum(row.parameters_kept for row in rows)
        found["ranks"] = {row.target: [row.kept, row.rank] for row in rows}
    for key, value in found.items():
        print(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
    if options.output is not None:
        options.output.write_text(json.dumps(found, indent=2) + "\n")


def _merge(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    deltas = Deltas(backbone)
    loaded = [load_delta(path, backbone, options.any_backbone) for path in options.delta]
    for number, one in enumerate(loaded):
        deltas.insert(str(number), one.delta)
    # Before the deltas: a module that was trained along may be a target.
    beside = put_in(backbone, options.delta, loaded)
    merge(deltas, *deltas.names())
    write_backbone(options.backbone, backbone, options.output, beside)
    _say_beside(options.output, beside)


def _say_beside(output: Path, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        print(f"{', '.join(tensors)}: no part of the backbone, so in {output / BESIDE}")


def _prune(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    loaded = load_delta(options.delta, backbone, options.any_backbone)
    _save_like(compact(loaded.delta), loaded, options.output)


def _save_like(delta: Delta, loaded: Loaded, output: Path) -> None:
    """A delta that takes another one's place, for the same backbone."""
    save_delta(
        delta,
        output,
        loaded.backbone_fingerprint,
        trained=loaded.trained_modules,
        extra=loaded.extra,
        about=loaded.about,
    )


def _refuse_trained(backbone: nn.Module, path: Path, loaded: Loaded, what: str) -> None:
    """InputError where tensors of the backbone itself were trained beside a delta."""
    known = backbone.state_dict().keys() & loaded.extra.keys()
    if known:
        raise InputError(
            f"{path}: {', '.join(sorted(known))} of the backbone were trained with it, for which "
            f"{what} has no place; merge it instead"
        )


def _export(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    loaded = load_delta(options.delta, backbone, options.any_backbone)
    _refuse_trained(backbone, options.delta, loaded, "this format of peft's")
    with new_folder(options.output) as folder:
        export_peft(loaded.delta, folder, backbone, options.backbone.removeprefix("hf:"))
        if loaded.extra:
            save_file(loaded.extra, folder / BESIDE)
    _say_beside(options.output, loaded.extra)


def _import(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    delta = import_peft(options.adapter, backbone)
    save_delta(delta, options.output, fingerprint(backbone), about={"imported_from": "peft"})


def _ensemble(options: argparse.Namespace) -> None:
    backbone = load_backbone(options.backbone)
    loaded = [load_delta(path, backbone, options.any_backbone) for path in options.delta]
    given = options.weights or [1 / len(loaded)] * len(loaded)
    if len(given) != len(loaded):
        raise InputError(f"--weights: {len(given)} of them, and {len(loaded)} deltas")
    for weight in given:
        if not math.isfinite(weight):
            raise InputError(f"--weights: {weight}; allowed are finite numbers")
    for path, one in zip(options.delta, loaded, strict=True):
        _refuse_trained(backbone, path, one, "a mixture")
    parts = {str(number): one.delta for number, one in enumerate(loaded)}
    by = dict(zip(parts, given, strict=True))
    if options.how == "average":
        if options.rank is not None:
            raise InputError("--rank: only --how exact can change the rank")
        mixed = average(parts, by)
    else:
        mixed = combine(parts, by, options.rank)
    about = {"ensemble_of": [path.name for path in options.delta], "weights": given}
    trained = sorted({pattern for one in loaded for pattern in one.trained_modules})
    save_delta(mixed, options.output, fingerprint(backbone, trained), trained=trained, about=about)
    for path, one in zip(options.delta, loaded, strict=True):
        if one.extra:
            print(f"{path}: its {', '.join(one.extra)} is left out, a head is of its own task")


COMMANDS = {
    "explain": _explain,
    "count": _count,
    "merge": _merge,
    "prune": _prune,
    "export": _export,
    "import": _import,
    "ensemble": _ensemble,
    "bench": bench,
}
WITHOUT_FOLDER = ("explain", "count", "bench")  # --output is a JSON file, and may be left out


def main() -> int:
    """The command."""
    options = parser().parse_args()
    if options.command in WITHOUT_FOLDER:
        require_folder_of(options.output)
    else:
        require_new(options.output)
    try:
        COMMANDS[options.command](options)
    except ValueError as error:  # of model.delta, which has no class of its own for the user's
        raise InputError(str(error)) from None
    if options.command not in WITHOUT_FOLDER:
        print(options.output)
    return 0


if __name__ == "__main__":
    run_cli(main)
