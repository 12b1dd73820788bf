"""BitFit (Ben Zaken et al. 2022): only biases are trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from model.delta.base import Delta, DeltaConfig, DeltaLayer, register
from model.delta.target import Target, outer_widths


@register
@dataclass
class BitFitConfig(DeltaConfig):
    """BitFit: y + b, a trained vector on the outputs of linear layers and norms (Ben Zaken et al.
    2022). b starts at zero; trained, it is how far the target's own bias, which stays frozen, would
    have moved, where it has one: without weight decay, which would pull b to zero instead of the
    bias. On a factorised target it is a bias of the output, not of the latent.
    """

    method: ClassVar[str] = "bitfit"
    needs_matrix: ClassVar[bool] = False

    targets: list[str] = field(default_factory=lambda: ["re:.*(_proj|norm)"])

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New biases, zero. ValueError where a target's width cannot be told; an nn.Identity, the
        final norm of a family that has none, is left out.
        """
        kept = [one for one in targets if not isinstance(one.module, nn.Identity)]
        return Delta(self, kept, self._layer)

    def _layer(self, target: Target) -> DeltaLayer:
        widths = outer_widths(target)
        if widths is None:
            raise ValueError(
                f"targets: {target.name} is a {type(target.module).__name__}; allowed are linear "
                "layers, norms with a weight, and modules with matrices inside"
            )
        return BitFitLayer(widths[1])


class BitFitLayer(DeltaLayer):
    """y + b. bias b (d_out,)."""

    def __init__(self, d_out: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x unused, y (..., d_out) -> (..., d_out)."""
        return y + self.bias.to(y.dtype)
