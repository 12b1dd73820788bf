"""SoRA (Ding et al. 2023): LoRA with a gate for each rank, which proximal steps make sparse."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from model.delta.base import Delta, DeltaLayer, register
from model.delta.methods.lora import LoraConfig, LoraLayer
from model.delta.target import Target


@register
@dataclass
class SoraConfig(LoraConfig):
    """SoRA: y + s · B (g ⊙ (A x)), g (r,); model/delta/prox.py has the step that sets gates to 0.

    Attributes:
        gate_init: "normal" (N(0, 1), as in the authors' code) or "ones" (LoRA's start).
    """

    method: ClassVar[str] = "sora"

    gate_init: Literal["normal", "ones"] = "normal"

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New factors and gates: B is zero, so nothing is added at first."""
        return Delta(self, self.kept(targets), self._layer)

    def _layer(self, target: Target) -> DeltaLayer:
        rank, scale = self.rank_of(target), self.scale_of(target)
        layer = SoraLayer(*target.widths, rank, scale, self.dropout)
        if self.gate_init == "normal":
            nn.init.normal_(layer.gate)
        return layer


class SoraLayer(LoraLayer):
    """y + s · B (g ⊙ (A x)). A (r, d_in), B (d_out, r), gate (r,)."""

    def __init__(
        self, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0
    ) -> None:
        super().__init__(d_in, d_out, rank, scale, dropout)
        self.gate = nn.Parameter(torch.ones(rank))

    def latent(self, x: Tensor) -> Tensor:
        """What enters B: x (N, d_in) -> (N, r)."""
        h, gate = super().latent(x), self.gate
        return h * (gate if gate.dtype == h.dtype else gate.to(h.dtype))

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """B and A of what the layer adds to a weight; scale and gates are in B."""
        return self.scale * self.B * self.gate, self.A.clone()

    def num_kept(self) -> int:
        """Gates that are not 0."""
        return int(torch.count_nonzero(self.gate.detach()))
