"""The custom operators of a low-dimensional attention layer, and of a vanilla one fused alike.

    x ── norm_down ── h ── up_rotary ── q, k, v ── attention ── low_dim_linear(+ residual) ── y
    x ── norm_qkv ──────────────────── q, k, v ── attention ── W_o y + residual

Forward and backward of each are operators of torch.library: opaque to torch.compile, visible by
name to selective checkpointing, with shapes for fake tensors. What computes them is chosen call by
call in dispatch.py; the definitions are in reference.py.

The normalised input x̂ never exists. With the norm's weight folded into the factors and
rstd = 1 / rms(x) applied to the result, h = rstd · (x (A ∘ w)ᵀ); backward, with dhs = rstd · dh:

    dx = dhs (A ∘ w) - rstd² / d · (Σ_j dh_j h_j) · x + d_residual
    dA = (dhsᵀ x) ∘ w        dw = Σ_rows (dhsᵀ x) ∘ A
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from kernels import dispatch, reference
from kernels.checks import (
    check_factors,
    check_head_dim,
    check_norm_weight,
    check_same_kind,
    check_table,
    check_three,
    to_autocast,
)

Triple = tuple[Tensor, Tensor, Tensor]


# --- rstd ---------------------------------------------------------------------------------------


@custom_op("lpa::row_rstd", mutates_args=())
def _row_rstd(x: Tensor, eps: float) -> Tensor:
    return dispatch.row_rstd(x, eps)


@_row_rstd.register_fake
def _(x: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.size(0), dtype=torch.promote_types(x.dtype, torch.float32))


def row_rstd(x: Tensor, eps: float) -> Tensor:
    """1 / rms of each row of x (M, d) -> (M,), as a constant: what uses it knows that it is a
    function of x. Under torch.compile it is plain torch, which Inductor fuses with the addition
    that made x.
    """
    x = x.detach()
    return reference.row_rstd(x, eps) if torch.compiler.is_compiling() else _row_rstd(x, eps)


# --- norm_down ----------------------------------------------------------------------------------


@custom_op("lpa::norm_down", mutates_args=())
def _norm_down(
    x: Tensor, rstd: Tensor, norm_weight: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor
) -> Tensor:
    return dispatch.project(x, reference.fold(norm_weight, (a_q, a_k, a_v)), rstd)


@_norm_down.register_fake
def _(
    x: Tensor, rstd: Tensor, norm_weight: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor
) -> Tensor:
    return x.new_empty(x.size(0), a_q.size(0) + a_k.size(0) + a_v.size(0))


@custom_op("lpa::norm_down_backward", mutates_args=())
def _norm_down_backward(
    dh: Tensor,
    d_residual: Tensor | None,
    h: Tensor,
    x: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    a_v: Tensor,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    factors = (a_q, a_k, a_v)
    dhs, coefficient = dispatch.scale_and_dot(dh, h, rstd)
    folded = reference.fold(norm_weight, factors)
    dx = dispatch.norm_backward_matmul(dhs, folded, x, coefficient, d_residual)
    return dx, *_unfolded_grads(dhs, x, norm_weight, factors, weights)


@_norm_down_backward.register_fake
def _(
    dh: Tensor,
    d_residual: Tensor | None,
    h: Tensor,
    x: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    a_q: Tensor,
    a_k: Tensor,
    a_v: Tensor,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *_weight_shaped((norm_weight, a_q, a_k, a_v), weights)


def _unfolded_grads(
    dys: Tensor, x: Tensor, norm_weight: Tensor, weights: Sequence[Tensor], wanted: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the norm's weight and of the three weights folded with it."""
    if not wanted:
        w_q, w_k, w_v = weights
        return _weight_shaped((norm_weight, w_q, w_k, w_v), False)
    folded = dys.t() @ x  # (Σ n_i, d)
    wide = torch.promote_types(folded.dtype, torch.float32)
    d_norm = torch.zeros(norm_weight.shape, device=x.device, dtype=wide)
    grads = []
    for part, weight in zip(folded.split([w.size(0) for w in weights]), weights, strict=True):
        d_norm += (part.to(wide) * weight).sum(dim=0)
        grads.append(part * norm_weight)
    return d_norm.to(norm_weight.dtype), grads[0], grads[1], grads[2]


def _weight_shaped(tensors: tuple[Tensor, Tensor, Tensor, Tensor], wanted: bool) -> Any:
    """Empty gradients: an operator cannot return None."""
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if wanted else t.new_empty(0)
        for t in tensors
    )


class _NormDown(torch.autograd.Function):
    """norm_down and its input again, so that the gradient of a residual connection from x comes
    back here and is added in the epilogue that makes dx.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        a_q: Tensor,
        a_k: Tensor,
        a_v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h = _norm_down(x, rstd, norm_weight, a_q, a_k, a_v)
        ctx.save_for_backward(x, rstd, norm_weight, a_q, a_k, a_v, h)
        ctx.set_materialize_grads(False)
        return h, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dh: Tensor | None, d_residual: Tensor | None) -> Any:
        x, rstd, norm_weight, a_q, a_k, a_v, h = ctx.saved_tensors
        if dh is None:
            return d_residual, None, None, None, None, None
        wanted = any(ctx.needs_input_grad[2:])
        dx, *grads = _norm_down_backward(
            dh, d_residual, h, x, rstd, norm_weight, a_q, a_k, a_v, wanted
        )
        return dx, None, *(grads if wanted else [None] * 4)


def norm_down(x: Tensor, norm_weight: Tensor, factors: Triple, eps: float) -> tuple[Tensor, Tensor]:
    """h = RMSNorm(x) Aᵀ for the stacked factors A of q, k and v, and x for a residual connection.

    x (..., d), norm_weight (d,), factors (r_q, d), (r_k, d), (r_v, d) -> h (..., r_q + r_k + r_v)
    and x itself, of the same memory: using this x for the residual saves a pass over dx. In float16
    the gradients of the factors lose digits where x is large and dh small. ValueError where shapes,
    dtypes or devices do not fit.
    """
    whole = x
    x, norm_weight, *factors_list = to_autocast(x, norm_weight, *factors)
    check_factors("factors", factors_list, x)
    check_norm_weight(norm_weight, x)
    rows = x.flatten(0, -2)
    h, residual = _NormDown.apply(rows, row_rstd(rows, eps), norm_weight, *factors_list)
    return h.view(*x.shape[:-1], h.size(-1)), _residual(whole, residual)


def _residual(x: Tensor, residual: Tensor) -> Tensor:
    """The x that a residual connection uses: under autocast the stream keeps its own dtype."""
    return residual.view(x.shape) if residual.dtype == x.dtype else x


# --- up_rotary ----------------------------------------------------------------------------------


@custom_op("lpa::up_rotary", mutates_args=())
def _up_rotary(
    h: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    h_q, h_k, h_v = h.split([b_q.size(1), b_k.size(1), b_v.size(1)], dim=1)
    q = dispatch.project(h_q, b_q, None, cos, sin, head_dim)
    k = dispatch.project(h_k, b_k, None, cos, sin, head_dim)
    return q, k, h_v @ b_v.t()


@_up_rotary.register_fake
def _(
    h: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor, cos: Tensor, sin: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (h.new_empty(h.size(0), b.size(0)) for b in (b_q, b_k, b_v))
    return q, k, v


@custom_op("lpa::up_rotary_backward", mutates_args=())
def _up_rotary_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    h: Tensor,
    b_q: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq = dispatch.unrotate(dq, cos, sin, head_dim)
    dk = dispatch.unrotate(dk, cos, sin, head_dim)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    ranks = [b_q.size(1), b_k.size(1), b_v.size(1)]
    grads = []
    parts = zip((dq, dk, dv), (b_q, b_k, b_v), dh.split(ranks, 1), h.split(ranks, 1), strict=True)
    for dy, b, dh_part, h_part in parts:
        torch.mm(dy, b, out=dh_part)
        grads.append(dy.t() @ h_part if weights else b.new_empty(0))
    return dh, grads[0], grads[1], grads[2]


@_up_rotary_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    h: Tensor,
    b_q: Tensor,
    b_k: Tensor,
    b_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (b.new_empty(b.shape) if weights else b.new_empty(0) for b in (b_q, b_k, b_v))
    return torch.empty_like(h, memory_format=torch.contiguous_format), q, k, v


def _save_up_rotary(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.head_dim = inputs
    ctx.save_for_backward(*tensors)


def _up_rotary_grads(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
    h, b_q, b_k, b_v, cos, sin = ctx.saved_tensors
    wanted = any(ctx.needs_input_grad[1:4])
    dh, *grads = _up_rotary_backward(dq, dk, dv, h, b_q, b_k, b_v, cos, sin, ctx.head_dim, wanted)
    return dh, *(grads if wanted else [None] * 3), None, None, None


_up_rotary.register_autograd(_up_rotary_grads, setup_context=_save_up_rotary)


def up_rotary(h: Tensor, factors: Triple, cos: Tensor, sin: Tensor, head_dim: int) -> Triple:
    """q, k and v from their stacked latents; q and k with rotary positions.

    h (B, T, r_q + r_k + r_v), factors B of q (H·D, r_q), k (H_kv·D, r_k), v (H_kv·D, r_v), cos and
    sin (T, D/2) as from reference.rotary_table for the T positions -> q (B, T, H, D), k and v
    (B, T, H_kv, D). ValueError where shapes, dtypes or devices do not fit.
    """
    check_three("factors", factors)
    h, b_q, b_k, b_v = to_autocast(h, *factors)
    check_same_kind(h, h=h, b_q=b_q, b_k=b_k, b_v=b_v)
    latents = b_q.size(1) + b_k.size(1) + b_v.size(1)
    if h.dim() != 3 or h.size(2) != latents:
        raise ValueError(f"h: shape {tuple(h.shape)}; allowed is (B, T, {latents}), the ranks' sum")
    check_head_dim(head_dim, b_q=b_q, b_k=b_k, b_v=b_v)
    check_table(cos, sin, h, head_dim)
    rows = h.reshape(h.size(0) * h.size(1), latents)
    q, k, v = _up_rotary(rows, b_q, b_k, b_v, cos, sin, head_dim)
    return _heads(q, h, head_dim), _heads(k, h, head_dim), _heads(v, h, head_dim)


def _heads(rows: Tensor, x: Tensor, head_dim: int) -> Tensor:
    """Rows (B·T, H·D) of x (B, T, ...) as (B, T, H, D)."""
    return rows.view(x.size(0), x.size(1), rows.size(1) // head_dim, head_dim)


# --- norm_qkv: the vanilla layer, fused alike ---------------------------------------------------


@custom_op("lpa::norm_qkv", mutates_args=())
def _norm_qkv(
    x: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    folded = reference.fold(norm_weight, (w_q, w_k, w_v))
    f_q, f_k, f_v = folded.split([w_q.size(0), w_k.size(0), w_v.size(0)])
    q = dispatch.project(x, f_q, rstd, cos, sin, head_dim)
    k = dispatch.project(x, f_k, rstd, cos, sin, head_dim)
    return q, k, dispatch.project(x, f_v, rstd)


@_norm_qkv.register_fake
def _(
    x: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.new_empty(x.size(0), w.size(0)) for w in (w_q, w_k, w_v))
    return q, k, v


@custom_op("lpa::norm_qkv_backward", mutates_args=())
def _norm_qkv_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    widths = [w_q.size(0), w_k.size(0), w_v.size(0)]
    dys = x.new_empty(x.size(0), sum(widths))  # rstd · dy, stacked for one product each way
    dq_part, dk_part, dv_part = dys.split(widths, dim=1)
    dispatch.unrotate(dq, cos, sin, head_dim, rstd, out=dq_part)
    dispatch.unrotate(dk, cos, sin, head_dim, rstd, out=dk_part)
    dv_part.copy_(rstd[:, None] * dv)
    g = dys @ reference.fold(norm_weight, (w_q, w_k, w_v))
    # Not in the epilogue of that product, as norm_down's: Σ_j dh_j h_j over r columns costs
    # little, but here it would be over 3 d of them, more than the row-wise pass over g.
    dx = dispatch.norm_backward(g, x, rstd, d_residual)
    return dx, *_unfolded_grads(dys, x, norm_weight, (w_q, w_k, w_v), weights)


@_norm_qkv_backward.register_fake
def _(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_residual: Tensor | None,
    x: Tensor,
    rstd: Tensor,
    norm_weight: Tensor,
    w_q: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, *_weight_shaped((norm_weight, w_q, w_k, w_v), weights)


class _NormQKV(torch.autograd.Function):
    """norm_qkv and its input again; see _NormDown."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rstd: Tensor,
        norm_weight: Tensor,
        w_q: Tensor,
        w_k: Tensor,
        w_v: Tensor,
        cos: Tensor,
        sin: Tensor,
        head_dim: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v = _norm_qkv(x, rstd, norm_weight, w_q, w_k, w_v, cos, sin, head_dim)
        ctx.save_for_backward(x, rstd, norm_weight, w_q, w_k, w_v, cos, sin)
        ctx.head_dim = head_dim
        ctx.set_materialize_grads(False)
        return q, k, v, x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        x, rstd, norm_weight, w_q, w_k, w_v, cos, sin = ctx.saved_tensors
        *d_qkv, d_residual = grads
        shapes = ((x.size(0), w.size(0)) for w in (w_q, w_k, w_v))
        dq, dk, dv = (
            x.new_zeros(shape) if dy is None else dy
            for dy, shape in zip(d_qkv, shapes, strict=True)
        )
        wanted = any(ctx.needs_input_grad[2:6])
        dx, *d_weights = _norm_qkv_backward(
            dq, dk, dv, d_residual, x, rstd, norm_weight, w_q, w_k, w_v, cos, sin, ctx.head_dim,
            wanted,
        )  # fmt: skip
        return dx, None, *(d_weights if wanted else [None] * 4), None, None, None


def norm_qkv(
    x: Tensor,
    norm_weight: Tensor,
    weights: Triple,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k and v of RMSNorm(x) through dense weights, q and k with rotary positions, and x for a
    residual connection: what norm_down and up_rotary are to LPA.

    x (B, T, d), norm_weight (d,), weights (H·D, d), (H_kv·D, d), (H_kv·D, d), cos and sin
    (T, D/2) -> q (B, T, H, D), k and v (B, T, H_kv, D), x. ValueError where shapes, dtypes or
    devices do not fit.
    """
    whole = x
    x, norm_weight, *weights_list = to_autocast(x, norm_weight, *weights)
    check_factors("weights", weights_list, x)
    check_norm_weight(norm_weight, x)
    if x.dim() != 3:
        raise ValueError(f"x: shape {tuple(x.shape)}; allowed is (B, T, d)")
    w_q, w_k, w_v = weights_list
    check_head_dim(head_dim, w_q=w_q, w_k=w_k, w_v=w_v)
    check_table(cos, sin, x, head_dim)
    rows = x.reshape(x.size(0) * x.size(1), x.size(2))
    q, k, v, residual = _NormQKV.apply(
        rows, row_rstd(rows, eps), norm_weight, w_q, w_k, w_v, cos, sin, head_dim
    )
    q, k, v = _heads(q, x, head_dim), _heads(k, x, head_dim), _heads(v, x, head_dim)
    return q, k, v, _residual(whole, residual)


# --- low_dim_linear -----------------------------------------------------------------------------


@custom_op("lpa::low_dim", mutates_args=())
def _low_dim(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # Both products are plain: cuBLAS computes them, and adds bias or residual in its epilogue.
    h = x @ a.t() if bias_a is None else torch.addmm(bias_a, x, a.t())
    added = bias_b if residual is None else residual
    y = h @ b.t() if added is None else torch.addmm(added, h, b.t())
    if residual is not None and bias_b is not None:
        y += bias_b
    return y, h


@_low_dim.register_fake
def _(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias_a: Tensor | None,
    bias_b: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.size(0), b.size(0)), x.new_empty(x.size(0), a.size(0))


@custom_op("lpa::low_dim_backward", mutates_args=())
def _low_dim_backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    inputs: bool,
    weights: bool,
    biases: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dh = dy @ b
    none = x.new_empty(0)
    dx = dh @ a if inputs else none
    da, db = (dh.t() @ x, dy.t() @ h) if weights else (none, none.clone())
    # torch sums bfloat16 and float16 columns in float32
    d_bias = (dh.sum(0), dy.sum(0)) if biases else (none.clone(), none.clone())
    return (dx if inputs else none.clone()), da, db, *d_bias


@_low_dim_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    inputs: bool,
    weights: bool,
    biases: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if inputs else 0),
        a.new_empty(a.shape if weights else 0),
        b.new_empty(b.shape if weights else 0),
        x.new_empty(a.size(0) if biases else 0),
        x.new_empty(b.size(0) if biases else 0),
    )


def _save_low_dim(ctx: Any, inputs: Any, output: Any) -> None:
    x, a, b, *_ = inputs
    ctx.save_for_backward(x, output[1], a, b)


def _low_dim_grads(ctx: Any, dy: Tensor, _: Tensor) -> Any:
    x, h, a, b = ctx.saved_tensors
    needed = ctx.needs_input_grad
    d_residual = dy if needed[5] else None
    if not any(needed[:5]):
        return None, None, None, None, None, d_residual
    inputs, weights, biases = needed[0], any(needed[1:3]), any(needed[3:5])
    grads = _low_dim_backward(dy.contiguous(), x, h, a, b, inputs, weights, biases)
    return *(g if wanted else None for g, wanted in zip(grads, needed, strict=False)), d_residual


_low_dim.register_autograd(_low_dim_grads, setup_context=_save_low_dim)


def low_dim_linear(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    bias_a: Tensor | None = None,
    bias_b: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """y = B (A x + bias_a) + bias_b (+ residual): reference.low_dim_linear.

    x (..., d_in), a (r, d_in), b (d_out, r), bias_a (r,), bias_b (d_out,), residual (..., d_out)
    -> (..., d_out). ValueError where shapes, dtypes or devices do not fit.
    """
    given = {"a": a, "b": b, "bias_a": bias_a, "bias_b": bias_b}
    named = {name: t for name, t in given.items() if t is not None}
    autocast = torch.is_autocast_enabled(x.device.type)
    x, *cast = to_autocast(x, *named.values())
    named = dict(zip(named, cast, strict=True))
    if x.dim() < 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; allowed is (..., rows, d_in)")
    check_same_kind(x, x=x, **named)
    a, b = named["a"], named["b"]
    if a.dim() != 2 or a.size(1) != x.size(-1):
        raise ValueError(f"a: shape {tuple(a.shape)}; allowed is (r, {x.size(-1)})")
    if b.dim() != 2 or b.size(1) != a.size(0):
        raise ValueError(f"b: shape {tuple(b.shape)}; allowed is (d_out, {a.size(0)})")
    shape = (*x.shape[:-1], b.size(0))
    if residual is not None:
        named["residual"] = residual
    allowed = {"bias_a": (a.size(0),), "bias_b": (b.size(0),), "residual": shape}
    for name, expected in allowed.items():
        if name in named and tuple(named[name].shape) != expected:
            raise ValueError(f"{name}: shape {tuple(named[name].shape)}; allowed is {expected}")
    rows, added = x.flatten(0, -2), None
    if residual is not None and residual.device != x.device:
        raise ValueError(f"residual: on {residual.device}; allowed is {x.device}, as the input")
    if residual is not None and (residual.dtype == x.dtype or not autocast):
        check_same_kind(x, residual=residual)
        added = residual.flatten(0, -2)
    y, _ = _low_dim(rows, a, b, named.get("bias_a"), named.get("bias_b"), added)
    y = y.view(shape)
    # Under autocast the residual stream keeps its own, wider dtype.
    return y if residual is None or added is not None else residual + y
