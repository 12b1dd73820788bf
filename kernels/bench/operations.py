"""What the benchmark measures: operations, providers, FLOPs and minimal bytes.

Shapes and the three forms of an operation: forms.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.bench import forms
from kernels.bench.forms import Tensors
from kernels.triton.configs import SIZES, Size

MODES = ("forward", "backward", "forward_backward")
BENCH_SIZES = {**SIZES, "tiny": Size(256, 64, 64)}  # tiny is for a CPU
NO_GRADIENT = ("cos", "sin")

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
        rows = (self.batch, self.seq_len)
        heads = (*rows, self.d // self.head_dim, self.head_dim)
        table = (self.seq_len, self.head_dim // 2)
        shapes: dict[str, tuple[int, ...]] = {
            "norm": (self.d,), "a": (self.r, self.d), "b": (self.d, self.r), "w": (self.d, self.d),
            "x": (*rows, self.d), "y": (*rows, self.d), "residual": (*rows, self.d),
            "h": (*rows, self.r), "q": heads, "k": heads, "v": heads, "cos": table, "sin": table,
        }  # fmt: skip
        return shapes[name.partition("_")[0]]  # a_q as a

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


_LATENTS = {"h": ("h_q", "h_k", "h_v")}
_FACTORS = ("a_q", "a_k", "a_v", "b_q", "b_k", "b_v", "a_o", "b_o")
OPERATIONS = {
    "norm_down": Operation(
        inputs=("x", "norm", "a_q", "a_k", "a_v"),
        outputs=("h_q", "h_k", "h_v"),
        eager=forms.norm_down_eager,
        stacked=forms.norm_down_stacked,
        fused=forms.norm_down_fused,
        joined=_LATENTS,
    ),
    "up_rotary": Operation(
        inputs=("h_q", "h_k", "h_v", "b_q", "b_k", "b_v", "cos", "sin"),
        outputs=("q", "k", "v"),
        eager=forms.up_rotary_eager,
        stacked=forms.up_rotary_stacked,
        fused=forms.up_rotary_fused,
        joined=_LATENTS,
    ),
    "norm_qkv": Operation(
        inputs=("x", "norm", "w_q", "w_k", "w_v", "cos", "sin"),
        outputs=("q", "k", "v"),
        eager=forms.norm_qkv_eager,
        stacked=forms.norm_qkv_stacked,
        fused=forms.norm_qkv_fused,
    ),
    "low_dim_linear": Operation(
        inputs=("x", "a", "b", "residual"),
        outputs=("y",),
        eager=forms.low_dim_eager,
        stacked=forms.low_dim_stacked,
        fused=forms.low_dim_fused,
    ),
    "lpa_layer": Operation(
        inputs=("x", "norm", *_FACTORS, "cos", "sin"),
        outputs=("y",),
        eager=forms.lpa_layer_eager,
        stacked=forms.lpa_layer_stacked,
        fused=forms.lpa_layer_fused,
        attention=True,
    ),
    "vanilla_layer": Operation(
        inputs=("x", "norm", "w_q", "w_k", "w_v", "w_o", "cos", "sin"),
        outputs=("y",),
        eager=forms.vanilla_layer_eager,
        stacked=forms.vanilla_layer_stacked,
        fused=forms.vanilla_layer_fused,
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
