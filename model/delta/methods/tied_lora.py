"""Tied-LoRA (Renduchintala et al. 2023): factors that all targets share, vectors of their own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.delta.base import Delta, DeltaConfig, DeltaLayer, register
from model.delta.methods.lora import add_product
from model.delta.target import Target

Part = Literal["A", "B", "u", "v"]


@register
@dataclass
class TiedLoraConfig(DeltaConfig):
    """Tied-LoRA: y + s · v ⊙ B (u ⊙ (A x)), A (r, d_in), B (d_out, r), u (r,), v (d_out,).

    Attributes:
        r: Rank.
        alpha: s is alpha / r.
        tie: Which of A and B all targets share. The rest each target has of its own, as u and v.
        train: Which of A, B, u and v are trained; the rest keeps its start.
        dropout: Dropout of x.
    """

    method: ClassVar[str] = "tied_lora"

    r: int = 8
    alpha: float = 16.0
    tie: list[Literal["A", "B"]] = field(default_factory=lambda: ["A", "B"])
    train: list[Part] = field(default_factory=lambda: ["A", "B", "u", "v"])
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self._require("r", self.r >= 1, "at least 1")
        self._require("alpha", self.alpha > 0, "greater than 0")
        self._require("dropout", 0 <= self.dropout < 1, "0 <= dropout < 1")
        self._require("train", bool(self.train), "at least one of A, B, u, v")

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New vectors and factors. ValueError where tied factors would not have one shape."""
        self._check(targets)
        shared: dict[str, nn.Parameter] = {}

        def make(target: Target) -> DeltaLayer:
            layer = TiedLoraLayer(*target.widths, self.r, self.alpha / self.r, self.dropout)
            self._start(layer)
            for tied in self.tie:
                setattr(layer, tied, shared.setdefault(tied, getattr(layer, tied)))
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(name in self.train)
            return layer

        return Delta(self, targets, make)

    def _check(self, targets: Sequence[Target]) -> None:
        widths = {"A": "d_in", "B": "d_out"}
        for name in self.tie:
            width = widths[name]
            found = {getattr(one, width): one.name for one in targets}
            if len(found) > 1:
                raise ValueError(
                    f"tie: {name} of all targets, but {width} is "
                    + ", ".join(f"{size} at {where}" for size, where in found.items())
                    + "; allowed are targets of one shape"
                )
        for one in targets:
            if self.r > min(one.widths):
                raise ValueError(
                    f"r: {self.r} at {one.name}, which is {one.d_in} -> {one.d_out}; allowed is 1 "
                    f"to {min(one.widths)}"
                )

    def _start(self, layer: "TiedLoraLayer") -> None:
        """A as LoRA; B zero and v one, or, where B stays as it is, B random and v zero (as in VeRA,
        Kopiczko et al. 2023), so that nothing is added at first. Where neither B nor v is trained B
        is random and v one: what is added at first is what the random factors make.
        """
        nn.init.kaiming_uniform_(layer.A, a=math.sqrt(5))
        if "B" in self.train:
            nn.init.zeros_(layer.B)
            return
        nn.init.kaiming_uniform_(layer.B, a=math.sqrt(5))
        if "v" in self.train:
            nn.init.zeros_(layer.v)


class TiedLoraLayer(DeltaLayer):
    """y + s · v ⊙ B (u ⊙ (A x)). A (r, d_in), B (d_out, r), u (r,), v (d_out,)."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.empty(d_out, rank))
        self.u = nn.Parameter(torch.ones(rank))
        self.v = nn.Parameter(torch.ones(d_out))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., d_in), y (..., d_out) -> (..., d_out)."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        h = F.linear(x, self.A.to(x.dtype)) * self.u.to(x.dtype)
        return add_product(y, h, self.v[:, None] * self.B, self.scale)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A of what the layer adds to a weight; scale, u and v are in B."""
        return self.scale * self.v[:, None] * self.B * self.u, self.A.clone()
