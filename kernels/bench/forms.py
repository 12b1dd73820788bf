"""The three forms of each operation.

  eager    plain torch as a reader would write it: reference.rms_norm, low_dim_linear for each of q,
           k and v, apply_rotary
  stacked  plain torch for cuBLAS: factors of q, k and v in one product, the norm folded into it,
           the residual added by the output's product
  fused    the operators of kernels/ops.py

Shapes: B batch, T time, M = B · T rows, d hidden size, r rank, H heads of D columns, H · D = d.
x, residual (B, T, d), norm (d,), a_* (r, d), b_* (d, r), w_* (d, d), h_* (B, T, r), h (B, T, 3 r),
cos and sin (T, D/2). norm_down and norm_qkv of ops.py also return x for a residual connection: that
is part of the layers alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops, reference

EPS = 1e-6

Tensors = tuple[Tensor, ...]


def _heads(x: Tensor, cos: Tensor) -> Tensor:
    """(B, T, H·D) -> (B, T, H, D)."""
    return x.unflatten(-1, (-1, 2 * cos.size(1)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, T, H, D) -> (B, T, H·D), causal; the backend is torch's choice."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def norm_down_eager(x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor) -> Tensors:
    normed = reference.rms_norm(x, norm, EPS)
    return F.linear(normed, a_q), F.linear(normed, a_k), F.linear(normed, a_v)


def _norm_project(x: Tensor, norm: Tensor, weights: Tensors) -> Tensor:
    rows = x.flatten(0, 1)  # (M, d)
    y = reference.project(rows, reference.fold(norm, weights), reference.row_rstd(rows, EPS))
    return y.unflatten(0, x.shape[:2])


def norm_down_stacked(x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor) -> Tensors:
    return (_norm_project(x, norm, (a_q, a_k, a_v)),)


def norm_down_fused(x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor) -> Tensors:
    return (ops.norm_down(x, norm, (a_q, a_k, a_v), EPS)[0],)


def up_rotary_eager(
    h_q: Tensor, h_k: Tensor, h_v: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    q, k, v = (
        _heads(F.linear(h, b), cos) for h, b in ((h_q, b_q), (h_k, b_k), (h_v, b_v))
    )  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def up_rotary_stacked(
    h: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    latents = h.flatten(0, 1).unflatten(1, (3, -1)).transpose(0, 1)  # (3, M, r), not copied
    y = torch.bmm(latents, torch.stack((b_q, b_k, b_v)).transpose(1, 2))  # (3, M, d)
    q, k, v = _heads(y.unflatten(1, h.shape[:2]), cos).unbind()  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def up_rotary_fused(
    h: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    return ops.up_rotary(h, (b_q, b_k, b_v), cos, sin, 2 * cos.size(1))


def norm_qkv_eager(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    normed = reference.rms_norm(x, norm, EPS)
    q, k, v = (_heads(F.linear(normed, w), cos) for w in (w_q, w_k, w_v))  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def norm_qkv_stacked(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    y = _norm_project(x, norm, (w_q, w_k, w_v))  # (B, T, 3 d)
    q, k, v = (_heads(part, cos) for part in y.chunk(3, dim=-1))  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def norm_qkv_fused(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    return ops.norm_qkv(x, norm, (w_q, w_k, w_v), EPS, cos, sin, 2 * cos.size(1))[:3]


def low_dim_eager(x: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensors:
    return (reference.low_dim_linear(x, a, b) + residual,)


def _add_product(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x weightᵀ, one product with the residual as its accumulator."""
    return torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight.t()).view_as(residual)


def low_dim_stacked(x: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensors:
    return (_add_product(residual, F.linear(x, a), b),)


def low_dim_fused(x: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensors:
    return (ops.low_dim_linear(x, a, b, residual=residual),)


def lpa_layer_eager(
    x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor, b_q: Tensor, b_k: Tensor,
    b_v: Tensor, a_o: Tensor, b_o: Tensor, cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    h_q, h_k, h_v = norm_down_eager(x, norm, a_q, a_k, a_v)
    y = _attend(*up_rotary_eager(h_q, h_k, h_v, b_q, b_k, b_v, cos, sin))
    return (reference.low_dim_linear(y, a_o, b_o) + x,)


def lpa_layer_stacked(
    x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor, b_q: Tensor, b_k: Tensor,
    b_v: Tensor, a_o: Tensor, b_o: Tensor, cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    (h,) = norm_down_stacked(x, norm, a_q, a_k, a_v)
    y = _attend(*up_rotary_stacked(h, b_q, b_k, b_v, cos, sin))
    return low_dim_stacked(y, a_o, b_o, x)


def lpa_layer_fused(
    x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor, b_q: Tensor, b_k: Tensor,
    b_v: Tensor, a_o: Tensor, b_o: Tensor, cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    h, residual = ops.norm_down(x, norm, (a_q, a_k, a_v), EPS)
    y = _attend(*up_rotary_fused(h, b_q, b_k, b_v, cos, sin))
    return low_dim_fused(y, a_o, b_o, residual)


def vanilla_layer_eager(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    y = _attend(*norm_qkv_eager(x, norm, w_q, w_k, w_v, cos, sin))
    return (F.linear(y, w_o) + x,)


def vanilla_layer_stacked(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    y = _attend(*norm_qkv_stacked(x, norm, w_q, w_k, w_v, cos, sin))
    return (_add_product(x, y, w_o),)


def vanilla_layer_fused(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    weights = (w_q, w_k, w_v)
    q, k, v, residual = ops.norm_qkv(x, norm, weights, EPS, cos, sin, 2 * cos.size(1))
    return (_add_product(residual, _attend(q, k, v), w_o),)
