"""Matrix products whose epilogue does the neighbouring element-wise work.

The main loops are plain load and dot. On Hopper, anything else that touches a loaded tile in a
pipelined loop (a sum of squares, a product with the norm's weight) gets fewer shared-memory buffers
than the asynchronous dot needs, or serialises it; so scaling, rotation and the norm's gradient
happen to the accumulator. kernels/aot checks the compiled code for that.
"""

import triton
import triton.language as tl


@triton.jit
def project_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    cos_ptr,
    sin_ptr,
    rows_total,
    positions,
    x_stride,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    HEAD_DIM: tl.constexpr,  # 0: no rotation
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y (M, N) = rotate(rstd · (x (M, K) weight (N, K)ᵀ)); x may have a row stride over K."""
    tiles_n: tl.constexpr = N // BLOCK_N
    pid = tl.program_id(0)
    # Tiles of the same rows are neighbours, so x comes from memory once; weight fits the L2 cache.
    rows = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    inside = rows < rows_total
    wide_rows = rows.to(tl.int64)  # M · N passes 2³¹ at a million rows

    x_tile = x_ptr + wide_rows[:, None] * x_stride + inner[None, :]
    weight_tile = weight_ptr + columns[None, :] * K + inner[:, None]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        x = tl.load(x_tile, mask=inside[:, None], other=0.0)
        weight = tl.load(weight_tile)
        accumulator = tl.dot(x, weight, accumulator, input_precision=PRECISION)
        x_tile += BLOCK_K
        weight_tile += BLOCK_K

    if SCALED:
        rstd = tl.load(rstd_ptr + rows, mask=inside, other=0.0)
        accumulator *= rstd[:, None]
    if HEAD_DIM > 0:
        half: tl.constexpr = HEAD_DIM // 2
        heads: tl.constexpr = BLOCK_N // HEAD_DIM
        # One table row a position, broadcast over the heads: a (BLOCK_M, BLOCK_N / 2) table would
        # take 70 more registers and spill at BLOCK_N 256.
        at = (rows % positions)[:, None] * half + tl.arange(0, half)[None, :]
        cos = tl.load(cos_ptr + at, mask=inside[:, None], other=1.0)[:, None, :]
        sin = tl.load(sin_ptr + at, mask=inside[:, None], other=0.0)[:, None, :]
        pairs = tl.reshape(accumulator, (BLOCK_M, heads, 2, half))
        first, second = tl.split(tl.permute(pairs, (0, 1, 3, 2)))  # (BLOCK_M, heads, half) each
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        accumulator = tl.reshape(tl.permute(turned, (0, 1, 3, 2)), (BLOCK_M, BLOCK_N))
    y = accumulator.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + wide_rows[:, None] * N + columns[None, :], y, mask=inside[:, None])


@triton.jit
def norm_backward_matmul_kernel(
    dhs_ptr,
    a_ptr,
    x_ptr,
    coefficient_ptr,
    d_residual_ptr,
    dx_ptr,
    rows_total,
    N: tl.constexpr,
    K: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx (M, N) = dhs (M, K) a (K, N) - coefficient / N · x (+ d_residual); all contiguous."""
    tiles_n: tl.constexpr = N // BLOCK_N
    pid = tl.program_id(0)
    rows = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    inside = rows < rows_total
    wide_rows = rows.to(tl.int64)

    dhs_tile = dhs_ptr + wide_rows[:, None] * K + inner[None, :]
    a_tile = a_ptr + inner[:, None] * N + columns[None, :]
    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, K, BLOCK_K):
        dhs = tl.load(dhs_tile, mask=inside[:, None], other=0.0)
        a = tl.load(a_tile)
        accumulator = tl.dot(dhs, a, accumulator, input_precision=PRECISION)
        dhs_tile += BLOCK_K
        a_tile += BLOCK_K * N

    at = wide_rows[:, None] * N + columns[None, :]
    x = tl.load(x_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    coefficient = tl.load(coefficient_ptr + rows, mask=inside, other=0.0) / N
    dx = accumulator - coefficient[:, None] * x
    if RESIDUAL:
        dx += tl.load(d_residual_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None])
