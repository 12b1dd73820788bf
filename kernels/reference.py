"""Each operation of the model in plain torch: the definition, the CPU path and the oracle of any
fused kernel.

Shapes: B batch, T time, H heads, D head dimension, r rank, M = B · T rows. Any floating dtype;
statistics and rotations are computed in float32 (float64 for float64 input) and the result has the
dtype of the input. The first part holds the layers as a reader knows them, for any leading
dimensions; the second the pieces that the custom operators (ops.py) are made of, each with a Triton
kernel of the same name and signature in triton/.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (Zhang and Sennrich 2019, eq. 4).

    x (..., d), weight (d,) -> (..., d).
    """
    y = F.rms_norm(x, (x.size(-1),), weight.to(x.dtype), eps)
    return y.to(x.dtype)  # autocast on a GPU computes it in float32


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

    x (B, T, H, D), cos and sin (T, D/2), or (B, T, D/2) where rows are at positions of their own
    -> (B, T, H, D).
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (…, T, 1, D/2), the same for every head
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


def row_rstd(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) of each row, the factor of RMSNorm. x (M, d) -> (M,), float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(x.square().mean(dim=-1) + eps)


def fold(norm_weight: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The weights stacked by rows, each column times its norm weight: norm_weight (d,) and weights
    (n_i, d) -> (Σ n_i, d). x̂ Wᵀ with x̂ = rstd · x ∘ norm_weight is then rstd · (x foldedᵀ), so x̂
    need not exist.
    """
    return torch.cat(tuple(weights)) * norm_weight


def project(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    head_dim: int = 0,
) -> Tensor:
    """y = rotate(rstd · (x weightᵀ)): a matrix product and what its epilogue does.

    x (M, k), weight (n, k), rstd (M,) or None -> (M, n). With cos and sin (T, D/2), row m is at
    position m mod T, and each head of D columns is rotated as in apply_rotary.
    """
    if rstd is None:
        y = x @ weight.t()
    elif x.dtype == torch.float16:  # ends at 65504: the product of rows not yet scaled may not fit
        y = (rstd[:, None] * x).to(x.dtype) @ weight.t()
    else:
        y = (rstd[:, None] * (x @ weight.t())).to(x.dtype)
    return y if cos is None or sin is None else rotate(y, cos, sin, head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> Tensor:
    """apply_rotary for rows: x (M, H·D), cos and sin (T, D/2), row m at position m mod T."""
    heads = x.view(-1, cos.size(0), x.size(1) // head_dim, head_dim)  # (B, T, H, D)
    return apply_rotary(heads, cos, sin).view_as(x)


def unrotate(
    x: Tensor, cos: Tensor, sin: Tensor, head_dim: int, rstd: Tensor | None = None
) -> Tensor:
    """The inverse of rotate, and so its gradient: by the opposite angle, then times rstd (M,)."""
    y = rotate(x, cos, -sin, head_dim)
    return y if rstd is None else (rstd[:, None] * y).to(x.dtype)


def scale_and_dot(dh: Tensor, h: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """What the backward pass of h = rstd · (x Aᵀ) needs of dh: rstd · dh (M, r), and the
    coefficient of x in dx, rstd² / d · Σ_j dh_j h_j without its 1/d, (M,) in float32.
    """
    wide = torch.promote_types(dh.dtype, torch.float32)
    dot = (dh.to(wide) * h.to(wide)).sum(dim=-1)
    return (rstd[:, None] * dh).to(dh.dtype), rstd.square() * dot


def norm_backward_matmul(
    dhs: Tensor, a: Tensor, x: Tensor, coefficient: Tensor, d_residual: Tensor | None
) -> Tensor:
    """dx = dhs a - coefficient / d · x (+ d_residual): the gradient of rstd · (x aᵀ) for x, rstd
    being a function of x, and of a residual connection from x.

    dhs (M, r) = rstd · dh, a (r, d), x (M, d), coefficient (M,) -> (M, d). From
    ∂rstd/∂x_k = -rstd³ x_k / d and h = rstd · (x aᵀ).
    """
    dx = dhs @ a - (coefficient / x.size(1))[:, None] * x
    return (dx if d_residual is None else dx + d_residual).to(x.dtype)


def norm_backward(g: Tensor, x: Tensor, rstd: Tensor, d_residual: Tensor | None) -> Tensor:
    """dx of y = rstd · x, rstd being a function of x, from g = rstd · dy (M, d); (+ d_residual)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    dot = (g.to(wide) * x.to(wide)).sum(dim=-1)
    dx = g - (rstd.square() * dot / x.size(1))[:, None] * x
    return (dx if d_residual is None else dx + d_residual).to(x.dtype)
