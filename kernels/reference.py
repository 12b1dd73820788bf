"""Each operation of the model in plain torch: the definition, the CPU path and the oracle of any
fused kernel.

Shapes: B batch, T time, H heads, D head dimension, r rank. Every function takes any leading
dimensions and any floating dtype; statistics and rotations are computed in float32 (float64 for
float64 input) and the result has the dtype of the input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019, eq. 4).

    x (..., d), weight (d,) -> (..., d).
    """
    return F.rms_norm(x, (x.size(-1),), weight.to(x.dtype), eps)


def rotary_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position · theta^(-2i/D), i < D/2 (Su et al. 2021, section 3.2.2), in float32.

    positions (...,) integers -> two tensors (..., D/2). Computed in float64 before rounding: in
    float32 the angle at position 8191 is off by up to 5e-4 radians.
    """
    i = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[..., None] * theta ** (-i / head_dim)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+D/2}) ("rotate half", the order of Llama checkpoints).

    x (B, T, H, D), cos and sin (T, D/2) -> (B, T, H, D).
    """
    cos, sin = cos[:, None, :], sin[:, None, :]  # (T, 1, D/2), the same for every head
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


def low_dim_linear(
    x: Tensor, a: Tensor, b: Tensor, bias_a: Tensor | None = None, bias_b: Tensor | None = None
) -> Tensor:
    """y = B (A x + bias_a) + bias_b, the low-dimensional projection of LPA (Lv et al. 2024).

    x (..., d_in), a (r, d_in), b (d_out, r), bias_a (r,), bias_b (d_out,) -> (..., d_out). There is
    nothing between the factors: no activation, no normalisation, no scale.
    """
    return F.linear(F.linear(x, a, bias_a), b, bias_b)
