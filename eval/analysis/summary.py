"""From layers to a few numbers: means over layers, of single matrices and of groups of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.analysis.spectrum import MEASURES, Spectrum

# What a mean of attention or of the FFN is taken over: what they compute, not what they read.
GROUPS = {
    "attention": (
        "q_proj", "k_proj", "v_proj", "o_proj", "q", "k", "v", "heads", "attention_output",
    ),
    "ffn": ("gate_proj", "up_proj", "down_proj", "ffn_hidden", "ffn_output"),
}  # fmt: skip
POINTS = 128  # of a spectrum that are kept: so many at even steps, so many at even ratios
Measures = Mapping[str, Mapping[str, float | None]]


def over_layers(layers: Sequence[Measures]) -> dict[str, dict[str, Any]]:
    """Mean, least and largest over the layers of each measure of each name, and of GROUPS.

    A group has shares alone, in each layer their mean over its members. None wherever a layer has
    a matrix of zeros, which has no rank to speak of.
    """
    found = {
        name: {measure: spread([layer[name][measure] for layer in layers]) for measure in first}
        for name, first in layers[0].items()
    }
    for measure in (f"{name}_share" for name in MEASURES):
        rows = [
            with_groups({name: one[measure] for name, one in layer.items()}) for layer in layers
        ]
        for group in GROUPS:
            if group in rows[0]:
                found.setdefault(group, {})[measure] = spread([row[group] for row in rows])
    return found


def with_groups(values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Values by name, and for GROUPS their mean over the members that there are."""
    found = dict(values)
    for group, members in GROUPS.items():
        present = [values[name] for name in members if name in values]
        if present:
            mean = spread(present)
            found[group] = mean["mean"] if mean else None
    return found


def spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, min and max; None where one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return {"mean": sum(known) / len(known), "min": min(known), "max": max(known)}


def spectra_over_layers(layers: Sequence[Mapping[str, Spectrum]]) -> dict[str, Any]:
    """σ_i / σ_1 of each name at some i: mean, least and largest over the layers that have any.

    position: i / dimension. At most 2 · POINTS values, the first and last among them.
    """
    found = {}
    for name in layers[0]:
        rows = [layer[name].normalised() for layer in layers]
        known = [row for row in rows if row is not None]
        if not known:
            continue
        values = torch.stack(known)  # (layers, n)
        kept = _kept(values.size(1))
        values = values[:, kept]
        found[name] = {
            "position": ((kept + 1) / layers[0][name].dimension).tolist(),
            "mean": values.mean(dim=0).tolist(),
            "min": values.amin(dim=0).tolist(),
            "max": values.amax(dim=0).tolist(),
        }
    return found


def _kept(count: int) -> Tensor:
    """Indices of the values of a spectrum that are kept, int64, rising."""
    even = torch.linspace(0, count - 1, min(count, POINTS), dtype=torch.float64)
    ratios = torch.logspace(0, 1, POINTS, base=max(count, 2), dtype=torch.float64) - 1
    return torch.cat([even, ratios.clamp(max=count - 1)]).round().long().unique()
