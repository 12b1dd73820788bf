"""Compacter (Mahabadi et al. 2021): adapters whose projections are sums of Kronecker products."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.delta.base import Delta, DeltaLayer, register
from model.delta.methods.bottleneck import AdapterConfig, AdapterProjection
from model.delta.target import Target


@register
@dataclass
class CompacterConfig(AdapterConfig):
    """Compacter: y + up(act(down(y))), both projections W = Σ_i A_i ⊗ B_i over i = 1 … n (the PHM
    layer of Zhang et al. 2021), A_i (n, n), B_i (d_out/n, d_in/n) = s_i t_i of rank r (Mahabadi et
    al. 2021, equations 4 and 5). The s_i of `up` start at zero, so nothing is added at first.

    With a width d and a bottleneck m, a target has 2 r (d + m) parameters, or 2 d m / n where B_i
    is whole, and d + m of biases; the A_i are n³ for all, or 2 n³ for each target.

    Attributes:
        hypercomplex_division: n, a divisor of bottleneck_dim and of the targets' widths.
        shared: Whether the A_i are those of all projections of all targets (the paper's section
            4.1), or each projection has its own.
        phm_rank: r; null: B_i is a whole matrix.
    """

    method: ClassVar[str] = "compacter"

    hypercomplex_division: int = 4
    shared: bool = True
    phm_rank: int | None = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        n, m = self.hypercomplex_division, self.bottleneck_dim
        divides = n >= 1 and m % n == 0
        self._require("hypercomplex_division", divides, f"a divisor of bottleneck_dim {m}")
        fits = self.phm_rank is None or 1 <= self.phm_rank <= m // n
        allowed = f"1 to {m // n} (bottleneck_dim / hypercomplex_division), or null"
        self._require("phm_rank", fits, allowed)

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New projections. ValueError where n does not divide a target's width."""
        common: list[nn.Parameter] = []

        def make(target: Target) -> DeltaLayer:
            layer = self.layer(target)
            if self.shared:
                for part in (layer.down, layer.up):
                    assert isinstance(part, PhmProjection)
                    common.append(part.A)
                    part.A = common[0]
            return layer

        return Delta(self, targets, make)

    def projections(
        self, name: str, d_in: int, d_out: int
    ) -> tuple[AdapterProjection, AdapterProjection]:
        """down and up. ValueError where n does not divide the target's width."""
        n, m, rank = self.hypercomplex_division, self.bottleneck_dim, self.phm_rank
        for width in (d_in, d_out):
            if width % n or (rank is not None and rank > width // n):
                raise ValueError(
                    f"hypercomplex_division: {n} at {name}, {width} wide, with phm_rank {rank}; "
                    "allowed are divisors of the width, with a quotient of at least phm_rank"
                )
        down = PhmProjection(d_in, m, n, rank, self.bias)
        return down, PhmProjection(m, d_out, n, rank, self.bias, zero=True)


class PhmProjection(AdapterProjection):
    """W = Σ_i A_i ⊗ B_i. A (n, n, n), of which A[i] is A_i; B (n, d_out/n, d_in/n), or its factors
    s (n, d_out/n, r) and t (n, r, d_in/n).

    A is N(0, 1/n), B, or s t, has the variance 1/d_in, and so has W; zero: B, or s, is.
    """

    B: nn.Parameter | None

    def __init__(
        self, d_in: int, d_out: int, n: int, rank: int | None, bias: bool, zero: bool = False
    ) -> None:
        super().__init__(d_out, bias)
        self.A = nn.Parameter(torch.randn(n, n, n) / math.sqrt(n))
        scale = 0.0 if zero else 1.0
        if rank is None:
            whole = torch.randn(n, d_out // n, d_in // n)
            self.B = nn.Parameter(scale * whole / math.sqrt(d_in))
            return
        self.B = None
        self.s = nn.Parameter(scale * torch.randn(n, d_out // n, rank) / math.sqrt(rank))
        self.t = nn.Parameter(torch.randn(n, rank, d_in // n) / math.sqrt(d_in))

    def matrix(self) -> Tensor:
        """W (d_out, d_in)."""
        B = self.s @ self.t if self.B is None else self.B
        blocks = torch.einsum("ipq,iab->paqb", self.A, B)  # (n, d_out/n, n, d_in/n)
        return blocks.flatten(2, 3).flatten(0, 1)
