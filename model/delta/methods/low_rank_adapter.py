"""Low-rank adapters (OpenDelta, Hu et al. 2023): both projections of an adapter are low-rank."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.delta.base import register
from model.delta.methods.bottleneck import AdapterConfig, AdapterProjection


@register
@dataclass
class LowRankAdapterConfig(AdapterConfig):
    """y + up(act(down(y))), where down = L_d R_d and up = L_u R_u are of rank r (`low_rank_adapter`
    of OpenDelta, Hu et al. 2023). L_u starts at zero, so nothing is added at first.

    With a width d and a bottleneck m: 2 r (d + m) parameters, and d + m of biases.

    Attributes:
        rank: r.
    """

    method: ClassVar[str] = "low_rank_adapter"

    rank: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = f"1 to bottleneck_dim {self.bottleneck_dim}"
        self._require("rank", 1 <= self.rank <= self.bottleneck_dim, allowed)

    def projections(
        self, name: str, d_in: int, d_out: int
    ) -> tuple[AdapterProjection, AdapterProjection]:
        """down and up. ValueError where the rank is over the target's width."""
        if self.rank > min(d_in, d_out):
            raise ValueError(
                f"rank: {self.rank} at {name}, {min(d_in, d_out)} wide; allowed is 1 to its width"
            )
        m = self.bottleneck_dim
        down = LowRankProjection(d_in, m, self.rank, self.bias)
        return down, LowRankProjection(m, d_out, self.rank, self.bias, zero=True)


class LowRankProjection(AdapterProjection):
    """W = L R. left L (d_out, r), right R (r, d_in).

    L is N(0, 1/r) and R N(0, 1/d_in), so that an entry of W has the variance 1/d_in; zero: L is.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool, zero: bool = False) -> None:
        super().__init__(d_out, bias)
        self.left = nn.Parameter(torch.zeros(d_out, rank))
        self.right = nn.Parameter(torch.randn(rank, d_in) / math.sqrt(d_in))
        if not zero:
            nn.init.normal_(self.left, std=1 / math.sqrt(rank))

    def matrix(self) -> Tensor:
        """W (d_out, d_in)."""
        return self.left @ self.right
