"""Dense and LowDim projections: the one place where the vanilla Transformer and LPA differ."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import ops, reference
from model.norm import RMSNorm
from model.shape import Shape


class Dense(nn.Linear):
    """y = W x (+ bias): the projection of the vanilla Transformer. weight (d_out, d_in)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.d_in, shape.d_out, bias=shape.bias != "none")

    def reset_parameters(self) -> None:
        """Does nothing: init_weights sets every parameter of a model."""


class LowDim(nn.Module):
    """y = B (A x): the low-dimensional projection of LPA. A (r, d_in), B (d_out, r).

    A bias, where the family has one, sits on the latent (after A) or on the output (after B). With
    a latent norm, y = B (√(d_in/r) · RMSNorm(A x)), as in MLRA (ICLR 2026): what enters B has the
    length √d_in, that of an input of unit scale which enters a dense weight. With a latent
    activation, y = B silu(A x), as in CoLA (Liu et al. 2025).
    """

    bias_A: nn.Parameter | None
    bias_B: nn.Parameter | None

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        assert shape.rank is not None
        # Kept as numbers: under ZeRO stage 3 the shape of a parameter at rest is (0,).
        self.d_in, self.d_out, self.rank = shape.d_in, shape.d_out, shape.rank
        self.A = nn.Parameter(torch.empty(shape.rank, shape.d_in))
        self.B = nn.Parameter(torch.empty(shape.d_out, shape.rank))
        latent, output = shape.bias == "latent", shape.bias == "output"
        self.bias_A = nn.Parameter(torch.empty(shape.rank)) if latent else None
        self.bias_B = nn.Parameter(torch.empty(shape.d_out)) if output else None
        eps = shape.latent_eps
        self.latent_norm = None if eps is None else RMSNorm(shape.rank, eps)
        self.latent_silu = shape.latent_silu
        self.fused = False  # by the operator of kernels.ops, a node of the graph instead of two

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        if self.latent_norm is not None or self.latent_silu:
            return self.up(self.down(x))
        linear = ops.low_dim_linear if self.fused else reference.low_dim_linear
        return linear(x, self.A, self.B, self.bias_A, self.bias_B)

    def down(self, x: Tensor) -> Tensor:
        """What enters B of x (..., d_in): the latent (..., r), normalised or activated where the
        layer does so.
        """
        latent = F.linear(x, self.A, self.bias_A)
        return F.silu(latent) if self.latent_silu else self.normalised(latent)

    def up(self, latent: Tensor) -> Tensor:
        """The output (..., d_out) of what enters B, (..., r)."""
        return F.linear(latent, self.B, self.bias_B)

    def normalised(self, latent: Tensor) -> Tensor:
        """What enters B of a latent (..., r), which is A x + bias_A: the latent itself where there
        is no norm.
        """
        if self.latent_norm is None:
            return latent
        normed: Tensor = self.latent_norm(latent) * math.sqrt(self.d_in / self.rank)
        return normed

    def extra_repr(self) -> str:
        """Shape of the layer for print(model)."""
        return f"d_in={self.d_in}, d_out={self.d_out}, r={self.rank}"


def projection(shape: Shape) -> Dense | LowDim:
    """The layer for a shape: dense where the rank is None."""
    return Dense(shape) if shape.rank is None else LowDim(shape)


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class and nobody watches its calls, so that code which
    reads its parameters instead of calling it does the same.
    """
    return type(module) is kind and not watched(module)


def watched(module: nn.Module) -> bool:
    """Whether calls of a module are seen or changed from outside: by hooks of its own or of all
    modules, or by a forward that was put on the instance.
    """
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
        or nn.modules.module._has_any_global_hook()
    )
