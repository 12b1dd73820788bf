"""LoRA (Hu et al. 2021): y + s · B A x."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.delta.base import Delta, DeltaConfig, DeltaLayer, register
from model.delta.target import Target, matches, require_named


@register
@dataclass
class LoraConfig(DeltaConfig):
    """LoRA: y + s · B (A x), A (r, d_in), B (d_out, r).

    Attributes:
        r: Rank.
        alpha: Scale before it is divided by the rank.
        scaling: s: "lora" (alpha / r) or "rslora" (alpha / √r, Kalajdzievski 2023).
        dropout: Dropout of x.
        ranks: Ranks of single targets, named as targets are; 0 leaves a target out.
        scales: s of single targets, in place of what `scaling` says.
    """

    method: ClassVar[str] = "lora"

    r: int = 8
    alpha: float = 16.0
    scaling: Literal["lora", "rslora"] = "lora"
    dropout: float = 0.0
    ranks: dict[str, int] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._require("r", self.r >= 1, "at least 1")
        self._require("alpha", self.alpha > 0, "greater than 0")
        self._require("dropout", 0 <= self.dropout < 1, "0 <= dropout < 1")
        self._require("ranks", all(r >= 0 for r in self.ranks.values()), "ranks of at least 0")

    def rank_of(self, target: Target) -> int:
        """The rank at a target. ValueError where it is over the target's widths."""
        ranks = [rank for pattern, rank in self.ranks.items() if matches(target.name, pattern)]
        rank = ranks[-1] if ranks else self.r
        if rank > min(target.widths):
            raise ValueError(
                f"r: {rank} at {target.name}, which is {target.d_in} -> {target.d_out}; allowed is "
                f"1 to {min(target.widths)}"
            )
        return rank

    def scale_of(self, target: Target) -> float:
        """s at a target."""
        scales = [one for pattern, one in self.scales.items() if matches(target.name, pattern)]
        if scales:
            return scales[-1]
        rank = self.rank_of(target)
        return self.alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    def kept(self, targets: Sequence[Target]) -> list[Target]:
        """The targets whose rank is not 0. ValueError where ranks or scales name none of them."""
        names = [target.name for target in targets]
        require_named("ranks", self.ranks, names)
        require_named("scales", self.scales, names)
        return [target for target in targets if self.rank_of(target)]

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New factors: A uniform as torch's Linear has it, B zero."""
        return Delta(self, self.kept(targets), self._layer)

    def _layer(self, target: Target) -> DeltaLayer:
        rank, scale = self.rank_of(target), self.scale_of(target)
        return LoraLayer(*target.widths, rank, scale, self.dropout)


class LoraLayer(DeltaLayer):
    """y + s · B A x. A (r, d_in), B (d_out, r)."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, d_in))
        self.B = nn.Parameter(torch.zeros(d_out, rank))
        self.scale, self.dropout = scale, dropout
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        """r."""
        return self.A.size(0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., d_in), y (..., d_out) -> (..., d_out)."""
        # Flat once for both products: each product of more than two dimensions would do it again,
        # and the calls, not the arithmetic, are the time of a small layer.
        h, B = self.latent(x if x.dim() == 2 else x.flatten(0, -2)), self.B  # (N, r)
        if h.dtype == y.dtype == B.dtype:  # under autocast h is of lower precision than B
            return _add_rows(y, h, B, self.scale)
        return add_product(y, h, B, self.scale)

    def latent(self, x: Tensor) -> Tensor:
        """What enters B: x (N, d_in) -> (N, r)."""
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        A = self.A
        return F.linear(x, A if A.dtype == x.dtype else A.to(x.dtype))

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """B (d_out, r) and A (r, d_in), of which B A is what the layer adds to a weight; the scale
        is in B.
        """
        return self.scale * self.B, self.A.clone()


def add_product(y: Tensor, h: Tensor, up: Tensor, scale: float) -> Tensor:
    """y + scale · B h in one operation. y (..., d_out), h (..., r) or its rows (N, r), up is B
    (d_out, r).
    """
    if torch.is_autocast_enabled(h.device.type) or y.dtype != h.dtype:
        return y + F.linear(h, up.to(h.dtype)).to(y.dtype).view_as(y) * scale
    return _add_rows(y, h if h.dim() == 2 else h.flatten(0, -2), up.to(h.dtype), scale)


def _add_rows(y: Tensor, h: Tensor, up: Tensor, scale: float) -> Tensor:
    """`add_product` of one dtype. h (N, r)."""
    if y.dim() == 2:
        return torch.addmm(y, h, up.t(), alpha=scale)
    return torch.addmm(y.flatten(0, -2), h, up.t(), alpha=scale).view_as(y)
