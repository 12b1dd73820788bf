"""Launches: each function has the name, the arguments and the result of its definition in
kernels/reference.py, and a configuration.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from kernels.triton import matmul, rows
from kernels.triton.configs import Config

F = TypeVar("F", bound=Callable[..., Any])


def _on_its_device(function: F) -> F:
    """Triton launches on the current device, which need not be that of the first argument."""

    @functools.wraps(function)
    def launch(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):
            return function(x, *args, **kwargs)

    return launch  # type: ignore[return-value]


def _precision(x: Tensor) -> str:
    """float32 operands are multiplied in float32, not in TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _row_blocks(columns: int) -> dict[str, int]:
    """Tiles of the row-wise kernels: whole rows, several where they are short. Programs of 4096
    entries in four rows spilled, those in one row do not.
    """
    block_n = triton.next_power_of_2(columns)
    return {"BLOCK_M": max(1, 2048 // block_n), "BLOCK_N": block_n, "num_warps": 8}


@_on_its_device
def project(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    head_dim: int,
    config: Config,
) -> Tensor:
    """reference.project. x may be columns of a wider matrix: (M, k) with a row stride."""
    (m, k), n = x.shape, weight.size(0)
    y = torch.empty(m, n, device=x.device, dtype=x.dtype)
    rotated = cos is not None
    grid = (triton.cdiv(m, config.block_m) * (n // config.block_n),)
    matmul.project_kernel[grid](
        x,
        weight,
        y,
        x if rstd is None else rstd,
        x if cos is None else cos,
        x if sin is None else sin,
        m,
        1 if cos is None else cos.size(0),
        x.stride(0),
        N=n,
        K=k,
        SCALED=rstd is not None,
        HEAD_DIM=head_dim if rotated else 0,
        PRECISION=_precision(x),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return y


@_on_its_device
def norm_backward_matmul(
    dhs: Tensor,
    a: Tensor,
    x: Tensor,
    coefficient: Tensor,
    d_residual: Tensor | None,
    config: Config,
) -> Tensor:
    """reference.norm_backward_matmul."""
    (m, k), n = dhs.shape, a.size(1)
    dx = torch.empty_like(x)
    grid = (triton.cdiv(m, config.block_m) * (n // config.block_n),)
    matmul.norm_backward_matmul_kernel[grid](
        dhs,
        a,
        x,
        coefficient,
        x if d_residual is None else d_residual,
        dx,
        m,
        N=n,
        K=k,
        RESIDUAL=d_residual is not None,
        PRECISION=_precision(x),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dx


@_on_its_device
def row_rstd(x: Tensor, eps: float) -> Tensor:
    """reference.row_rstd."""
    m, n = x.shape
    rstd = torch.empty(m, device=x.device, dtype=torch.float32)
    blocks = _row_blocks(n)
    grid = (triton.cdiv(m, blocks["BLOCK_M"]),)
    rows.row_rstd_kernel[grid](x, rstd, m, eps, N=n, **blocks)
    return rstd


@_on_its_device
def scale_and_dot(dh: Tensor, h: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """reference.scale_and_dot."""
    m, n = dh.shape
    dhs, coefficient = torch.empty_like(dh), torch.empty_like(rstd)
    blocks = _row_blocks(n)
    grid = (triton.cdiv(m, blocks["BLOCK_M"]),)
    rows.scale_and_dot_kernel[grid](dh, h, rstd, dhs, coefficient, m, N=n, **blocks)
    return dhs, coefficient


@_on_its_device
def norm_backward(g: Tensor, x: Tensor, rstd: Tensor, d_residual: Tensor | None) -> Tensor:
    """reference.norm_backward."""
    m, n = x.shape
    dx = torch.empty_like(x)
    blocks = _row_blocks(n)
    grid = (triton.cdiv(m, blocks["BLOCK_M"]),)
    residual = x if d_residual is None else d_residual
    rows.norm_backward_kernel[grid](
        g, x, rstd, residual, dx, m, N=n, RESIDUAL=d_residual is not None, **blocks
    )
    return dx


@_on_its_device
def unrotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    head_dim: int,
    rstd: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """reference.unrotate; `out` (M, n) may be columns of a wider matrix."""
    m, n = x.shape
    y = torch.empty_like(x) if out is None else out
    block_m = 32
    rows.unrotate_kernel[(triton.cdiv(m, block_m), n // head_dim)](
        x,
        y,
        cos,
        sin,
        x if rstd is None else rstd,
        m,
        cos.size(0),
        x.stride(0),
        y.stride(0),
        SCALED=rstd is not None,
        HEAD_DIM=head_dim,
        BLOCK_M=block_m,
        num_warps=4,
    )
    return y
