"""Checks of the operators' arguments: a ValueError names the argument, what came and what is
allowed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_autocast(*tensors: Tensor) -> list[Tensor]:
    """Floating tensors in the dtype of autocast where it is on: custom operators are not on its
    list. Differentiable.
    """
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [t if t.dtype == torch.float64 else t.to(dtype) for t in tensors]  # as autocast does


def check_same_kind(x: Tensor, /, **tensors: Tensor) -> None:
    """All floating point, of one dtype and on one device."""
    if not x.is_floating_point():
        raise ValueError(f"{next(iter(tensors))}: {x.dtype}; allowed are floating dtypes")
    for name, tensor in tensors.items():
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name}: {tensor.dtype}; allowed is {x.dtype}, as the input")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}; allowed is {x.device}, as the input")


def check_factors(name: str, matrices: Sequence[Tensor], x: Tensor) -> None:
    """Three matrices (n, d) for x (..., d)."""
    if x.dim() < 2:
        raise ValueError(f"x: shape {tuple(x.shape)}; allowed is (..., rows, d)")
    check_count(name, matrices)
    for letter, matrix in zip("qkv", matrices, strict=True):
        label = f"{name}[{letter}]"
        check_same_kind(x, **{"x": x, label: matrix})
        if matrix.dim() != 2 or matrix.size(1) != x.size(-1):
            raise ValueError(
                f"{label}: shape {tuple(matrix.shape)}; allowed is (rows, {x.size(-1)})"
            )


def check_count(name: str, matrices: Sequence[Tensor]) -> None:
    """One each for q, k and v."""
    if len(matrices) != 3:
        raise ValueError(f"{name}: {len(matrices)} matrices; allowed are 3, for q, k and v")


def check_three(name: str, matrices: Sequence[Tensor]) -> None:
    """One matrix each for q, k and v."""
    check_count(name, matrices)
    for letter, matrix in zip("qkv", matrices, strict=True):
        if matrix.dim() != 2:
            raise ValueError(f"{name}[{letter}]: shape {tuple(matrix.shape)}; allowed is (rows, r)")


def check_norm_weight(norm_weight: Tensor, x: Tensor) -> None:
    """A vector (d,) for x (..., d)."""
    check_same_kind(x, norm_weight=norm_weight)
    if norm_weight.shape != x.shape[-1:]:
        raise ValueError(
            f"norm_weight: shape {tuple(norm_weight.shape)}; allowed is ({x.size(-1)},)"
        )


def check_head_dim(head_dim: int, **matrices: Tensor) -> None:
    """An even width that divides the rows of every matrix; k and v have as many rows."""
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: {head_dim}; allowed are even numbers from 2")
    for name, matrix in matrices.items():
        if matrix.size(0) % head_dim:
            raise ValueError(
                f"{name}: {matrix.size(0)} rows; allowed are multiples of head_dim {head_dim}"
            )
    _, k, v = matrices.items()
    if k[1].size(0) != v[1].size(0):
        raise ValueError(f"{v[0]}: {v[1].size(0)} rows; allowed are {k[1].size(0)}, as {k[0]} has")


def check_table(cos: Tensor, sin: Tensor, x: Tensor, head_dim: int) -> None:
    """A rotary table in floating point, beside x (B, T, ...), with a row for each position."""
    length = x.size(1)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.device != x.device:
            raise ValueError(f"{name}: on {table.device}; allowed is {x.device}, as the input")
        if table.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: {table.dtype}; allowed are torch.float32 and torch.float64")
        if table.shape != (length, head_dim // 2):
            raise ValueError(
                f"{name}: shape {tuple(table.shape)}; allowed is {(length, head_dim // 2)}, "
                "a row for each position and a column for each pair of a head"
            )
