"""Element-wise and row-wise kernels: bound by memory, one pass over their operands."""

import triton
import triton.language as tl


@triton.jit
def row_rstd_kernel(
    x_ptr, rstd_ptr, rows_total, eps, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """rstd (M,) = 1 / sqrt(mean(x (M, N)²) + eps)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    mask = inside[:, None] & (columns < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(rstd_ptr + rows, tl.rsqrt(tl.sum(x * x, axis=1) / N + eps), mask=inside)


@triton.jit
def scale_and_dot_kernel(
    dh_ptr,
    h_ptr,
    rstd_ptr,
    dhs_ptr,
    coefficient_ptr,
    rows_total,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dhs (M, N) = rstd · dh, coefficient (M,) = rstd² · Σ dh h."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    mask = inside[:, None] & (columns < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    dh = tl.load(dh_ptr + at, mask=mask, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + at, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, mask=inside, other=0.0)
    tl.store(dhs_ptr + at, (dh * rstd[:, None]).to(dhs_ptr.dtype.element_ty), mask=mask)
    tl.store(coefficient_ptr + rows, rstd * rstd * tl.sum(dh * h, axis=1), mask=inside)


@triton.jit
def norm_backward_kernel(
    g_ptr,
    x_ptr,
    rstd_ptr,
    d_residual_ptr,
    dx_ptr,
    rows_total,
    N: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx (M, N) = g - rstd² / N · (Σ g x) · x (+ d_residual), with g = rstd · dy."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    inside = rows < rows_total
    mask = inside[:, None] & (columns < N)[None, :]
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + rows, mask=inside, other=0.0)
    dx = g - (rstd * rstd * tl.sum(g * x, axis=1) / N)[:, None] * x
    if RESIDUAL:
        dx += tl.load(d_residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def unrotate_kernel(
    x_ptr,
    y_ptr,
    cos_ptr,
    sin_ptr,
    rstd_ptr,
    rows_total,
    positions,
    x_stride,
    y_stride,
    SCALED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """y = rstd · (x rotated by the opposite angle), one head of BLOCK_M rows a program."""
    half: tl.constexpr = HEAD_DIM // 2
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, half)
    mask = (rows < rows_total)[:, None]
    table = (rows % positions)[:, None] * half + column[None, :]
    cos = tl.load(cos_ptr + table, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + table, mask=mask, other=0.0)
    if SCALED:
        rstd = tl.load(rstd_ptr + rows, mask=rows < rows_total, other=0.0)
        cos *= rstd[:, None]
        sin *= rstd[:, None]
    head = tl.program_id(1) * HEAD_DIM + column[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    x_at = x_ptr + wide_rows * x_stride + head
    first = tl.load(x_at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_at + half, mask=mask, other=0.0).to(tl.float32)
    y_at = y_ptr + wide_rows * y_stride + head
    kind = y_ptr.dtype.element_ty
    tl.store(y_at, (first * cos + second * sin).to(kind), mask=mask)
    tl.store(y_at + half, (second * cos - first * sin).to(kind), mask=mask)
