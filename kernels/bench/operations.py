"""What the benchmark measures: each operation in three forms, its FLOPs and its minimal bytes.

  eager    plain torch as a reader would write it: reference.rms_norm, low_dim_linear for each of q,
           k and v, apply_rotary
  stacked  plain torch for cuBLAS: factors of q, k and v in one product, the norm folded into it,
           the residual added by the output's product
  fused    the operators of kernels/ops.py

Shapes: B batch, T time, M = B · T rows, d hidden size, r rank, H heads of D columns, H · D = d.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops, reference
from kernels.triton.configs import SIZES, Size

EPS = 1e-6
MODES = ("forward", "backward", "forward_backward")
BENCH_SIZES = {**SIZES, "tiny": Size(256, 64, 64)}  # tiny is for a CPU
NO_GRADIENT = ("cos", "sin")

Tensors = tuple[Tensor, ...]
Form = Callable[..., Tensors]


@dataclass(frozen=True)
class Problem:
    """The sizes of one case."""

    size: str
    d: int
    r: int
    head_dim: int
    batch: int
    seq_len: int

    @property
    def rows(self) -> int:
        return self.batch * self.seq_len

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an input or output, by its name."""
        kind, _, _ = name.partition("_")
        return {
            "x": (self.batch, self.seq_len, self.d),
            "y": (self.batch, self.seq_len, self.d),
            "residual": (self.batch, self.seq_len, self.d),
            "h": (self.batch, self.seq_len, self.r),  # h_q, h_k, h_v
            "norm": (self.d,),
            "a": (self.r, self.d),  # a_q, a_k, a_v, a_o
            "b": (self.d, self.r),
            "w": (self.d, self.d),
            "q": (self.batch, self.seq_len, self.d // self.head_dim, self.head_dim),
            "k": (self.batch, self.seq_len, self.d // self.head_dim, self.head_dim),
            "v": (self.batch, self.seq_len, self.d // self.head_dim, self.head_dim),
            "cos": (self.seq_len, self.head_dim // 2),
            "sin": (self.seq_len, self.head_dim // 2),
        }[kind]

    def numel(self, name: str) -> int:
        return torch.Size(self.shape(name)).numel()


@dataclass(frozen=True)
class Operation:
    """An operation in its three forms.

    Attributes:
        inputs: Names of the arguments, in order; Problem.shape knows their shapes.
        outputs: Names of the results.
        joined: Tensors that stacked and fused have in place of several, which are its columns.
        attention: Whether causal attention is part of it.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    eager: Form
    stacked: Form
    fused: Form
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attention: bool = False

    def join(self, tensors: Mapping[str, Tensor], form: str) -> dict[str, Tensor]:
        """The tensors as a form has them."""
        result = dict(tensors)
        for whole, parts in self.joined.items():
            if form == "eager" or parts[0] not in result:
                continue
            stacked = torch.cat([result.pop(part) for part in parts], dim=-1)
            result = {whole: stacked, **result}  # every joined tensor is a first one
        return result

    def split(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of any form, under the names that eager has."""
        result: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            parts = self.joined.get(name, (name,))
            result.update(zip(parts, tensor.chunk(len(parts), dim=-1), strict=True))
        return result


# --- forms --------------------------------------------------------------------------------------


def _heads(x: Tensor, cos: Tensor) -> Tensor:
    """(B, T, H·D) -> (B, T, H, D)."""
    return x.unflatten(-1, (-1, 2 * cos.size(1)))


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q, k, v (B, T, H, D) -> (B, T, H·D), causal; the backend is torch's choice."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def _norm_down_eager(x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor) -> Tensors:
    normed = reference.rms_norm(x, norm, EPS)
    return F.linear(normed, a_q), F.linear(normed, a_k), F.linear(normed, a_v)


def _norm_project(x: Tensor, norm: Tensor, weights: Tensors) -> Tensor:
    rows = x.flatten(0, 1)  # (M, d)
    y = reference.project(rows, reference.fold(norm, weights), reference.row_rstd(rows, EPS))
    return y.unflatten(0, x.shape[:2])


def _norm_down_stacked(x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor) -> Tensors:
    return (_norm_project(x, norm, (a_q, a_k, a_v)),)


def _norm_down_fused(x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor) -> Tensors:
    return (ops.norm_down(x, norm, (a_q, a_k, a_v), EPS)[0],)


def _up_rotary_eager(
    h_q: Tensor, h_k: Tensor, h_v: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    q, k, v = (
        _heads(F.linear(h, b), cos) for h, b in ((h_q, b_q), (h_k, b_k), (h_v, b_v))
    )  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def _up_rotary_stacked(
    h: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    latents = h.flatten(0, 1).unflatten(1, (3, -1)).transpose(0, 1)  # (3, M, r), not copied
    y = torch.bmm(latents, torch.stack((b_q, b_k, b_v)).transpose(1, 2))  # (3, M, d)
    q, k, v = _heads(y.unflatten(1, h.shape[:2]), cos).unbind()  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def _up_rotary_fused(
    h: Tensor, b_q: Tensor, b_k: Tensor, b_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    return ops.up_rotary(h, (b_q, b_k, b_v), cos, sin, 2 * cos.size(1))


def _norm_qkv_eager(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    normed = reference.rms_norm(x, norm, EPS)
    q, k, v = (_heads(F.linear(normed, w), cos) for w in (w_q, w_k, w_v))  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def _norm_qkv_stacked(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    y = _norm_project(x, norm, (w_q, w_k, w_v))  # (B, T, 3 d)
    q, k, v = (_heads(part, cos) for part in y.chunk(3, dim=-1))  # (B, T, H, D)
    return reference.apply_rotary(q, cos, sin), reference.apply_rotary(k, cos, sin), v


def _norm_qkv_fused(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, cos: Tensor, sin: Tensor
) -> Tensors:
    return ops.norm_qkv(x, norm, (w_q, w_k, w_v), EPS, cos, sin, 2 * cos.size(1))[:3]


def _low_dim_eager(x: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensors:
    return (reference.low_dim_linear(x, a, b) + residual,)


def _add_product(residual: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """residual + x weightᵀ, one product with the residual as its accumulator."""
    return torch.addmm(residual.flatten(0, 1), x.flatten(0, 1), weight.t()).view_as(residual)


def _low_dim_stacked(x: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensors:
    return (_add_product(residual, F.linear(x, a), b),)


def _low_dim_fused(x: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensors:
    return (ops.low_dim_linear(x, a, b, residual=residual),)


def _lpa_layer_eager(
    x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor, b_q: Tensor, b_k: Tensor,
    b_v: Tensor, a_o: Tensor, b_o: Tensor, cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    latents = _norm_down_eager(x, norm, a_q, a_k, a_v)
    y = _attend(*_up_rotary_eager(*latents, b_q, b_k, b_v, cos, sin))
    return (reference.low_dim_linear(y, a_o, b_o) + x,)


def _lpa_layer_stacked(
    x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor, b_q: Tensor, b_k: Tensor,
    b_v: Tensor, a_o: Tensor, b_o: Tensor, cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    (h,) = _norm_down_stacked(x, norm, a_q, a_k, a_v)
    y = _attend(*_up_rotary_stacked(h, b_q, b_k, b_v, cos, sin))
    return _low_dim_stacked(y, a_o, b_o, x)


def _lpa_layer_fused(
    x: Tensor, norm: Tensor, a_q: Tensor, a_k: Tensor, a_v: Tensor, b_q: Tensor, b_k: Tensor,
    b_v: Tensor, a_o: Tensor, b_o: Tensor, cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    h, residual = ops.norm_down(x, norm, (a_q, a_k, a_v), EPS)
    y = _attend(*_up_rotary_fused(h, b_q, b_k, b_v, cos, sin))
    return _low_dim_fused(y, a_o, b_o, residual)


def _vanilla_layer_eager(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    y = _attend(*_norm_qkv_eager(x, norm, w_q, w_k, w_v, cos, sin))
    return (F.linear(y, w_o) + x,)


def _vanilla_layer_stacked(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    y = _attend(*_norm_qkv_stacked(x, norm, w_q, w_k, w_v, cos, sin))
    return (_add_product(x, y, w_o),)


def _vanilla_layer_fused(
    x: Tensor, norm: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, w_o: Tensor,
    cos: Tensor, sin: Tensor,
) -> Tensors:  # fmt: skip
    weights = (w_q, w_k, w_v)
    q, k, v, residual = ops.norm_qkv(x, norm, weights, EPS, cos, sin, 2 * cos.size(1))
    return (_add_product(residual, _attend(q, k, v), w_o),)


# norm_down and norm_qkv also return x for a residual connection: it is part of the layers alone.
_LATENTS = {"h": ("h_q", "h_k", "h_v")}
_FACTORS = ("a_q", "a_k", "a_v", "b_q", "b_k", "b_v", "a_o", "b_o")
OPERATIONS = {
    "norm_down": Operation(
        inputs=("x", "norm", "a_q", "a_k", "a_v"),
        outputs=("h_q", "h_k", "h_v"),
        eager=_norm_down_eager,
        stacked=_norm_down_stacked,
        fused=_norm_down_fused,
        joined=_LATENTS,
    ),
    "up_rotary": Operation(
        inputs=("h_q", "h_k", "h_v", "b_q", "b_k", "b_v", "cos", "sin"),
        outputs=("q", "k", "v"),
        eager=_up_rotary_eager,
        stacked=_up_rotary_stacked,
        fused=_up_rotary_fused,
        joined=_LATENTS,
    ),
    "norm_qkv": Operation(
        inputs=("x", "norm", "w_q", "w_k", "w_v", "cos", "sin"),
        outputs=("q", "k", "v"),
        eager=_norm_qkv_eager,
        stacked=_norm_qkv_stacked,
        fused=_norm_qkv_fused,
    ),
    "low_dim_linear": Operation(
        inputs=("x", "a", "b", "residual"),
        outputs=("y",),
        eager=_low_dim_eager,
        stacked=_low_dim_stacked,
        fused=_low_dim_fused,
    ),
    "lpa_layer": Operation(
        inputs=("x", "norm", *_FACTORS, "cos", "sin"),
        outputs=("y",),
        eager=_lpa_layer_eager,
        stacked=_lpa_layer_stacked,
        fused=_lpa_layer_fused,
        attention=True,
    ),
    "vanilla_layer": Operation(
        inputs=("x", "norm", "w_q", "w_k", "w_v", "w_o", "cos", "sin"),
        outputs=("y",),
        eager=_vanilla_layer_eager,
        stacked=_vanilla_layer_stacked,
        fused=_vanilla_layer_fused,
        attention=True,
    ),
}


# --- providers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provider:
    """A form, and whether torch.compile(fullgraph=True, dynamic=False) runs it."""

    form: str
    compiled: bool

    def function(self, operation: Operation) -> Form:
        function: Form = getattr(operation, self.form)
        return torch.compile(function, fullgraph=True, dynamic=False) if self.compiled else function


PROVIDERS = {
    "eager": Provider("eager", compiled=False),
    "compile": Provider("eager", compiled=True),
    "stacked": Provider("stacked", compiled=True),
    "fused": Provider("fused", compiled=False),
    "fused_compile": Provider("fused", compiled=True),
    "eager_again": Provider("eager", compiled=False),  # against eager: the noise floor
}


# --- FLOPs and bytes ----------------------------------------------------------------------------


def flops(operation: Operation, problem: Problem, mode: str) -> int:
    """FLOPs of the matrix products, of the factors where there are factors; no recomputation.

    Forward 2 M Σ n k over the matrices (n, k) of the operation, and for causal attention
    4 D for each of the B H T (T + 1) / 2 pairs of a query and a key that it sees (q kᵀ and P v).
    Backward twice that: a gradient of each of the two operands of every product. Norm, rotation
    and softmax are not counted.
    """
    matrices = [name for name in operation.inputs if name[0] in "abw"]
    forward = sum(2 * problem.rows * problem.numel(name) for name in matrices)
    if operation.attention:
        pairs = problem.rows * (problem.d // problem.head_dim) * (problem.seq_len + 1) // 2
        forward += 4 * problem.head_dim * pairs
    return forward * {"forward": 1, "backward": 2, "forward_backward": 3}[mode]


def minimal_bytes(operation: Operation, problem: Problem, itemsize: int, mode: str) -> int:
    """Bytes that memory must move at least: every operand and every result once, as if all that
    lies between them stayed on the chip.

    Forward: inputs + outputs. Backward: gradients of the outputs + inputs + gradients of the
    inputs; a residual that is an input of its own (low_dim_linear) is not among these, since its
    gradient is that of the output itself. Forward and backward: the sum. itemsize bytes an entry,
    4 for the rotary tables, which have no gradient.
    """

    def total(names: tuple[str, ...]) -> int:
        return sum(problem.numel(n) * (4 if n in NO_GRADIENT else itemsize) for n in names)

    forward = total(operation.inputs) + total(operation.outputs)
    read = tuple(name for name in operation.inputs if name != "residual")
    written = tuple(name for name in read if name not in NO_GRADIENT)
    backward = total(operation.outputs) + total(read) + total(written)
    return {"forward": forward, "backward": backward, "forward_backward": forward + backward}[mode]
