"""A check of the fused operators on the device at hand, before anything relies on them.

Compilers have produced wrong code for single configurations on single chips, silently. One layer's
worth of random rows is cheap beside a month of training on wrong gradients.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import dispatch, ops, reference

ROWS = 333  # no multiple of a tile, more than two of them
EPS = 1e-6
SLACK = 2.0  # an error may be this many times that of torch in the same dtype
CEILING = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def verify(
    d: int,
    widths: Sequence[int],
    ranks: Sequence[int | None],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
) -> str:
    """Compares outputs and gradients of the fused q, k and v with float64; "" where they agree,
    else what does not, in one line.

    widths and ranks of q, k and v; ranks None: dense. Agreement: a relative error (Frobenius norm)
    of at most twice that of plain torch in the same dtype, and under a ceiling. Always true
    where no Triton kernel is involved.
    """
    if dispatch.architecture(device) is None:
        return ""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator) * scale
        return values.to(device=device, dtype=dtype)

    inputs = [draw(1, ROWS, d), 1 + draw(d, scale=0.2)]
    for width, rank in zip(widths, ranks, strict=True):
        if rank is None:
            inputs.append(draw(width, d, scale=d**-0.5))
    low_dim = all(rank is not None for rank in ranks)
    if low_dim:
        inputs += [draw(rank, d, scale=d**-0.5) for rank in ranks if rank is not None]
        pairs = zip(widths, ranks, strict=True)
        inputs += [draw(w, rank, scale=rank**-0.5) for w, rank in pairs if rank is not None]
    table = reference.rotary_table(torch.arange(ROWS, device=device), head_dim, 10000.0)
    d_outputs = [draw(1, ROWS, width // head_dim, head_dim) for width in widths]
    d_outputs.append(draw(1, ROWS, d))
    names = ["q", "k", "v", "residual"] + [
        f"gradient of {name}"
        for name in ["x", "norm weight"]
        + [f"{f}_{p}" for f in ("AB" if low_dim else "W") for p in "qkv"]
    ]

    def run(layer: Any, kind: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(kind).requires_grad_() for t in inputs]
        outputs = layer(*leaves, table=table, head_dim=head_dim)
        grads = torch.autograd.grad(outputs, leaves, [g.to(kind) for g in d_outputs])
        return [t.detach() for t in (*outputs, *grads)]

    exact = run(_plain, torch.float64)
    theirs = run(_plain, dtype)
    try:
        ours = run(_fused, dtype)
    except (
        Exception
    ) as raised:  # a kernel that does not compile or launch here is not usable either
        return f"they raise {type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
    for name, want, torchs, got in zip(names, exact, theirs, ours, strict=True):
        error, allowed = _error(got, want), SLACK * _error(torchs, want) + 1e-7
        if not error <= min(allowed, CEILING.get(dtype, 1e-2)):  # a NaN fails too
            return f"{name} is off by {error:.1e}, plain torch by {_error(torchs, want):.1e}"
    return ""


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def _fused(x: Tensor, norm: Tensor, *weights: Tensor, table: Any, head_dim: int) -> Any:
    cos, sin = table
    w_q, w_k, w_v, *ups = weights
    if not ups:
        return ops.norm_qkv(x, norm, (w_q, w_k, w_v), EPS, cos, sin, head_dim)
    b_q, b_k, b_v = ups
    h, residual = ops.norm_down(x, norm, (w_q, w_k, w_v), EPS)
    return *ops.up_rotary(h, (b_q, b_k, b_v), cos, sin, head_dim), residual


def _plain(x: Tensor, norm: Tensor, *weights: Tensor, table: Any, head_dim: int) -> Any:
    normed = reference.rms_norm(x, norm, EPS)
    if len(weights) == 3:
        rows = [normed @ w.t() for w in weights]
    else:
        pairs = zip(weights[:3], weights[3:], strict=True)
        rows = [reference.low_dim_linear(normed, a, b) for a, b in pairs]
    q, k, v = (t.unflatten(-1, (-1, head_dim)) for t in rows)
    return reference.apply_rotary(q, *table), reference.apply_rotary(k, *table), v, x
