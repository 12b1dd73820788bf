"""What the tests of the kernels share: the layers written out from their formulas, inputs for the
operators and for the single kernels, the rule by which a result is accepted, guarded buffers.

The formulas are not those of kernels/reference.py: einsum, F.rms_norm and complex numbers. In
float64 they are the oracle, in the dtype of a test what plain torch would have computed.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import ops, reference

F64 = torch.float64
EPS = 1e-6

# A relative error (Frobenius norm) over these is wrong whatever plain torch does: some 10 roundings
# of the dtype, and for float32, whose sums are rounded too, 100.
CEILINGS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}


def randn(*shape: int, seed: int, device: str = "cpu", dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)


# --- the layers ---------------------------------------------------------------------------------


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x_i + j x_{i+D/2}) · exp(j · angle), in float32 at least: x (B, T, H, D)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    angle = torch.complex(cos.to(wide.dtype), sin.to(wide.dtype))[:, None]  # (T, 1, D/2)
    turned = torch.complex(*wide.chunk(2, dim=-1)) * angle
    return torch.cat((turned.real, turned.imag), dim=-1).to(x.dtype)


def normed(x: Tensor, norm_weight: Tensor) -> Tensor:
    return F.rms_norm(x, norm_weight.shape, norm_weight, EPS)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("...i,oi->...o", x, weight)


def norm_down(x: Tensor, norm_weight: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
    x_hat = normed(x, norm_weight)
    return torch.cat([linear(x_hat, a) for a in factors], dim=-1), x.view_as(x)


def rotary_qkv(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    q, k, v = (
        linear(x, weight).unflatten(-1, (-1, 2 * cos.size(1)))  # (B, T, H, D)
        for x, weight in zip(inputs, weights, strict=True)
    )
    return turn(q, cos, sin), turn(k, cos, sin), v


def up_rotary(h: Tensor, *factors: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    return rotary_qkv(h.split([b.size(1) for b in factors], dim=-1), factors, cos, sin)


def norm_qkv(
    x: Tensor, norm_weight: Tensor, *weights: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    return *rotary_qkv([normed(x, norm_weight)] * 3, weights, cos, sin), x.view_as(x)


def low_dim_linear(
    x: Tensor, a: Tensor, b: Tensor, bias_a: Tensor, bias_b: Tensor, residual: Tensor
) -> tuple[Tensor, ...]:
    return (linear(linear(x, a) + bias_a, b) + bias_b + residual,)


def attention(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> Tensor:
    """Causal attention of q (B, T, H, D), k and v (B, T, H_kv, D) -> (B, T, H·D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2)


# --- the operators and inputs for them ----------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """Of a layer: B, T, d, the ranks of q, k and v, H, H_kv, D, and the first position."""

    batch: int = 2
    length: int = 5
    d: int = 12
    ranks: tuple[int, int, int] = (4, 4, 4)
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 4
    start: int = 0

    @property
    def widths(self) -> tuple[int, int, int]:
        return tuple(n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads))

    def table(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """cos and sin (T, D/2) in float32."""
        positions = torch.arange(self.start, self.start + self.length, dtype=F64, device=device)
        i = torch.arange(self.head_dim // 2, dtype=F64, device=device)
        angles = torch.outer(positions, 10000.0 ** (-2 * i / self.head_dim))
        return angles.cos().float(), angles.sin().float()


@dataclass(frozen=True)
class Case:
    """An operator with inputs. `ours` and `plain` take them in this order; outputs are tuples."""

    ours: Callable[..., Sequence[Tensor]]
    plain: Callable[..., Sequence[Tensor]]
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    device: str = "cpu"
    chained: int = 1  # operators of which one takes the result of the other

    @property
    def batched(self) -> list[bool]:
        """Which inputs have a row for each token; the others are parameters."""
        return [name in ("x", "h", "residual") for name in self.inputs]

    def incoming(self) -> list[Tensor]:
        """Gradients of the outputs, in the dtype of the inputs."""
        values = list(self.inputs.values())
        with torch.no_grad():
            outputs = self.plain(*values)
        return [
            randn(*y.shape, seed=100 + i, device=self.device, dtype=torch.float32).to(y.dtype)
            for i, y in enumerate(outputs)
        ]


OPERATORS = ("norm_down", "up_rotary", "norm_qkv", "low_dim_linear", "layer", "dense_layer")


def case(name: str, shape: Shape, dtype: torch.dtype = F64, device: str = "cpu") -> Case:
    """An operator, or a layer of them ("layer": x -> q, k, v -> attention -> output projection and
    residual), with inputs of about the variance that they have in a model.
    """
    cos, sin = shape.table(device)
    table = {"cos": cos, "sin": sin}
    d, ranks, widths, head_dim = shape.d, shape.ranks, shape.widths, shape.head_dim
    grouped = shape.heads != shape.kv_heads
    sizes: dict[str, tuple[int, ...]] = {
        "x": (shape.batch, shape.length, d),
        "h": (shape.batch, shape.length, sum(ranks)),
        "norm_weight": (d,),
        **{f"a_{c}": (r, d) for c, r in zip("qkv", ranks, strict=True)},
        **{f"b_{c}": (n, r) for c, n, r in zip("qkv", widths, ranks, strict=True)},
        **{f"w_{c}": (n, d) for c, n in zip("qkv", widths, strict=True)},
        "a_o": (ranks[0], widths[0]),
        "b_o": (d, ranks[0]),
        "w_o": (d, widths[0]),
        # low_dim_linear, from d to the width of q
        "a": (ranks[0], d),
        "b": (widths[0], ranks[0]),
        "bias_a": (ranks[0],),
        "bias_b": (widths[0],),
        "residual": (shape.batch, shape.length, widths[0]),
    }

    def ours_layer(x: Tensor, norm_weight: Tensor, *f: Tensor) -> Sequence[Tensor]:
        h, residual = ops.norm_down(x, norm_weight, f[:3], EPS)
        y = attention(*ops.up_rotary(h, f[3:6], cos, sin, head_dim), grouped)
        return (ops.low_dim_linear(y, f[6], f[7], residual=residual),)

    def plain_layer(x: Tensor, norm_weight: Tensor, *f: Tensor) -> Sequence[Tensor]:
        h, residual = norm_down(x, norm_weight, *f[:3])
        y = attention(*up_rotary(h, *f[3:6], **table), grouped)
        return (linear(linear(y, f[6]), f[7]) + residual,)

    def ours_dense(x: Tensor, norm_weight: Tensor, *w: Tensor) -> Sequence[Tensor]:
        *qkv, residual = ops.norm_qkv(x, norm_weight, w[:3], EPS, cos, sin, head_dim)
        return (linear(attention(*qkv, grouped), w[3]) + residual,)

    def plain_dense(x: Tensor, norm_weight: Tensor, *w: Tensor) -> Sequence[Tensor]:
        *qkv, residual = norm_qkv(x, norm_weight, *w[:3], **table)
        return (linear(attention(*qkv, grouped), w[3]) + residual,)

    ours, plain, inputs, outputs = {
        "norm_down": (
            lambda x, w, *factors: ops.norm_down(x, w, factors, EPS),
            norm_down,
            "x norm_weight a_q a_k a_v",
            "h residual",
        ),
        "up_rotary": (
            lambda h, *factors: ops.up_rotary(h, factors, cos, sin, head_dim),
            lambda h, *factors: up_rotary(h, *factors, **table),
            "h b_q b_k b_v",
            "q k v",
        ),
        "norm_qkv": (
            lambda x, w, *weights: ops.norm_qkv(x, w, weights, EPS, cos, sin, head_dim),
            lambda x, w, *weights: norm_qkv(x, w, *weights, **table),
            "x norm_weight w_q w_k w_v",
            "q k v residual",
        ),
        "low_dim_linear": (
            lambda *inputs: (ops.low_dim_linear(*inputs),),
            low_dim_linear,
            "x a b bias_a bias_b residual",
            "y",
        ),
        "layer": (ours_layer, plain_layer, "x norm_weight a_q a_k a_v b_q b_k b_v a_o b_o", "y"),
        "dense_layer": (ours_dense, plain_dense, "x norm_weight w_q w_k w_v w_o", "y"),
    }[name]
    made = {}
    for i, key in enumerate(inputs.split()):
        size = sizes[key]
        value = randn(*size, seed=i, device=device, dtype=torch.float32)
        if key == "norm_weight":
            value = 1 + 0.3 * value
        elif len(size) == 2:  # a matrix keeps the variance
            value *= size[1] ** -0.5
        made[key] = value.to(dtype)
    chained = {"layer": 4, "dense_layer": 3}.get(name, 1)  # with attention and projection
    return Case(ours, plain, made, tuple(outputs.split()), device, chained)


def run(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], incoming: Sequence[Tensor]
) -> list[Tensor]:
    """Outputs, then the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, incoming)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    return [*(y.detach() for y in outputs), *gradients]


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(F64) for t in tensors]


# --- what is accepted ---------------------------------------------------------------------------


def assert_accurate(
    name: str, result: Tensor, plain: Tensor, exact: Tensor, chained: int = 1, terms: int = 4
) -> None:
    """At most twice the error of plain torch in the same dtype (FlashAttention's rule), and under
    the ceiling of the dtype for each of the operators chained; both in the Frobenius norm. Beside
    the first limit a sum of that many terms in float32, which torch may take in another order, is
    granted the rounding errors of a random walk, sqrt(terms) · 2^-24. NaN is never accepted.
    """
    size = exact.norm().item()
    error = (result.to(F64) - exact).norm().item()
    limit = 2 * (plain.to(F64) - exact).norm().item() + terms**0.5 * 2**-24 * size
    ceiling = chained * CEILINGS[result.dtype] * size
    assert error <= limit, f"{name}: error {error:.2e}, twice that of plain torch is {limit:.2e}"
    assert error <= ceiling, f"{name}: error {error:.2e}, the ceiling is {ceiling:.2e}"


def assert_case(
    one: Case, incoming: Sequence[Tensor], results: Sequence[Tensor], sequences: int | None = None
) -> None:
    """Outputs and gradients of `ours`, by the rule above; float64 of some sequences at a time,
    where that of all of them takes too much memory.
    """
    inputs = list(one.inputs.values())
    plain = run(one.plain, inputs, incoming)
    batch = inputs[0].size(0)
    by_row = [True] * len(one.outputs) + one.batched
    sums: dict[int, Tensor] = {}  # the gradients of parameters
    terms = max(n for t in inputs for n in (*t.shape, t.numel() // t.size(-1)))
    names = [*one.outputs, *(f"gradient of {name}" for name in one.inputs)]
    for start in range(0, batch, sequences or batch):
        at = slice(start, start + (sequences or batch))
        part = [t[at] if rows else t for t, rows in zip(inputs, one.batched, strict=True)]
        exact = run(one.plain, wide(part), wide([g[at] for g in incoming]))
        for i, value in enumerate(exact):
            if by_row[i]:
                assert_accurate(names[i], results[i][at], plain[i][at], value, one.chained, terms)
            else:
                sums[i] = sums[i] + value if i in sums else value
    for i, value in sums.items():
        assert_accurate(names[i], results[i], plain[i], value, one.chained, terms)


# --- calls of the single kernels ----------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A call of one function of kernels/reference.py that has a kernel: M rows, n columns of the
    result, inner dimension k, positions T.
    """

    kernel: str
    m: int
    n: int
    k: int = 0
    head_dim: int = 0
    length: int = 1
    scaled: bool = False
    rotated: bool = False
    residual: bool = False
    extremes: bool = False  # two rows of three are of magnitude 1e3 and all zeros

    def __str__(self) -> str:
        sizes = [f"{c}{v}" for c, v in zip("mnkDT", self.sizes, strict=True) if v]
        flags = [f for f in ("scaled", "rotated", "residual", "extremes") if getattr(self, f)]
        return "-".join((self.kernel, *sizes, *flags))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.m, self.n, self.k, self.head_dim, self.length

    def arguments(self, dtype: torch.dtype, device: str = "cpu") -> list[Any]:
        """Those of reference.py, in its order."""

        def rows(columns: int, seed: int) -> Tensor:
            t = randn(self.m, columns, seed=seed, device=device, dtype=torch.float32)
            if self.extremes:
                t[1::3] *= 1e3
                t[2::3] = 0
            return t.to(dtype)

        def weight(height: int, width: int) -> Tensor:
            t = randn(height, width, seed=9, device=device, dtype=torch.float32)
            return (t * self.k**-0.5).to(dtype)

        def rstd(x: Tensor) -> Tensor:
            return (x.to(F64).square().mean(dim=-1) + EPS).rsqrt().float()

        table = Shape(length=self.length, head_dim=self.head_dim, start=3).table(device)
        if self.kernel == "project":
            x = rows(self.k, 0)
            scale = rstd(x) if self.scaled else None
            turned = (*table, self.head_dim) if self.rotated else (None, None, 0)
            return [x, weight(self.n, self.k), scale, *turned]
        if self.kernel == "row_rstd":
            return [rows(self.n, 0), EPS]
        if self.kernel == "unrotate":
            scale = rstd(randn(self.m, 8, seed=1, device=device))
            return [rows(self.n, 0), *table, self.head_dim, scale if self.scaled else None]
        if self.kernel == "scale_and_dot":
            # As in the backward pass: where a row of x is large, its scale is small.
            return [randn(self.m, self.n, seed=1, device=device).to(dtype), rows(self.n, 2),
                    rstd(rows(self.n, 0))]  # fmt: skip
        x = rows(self.n, 0)
        residual = randn(self.m, self.n, seed=1, device=device).to(dtype) if self.residual else None
        if self.kernel == "norm_backward":
            g = randn(self.m, self.n, seed=2, device=device).float() * rstd(x)[:, None]
            return [g.to(dtype), x, rstd(x), residual]
        assert self.kernel == "norm_backward_matmul"
        dhs = randn(self.m, self.k, seed=2, device=device).float() * rstd(x)[:, None]
        coefficient = rstd(x) * randn(self.m, seed=3, device=device).float()
        return [dhs.to(dtype), weight(self.k, self.n), x, coefficient, residual]

    def assert_accurate(self, arguments: Sequence[Any], result: Tensor | Sequence[Tensor]) -> None:
        """Against the definition in float64 and in the dtype of the arguments, by the rule above,
        the rows of each magnitude by themselves, some sequences at a time.
        """
        definition = getattr(reference, self.kernel)
        results = result if isinstance(result, tuple) else (result,)
        height = max(1, 8192 // self.length) * self.length
        step = 3 if self.extremes else 1
        assert step == 1 or self.m <= height
        for start in range(0, self.m, height):
            at = slice(start, start + height)
            part = [t[at] if isinstance(t, Tensor) and len(t) == self.m else t for t in arguments]
            plain = definition(*part)
            exact = definition(*(t.to(F64) if isinstance(t, Tensor) else t for t in part))
            if isinstance(result, Tensor):
                plain, exact = (plain,), (exact,)
            for values in zip((r[at] for r in results), plain, exact, strict=True):
                for first in range(min(step, self.m)):
                    label = f"{self} rows {start + first}::{step}"
                    kind = (value[first::step] for value in values)
                    assert_accurate(label, *kind, terms=max(self.n, self.k))


# --- what ran -----------------------------------------------------------------------------------

# Launches of a forward and a backward pass. What is missing is left to cuBLAS.
LAUNCHES: dict[str, dict[str, int]] = {
    "norm_down": {"row_rstd": 1, "project": 1, "scale_and_dot": 1, "norm_backward_matmul": 1},
    "up_rotary": {"project": 2, "unrotate": 2},
    "norm_qkv": {"row_rstd": 1, "project": 3, "unrotate": 2, "norm_backward": 1},
    "low_dim_linear": {},
}
LAUNCHES["layer"] = dict(Counter(LAUNCHES["norm_down"]) + Counter(LAUNCHES["up_rotary"]))
LAUNCHES["dense_layer"] = LAUNCHES["norm_qkv"]


class _Counted:
    """A Triton kernel that counts its launches."""

    def __init__(self, kernel: Any, name: str, counts: Counter[str]) -> None:
        self.kernel, self.name, self.counts = kernel, name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            self.counts[self.name] += 1
            return self.kernel[grid](*args, **kwargs)

        return launch


def count_launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Launches of every Triton kernel from now on, by the name without "_kernel"."""
    from kernels.triton import matmul, rows

    counts: Counter[str] = Counter()
    for module in (matmul, rows):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            kernel = getattr(module, name)
            short = name.removesuffix("_kernel")
            monkeypatch.setattr(module, name, _Counted(kernel, short, counts))
    return counts


# --- guarded buffers ----------------------------------------------------------------------------

MARGIN = 128  # rows: no tile is higher, so what a kernel writes past its rows lies within


@dataclass
class Guards:
    """Tensors that are the inner part of wider buffers, to see what a kernel reads and writes
    outside of them. Around an input there is NaN, and the whole buffer must stay as it is. An
    output and what is around it is NaN of another bit pattern, all ones, which no operation on the
    inputs makes: outside of it every bit must stay, inside none may be NaN afterwards.
    """

    inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # buffer, copy
    outputs: list[tuple[Tensor, tuple[slice, ...]]] = field(default_factory=list)  # buffer, inner

    def input(self, t: Tensor, columns: int = 0) -> Tensor:
        """A copy of t (M, ...); with columns, that many on each side are not its own."""
        buffer, inner = _wider(t.shape, columns)
        values = torch.full(buffer, math.nan, dtype=t.dtype, device=t.device)
        values[inner] = t
        self.inputs.append((values, values.clone()))
        return values[inner]

    def output(
        self, *shape: int, dtype: torch.dtype, device: torch.device, columns: int = 0
    ) -> Tensor:
        buffer, inner = _wider(shape, columns)
        values = torch.empty(buffer, dtype=dtype, device=device)
        _bits(values).fill_(-1)
        self.outputs.append((values, inner))
        return values[inner]

    def check(self) -> None:
        for buffer, copy in self.inputs:
            assert _bits(buffer).equal(_bits(copy)), "an input was written"
        for buffer, inner in self.outputs:
            assert not buffer[inner].isnan().any(), "NaN in an output"
            outside = _bits(buffer).clone()
            outside[inner] = -1
            assert outside.eq(-1).all(), "written outside of an output"


def _wider(shape: Sequence[int], columns: int) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """The shape of a buffer, and where in it a tensor of this shape lies."""
    rows = slice(MARGIN, MARGIN + shape[0])
    if not columns:
        return (shape[0] + 2 * MARGIN, *shape[1:]), (rows,)
    inner = slice(columns, columns + shape[1])
    return (shape[0] + 2 * MARGIN, shape[1] + 2 * columns), (rows, inner)


def _bits(t: Tensor) -> Tensor:
    """t as integers: NaN is equal to itself."""
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


class _Allocator:
    """Stands in for the module torch in kernels/triton/launch.py."""

    def __init__(self, guards: Guards) -> None:
        self.guards = guards

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return self.guards.output(*shape, dtype=dtype, device=device)

    def empty_like(self, t: Tensor) -> Tensor:
        return self.guards.output(*t.shape, dtype=t.dtype, device=t.device)


def guard_outputs(monkeypatch: pytest.MonkeyPatch) -> Guards:
    """From now on what the launches allocate lies in guarded buffers."""
    from kernels.triton import launch

    guards = Guards()
    monkeypatch.setattr(launch, "torch", _Allocator(guards))
    return guards
