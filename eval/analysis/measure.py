"""Everything that is measured of a run: weights and activations of each checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from eval.analysis.activations import SITES, activation_spectra
from eval.analysis.runs import REFERENCE, Source
from eval.analysis.spectrum import Spectrum
from eval.analysis.summary import over_layers, spectra_over_layers, with_groups
from eval.analysis.weights import left_out, weight_spectra
from model import Transformer, init_weights
from training import checkpoint
from training.execution import apply_execution

Values = dict[str, Any]
Spectra = dict[str, list[dict[str, Spectrum]]]  # "weights", "centred", "uncentred": by layer


def measure(source: Source, tokens: Tensor, device: torch.device, dtype: torch.dtype) -> Values:
    """The measurements of a run on tokens (N,): docs/analysis.md has the keys."""
    seq_len = source.states[-1]["seq_len"]
    checkpoints: list[Values] = []
    drawn: Values = {}
    for step, trained, model in _models(source, device):
        try:
            spectra = _spectra(model, tokens, seq_len, device, dtype)
        except InputError as error:
            raise InputError(f"{source.path}, step {step}: {error}") from None
        point = {"step": step, "training_tokens": trained}
        checkpoints.append(point | {kind: _measures(spectra[kind]) for kind in spectra})
        drawn["last"] = {kind: spectra_over_layers(spectra[kind]) for kind in spectra}
        drawn.setdefault("first", drawn["last"])
    return {
        "name": source.name,
        "layers": model.config.num_layers,
        "seq_len_tokens": seq_len,
        "analysed_tokens": len(tokens),
        "projections_left_out": left_out(model.config),
        "shapes": {
            name: {"d_out": shape.d_out, "d_in": shape.d_in}
            for name, shape in model.config.block_projections().items()
        },
        "ranks": {kind: _ranks(layers[0]) for kind, layers in spectra.items()},
        "checkpoints": checkpoints,
        "spectra": drawn,
    }


def _spectra(
    model: Transformer, tokens: Tensor, seq_len: int, device: torch.device, dtype: torch.dtype
) -> Spectra:
    """Weights in fp32, then activations in `dtype`, to which the model is cast."""
    weights = weight_spectra(model)
    apply_execution(model.to(dtype), REFERENCE, device, dtype, training=False)
    return {"weights": weights, **activation_spectra(model, tokens, seq_len)}


def _models(source: Source, device: torch.device) -> Iterator[tuple[int, int, Transformer]]:
    """Step, training tokens and model in fp32: the start, which follows from the seed, and every
    checkpoint.
    """
    first = checkpoint.load_model(source.checkpoints[0], device, torch.float32)
    state = source.states[0]
    start = Transformer(first.config).eval()
    init_weights(start, state["seed"])
    yield 0, 0, start.to(device)
    yield state["step"], state["tokens"], first
    for folder, state in zip(source.checkpoints[1:], source.states[1:], strict=True):
        yield state["step"], state["tokens"], checkpoint.load_model(folder, device, torch.float32)


def _measures(layers: Sequence[Mapping[str, Spectrum]]) -> Values:
    """Of each layer, and over the layers."""
    found = [{name: one.measures() for name, one in layer.items()} for layer in layers]
    return {"by_layer": found, "over_layers": over_layers(found)}


def _ranks(layer: Mapping[str, Spectrum]) -> dict[str, Values]:
    """The rank that each matrix could have and can have; of groups the mean share."""
    found: dict[str, Values] = {
        name: {"dimension": one.dimension, "bound": one.bound} for name, one in layer.items()
    }
    shares = {name: one.bound / one.dimension for name, one in layer.items()}
    for name, share in with_groups(shares).items():
        found.setdefault(name, {})["bound_share"] = share
    return found


def warnings(sources: Sequence[Source], runs: Sequence[Values]) -> list[str]:
    """What a reader must know before the numbers."""
    found = []
    for source, run in zip(sources, runs, strict=True):
        name, tokens = run["name"], run["analysed_tokens"]
        widths = {
            site: rank["dimension"]
            for site, rank in run["ranks"]["centred"].items()
            if site in SITES
        }
        widest = max(widths, key=lambda site: widths[site])
        if tokens < widths[widest]:
            found.append(
                f"{name}: {tokens} tokens were analysed, fewer than the {widths[widest]} "
                f"dimensions of {SITES[widest].label}; no rank can be above the number of tokens"
            )
        if run["projections_left_out"]:
            found.append(
                f"{name}: {', '.join(run['projections_left_out'])}: a norm or an activation stands "
                "between B and A, so they are no one matrix; their weights are left out"
            )
        if source.damaged:
            found.append(f"{name}: damaged, and left out: {', '.join(source.damaged)}")
    if len({run["seq_len_tokens"] for run in runs}) > 1:
        found.append("The runs are analysed in windows of different lengths, those of training")
    return found
