"""Bottleneck adapters: sequential (Houlsby et al. 2019) and parallel (He et al. 2022)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.delta.base import Delta, DeltaConfig, DeltaLayer, register
from model.delta.target import Target, outer_widths

Activation = Literal["relu", "gelu", "silu", "tanh"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


@register
@dataclass
class AdapterConfig(DeltaConfig):
    """Sequential adapters: y + up(act(down(y))), after a sub-layer's last projection or after the
    sub-layer as a whole. Of both sub-layers it is Houlsby et al. (2019, section 2.1), of the
    feed-forward network alone Pfeiffer et al. (2021). `up` starts at zero, so nothing is added at
    first.

    Attributes:
        bottleneck_dim: Width between the two projections.
        activation: act: "relu", "gelu", "silu" or "tanh".
        bias: Whether both projections have a bias.
        width: Width of input and output of targets that are no matrix; null: those of the first and
            the last matrix inside, or of a norm's weight.
    """

    method: ClassVar[str] = "adapter"
    needs_matrix: ClassVar[bool] = False

    targets: list[str] = field(default_factory=lambda: ["o_proj", "down_proj"])
    bottleneck_dim: int = 24
    activation: Activation = "gelu"
    bias: bool = True
    width: int | None = None

    def __post_init__(self) -> None:
        self._require("bottleneck_dim", self.bottleneck_dim >= 1, "at least 1")
        self._require("width", self.width is None or self.width >= 1, "at least 1, or null")

    def widths_of(self, target: Target) -> tuple[int, int]:
        """Widths of a target's input and output. ValueError where they cannot be told."""
        if target.kind == "other" and self.width is not None:
            return self.width, self.width
        widths = outer_widths(target)
        if widths is None:
            raise ValueError(
                f"width: null, but {target.name}, a {type(target.module).__name__}, has no matrix "
                "inside to tell it; give the width of its output"
            )
        return widths

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New projections. ValueError where a target's widths cannot be told or do not fit."""
        return Delta(self, targets, self.layer)

    def layer(self, target: Target) -> "AdapterLayer":
        """The adapter of a target."""
        width = self.widths_of(target)[1]
        down, up = self.projections(target.name, width, width)
        return AdapterLayer(down, up, self.activation)

    def projections(
        self, name: str, d_in: int, d_out: int
    ) -> tuple["AdapterProjection", "AdapterProjection"]:
        """down (d_in -> bottleneck_dim) and up (bottleneck_dim -> d_out), which is zero, of the
        target `name`.
        """
        m = self.bottleneck_dim
        return FullProjection(d_in, m, self.bias), FullProjection(m, d_out, self.bias, zero=True)


@register
@dataclass
class ParallelAdapterConfig(AdapterConfig):
    """Parallel adapters: y + s · up(act(down(x))) (He et al. 2022, table 1), around a projection or
    a whole sub-layer. `up` starts at zero.

    Attributes:
        scale: s.
    """

    method: ClassVar[str] = "parallel_adapter"

    scale: float = 1.0

    def layer(self, target: Target) -> "AdapterLayer":
        """The adapter of a target."""
        down, up = self.projections(target.name, *self.widths_of(target))
        return AdapterLayer(down, up, self.activation, parallel=True, scale=self.scale)


class AdapterProjection(nn.Module):
    """y = W x (+ b), W (d_out, d_in) what `matrix` makes of the parameters."""

    def __init__(self, d_out: int, bias: bool) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(d_out)) if bias else None

    def matrix(self) -> Tensor:
        """W (d_out, d_in)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out), in x's dtype."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.matrix().to(x.dtype), bias)


class FullProjection(AdapterProjection):
    """W is a parameter: uniform as torch's Linear has it, or zero."""

    def __init__(self, d_in: int, d_out: int, bias: bool, zero: bool = False) -> None:
        super().__init__(d_out, bias)
        self.weight = nn.Parameter(torch.zeros(d_out, d_in))
        if not zero:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def matrix(self) -> Tensor:
        """W (d_out, d_in)."""
        return self.weight


class AdapterLayer(DeltaLayer):
    """y + s · up(act(down(z))), z the target's output, or with `parallel` its input."""

    def __init__(
        self,
        down: AdapterProjection,
        up: AdapterProjection,
        activation: Activation,
        parallel: bool = False,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.down, self.up = down, up
        self.activation, self.parallel, self.scale = activation, parallel, scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (..., d_in), y (..., d_out) -> (..., d_out)."""
        h = ACTIVATIONS[self.activation](self.down(x if self.parallel else y))
        return y + self.scale * self.up(h).to(y.dtype)
