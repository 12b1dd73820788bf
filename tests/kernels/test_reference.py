"""The definitions against formulas written out in Python floats or float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from kernels.reference import (
    apply_rotary,
    fold,
    low_dim_linear,
    norm_backward,
    norm_backward_matmul,
    project,
    rms_norm,
    rotary_table,
    rotate,
    row_rstd,
    scale_and_dot,
    unrotate,
)

F64 = torch.float64


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return randn(*shape, seed=seed).requires_grad_()


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rms_norm_formula(shape, eps):
    x, weight = randn(*shape), randn(7, seed=1)
    expected = torch.empty_like(x)
    for row, out in zip(x.reshape(-1, 7).tolist(), expected.view(-1, 7), strict=True):
        rms = math.sqrt(math.fsum(v * v for v in row) / 7 + eps)
        for i, v in enumerate(row):
            out[i] = v / rms * weight[i]
    assert_close(rms_norm(x, weight, eps), expected, rtol=1e-13, atol=0)


def test_rms_norm_does_not_subtract_the_mean():
    x = torch.full((4,), 5.0, dtype=F64)
    assert_close(rms_norm(x, torch.ones(4, dtype=F64), 0.0), torch.ones(4, dtype=F64))


def test_rms_norm_of_zeros_is_zero():
    assert rms_norm(torch.zeros(3, 8), torch.ones(8), 1e-6).equal(torch.zeros(3, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_takes_its_statistics_in_float32(dtype):
    """Half precision in, one rounding out: 256² is over float16's range, and 4096 squares added in
    bfloat16 would stop growing.
    """
    x = (randn(3, 4096) * 256).to(dtype)
    weight = (1 + 0.1 * randn(4096, seed=1)).to(dtype)
    exact = rms_norm(x.double(), weight.double(), 1e-6)
    result = rms_norm(x, weight.float(), 1e-6)
    assert result.dtype == dtype
    unit = torch.finfo(dtype).eps / 2  # half a unit in the last place, relative
    assert_close(result.double(), exact, rtol=2.1 * unit, atol=1e-7)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 6, 128])
def test_rotary_table_formula(theta, head_dim):
    positions = [0, 1, 2, 511, 8191, 131071]
    cos, sin = rotary_table(torch.tensor(positions), head_dim, theta)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (6, head_dim // 2)
    angles = [[p * theta ** (-2 * i / head_dim) for i in range(head_dim // 2)] for p in positions]
    for table, function in ((cos, math.cos), (sin, math.sin)):
        exact = torch.tensor([[function(a) for a in row] for row in angles], dtype=F64)
        # Rounding to float32 costs 3e-8 at most; an angle in float32 would cost 4e-3 at 131071.
        assert_close(table.double(), exact, rtol=0, atol=3.1e-8)


def test_rotary_table_takes_any_shape_of_positions():
    positions = torch.tensor([[0, 3, 5], [9, 1, 2]])
    cos, _ = rotary_table(positions, 8, 10000.0)
    assert cos.shape == (2, 3, 4)
    assert cos[1, 0].equal(rotary_table(torch.tensor([9]), 8, 10000.0)[0][0])


def rotated(x: torch.Tensor, positions: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    return apply_rotary(x, *rotary_table(positions, x.size(-1), theta))


def test_apply_rotary_is_a_complex_rotation():
    """(x_i + j x_{i+D/2}) · exp(j · position · theta^(-2i/D))."""
    x = randn(2, 9, 3, 8)
    positions = torch.arange(4, 13)
    y = rotated(x, positions)
    for t, position in enumerate(positions.tolist()):
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            turn = complex(math.cos(angle), math.sin(angle))
            z = torch.complex(x[:, t, :, i], x[:, t, :, i + 4]) * turn
            assert_close(y[:, t, :, i], z.real, rtol=0, atol=3e-7)
            assert_close(y[:, t, :, i + 4], z.imag, rtol=0, atol=3e-7)


def test_position_zero_is_left_alone():
    x = randn(2, 1, 3, 8)
    assert rotated(x, torch.tensor([0])).equal(x)


def test_rotary_preserves_norms():
    x = randn(2, 6, 3, 16)
    y = rotated(x, torch.tensor([0, 1, 100, 2047, 8191, 100000]))
    assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=2e-7, atol=0)
    assert not torch.allclose(y[:, 1:], x[:, 1:], atol=0.01)


@pytest.mark.parametrize("shift", [1, 100, 8000])
def test_rotary_scores_depend_on_the_distance_alone(shift):
    q, k = randn(1, 12, 2, 16), randn(1, 12, 2, 16, seed=1)
    here, there = torch.arange(12), torch.arange(12) + shift
    scores = [
        torch.einsum("bthd,bshd->bhts", rotated(q, at), rotated(k, at)) for at in (here, there)
    ]
    assert_close(scores[0], scores[1], rtol=0, atol=5e-6)
    moved = torch.einsum("bthd,bshd->bhts", rotated(q, here), rotated(k, there))
    assert not torch.allclose(scores[0], moved, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_rotary_rounds_once(dtype):
    """Computed in float32 at least: only the result is rounded to the dtype of x."""
    x = randn(2, 7, 3, 16).to(dtype)
    positions = torch.arange(8185, 8192)
    result = rotated(x, positions)
    assert result.dtype == dtype
    unit = torch.finfo(dtype).eps / 2
    assert_close(result.double(), rotated(x.double(), positions), rtol=unit, atol=1e-6)


@pytest.mark.parametrize("with_bias_a", [False, True])
@pytest.mark.parametrize("with_bias_b", [False, True])
def test_low_dim_linear_formula(with_bias_a, with_bias_b):
    x, a, b = randn(2, 3, 5), randn(4, 5, seed=1), randn(6, 4, seed=2)
    bias_a = randn(4, seed=3) if with_bias_a else None
    bias_b = randn(6, seed=4) if with_bias_b else None
    on_latent = bias_a.tolist() if with_bias_a else [0.0] * 4
    on_output = bias_b.tolist() if with_bias_b else [0.0] * 6
    expected = torch.empty(2, 3, 6, dtype=F64)
    for n in range(2):
        for t in range(3):
            latent = [sum(a[j, i] * x[n, t, i] for i in range(5)) + on_latent[j] for j in range(4)]
            for o in range(6):
                expected[n, t, o] = sum(b[o, j] * latent[j] for j in range(4)) + on_output[o]
    assert_close(low_dim_linear(x, a, b, bias_a, bias_b), expected, rtol=1e-12, atol=1e-12)


def test_low_dim_linear_is_linear():
    """Nothing between the factors: no activation, no norm, no scale."""
    a, b = randn(3, 5, seed=1), randn(6, 3, seed=2)
    x, y = randn(4, 5), randn(4, 5, seed=3)
    left = low_dim_linear(2 * x - 7 * y, a, b)
    assert_close(left, 2 * low_dim_linear(x, a, b) - 7 * low_dim_linear(y, a, b))
    assert_close(left, (2 * x - 7 * y) @ (b @ a).T)


def test_gradients():
    """Analytic gradients of every argument against finite differences in float64."""
    cos, sin = rotary_table(torch.arange(3), 4, 10000.0)
    check = torch.autograd.gradcheck
    assert check(lambda x, w: rms_norm(x, w, 1e-6), (leaf(2, 3, 5), leaf(5, seed=1)))
    assert check(lambda x: apply_rotary(x, cos, sin), (leaf(2, 3, 2, 4),))
    inputs = (leaf(2, 3), leaf(2, 3, seed=1), leaf(4, 2, seed=2))
    assert check(low_dim_linear, inputs)
    assert check(low_dim_linear, (*inputs, leaf(2, seed=3), leaf(4, seed=4)))


# --- the pieces of the custom operators ---------------------------------------------------------


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """sqrt(mean(x²) + eps) of each row (M, d) -> (M, 1)."""
    return torch.sqrt(torch.einsum("md,md->m", x, x) / x.size(1) + eps)[:, None]


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_row_rstd_formula(eps):
    x = randn(3, 7)
    expected = [1 / math.sqrt(math.fsum(v * v for v in row) / 7 + eps) for row in x.tolist()]
    assert_close(row_rstd(x, eps), torch.tensor(expected, dtype=F64), rtol=1e-14, atol=0)
    assert_close(row_rstd(torch.zeros(2, 7, dtype=F64), eps)[1].item(), eps**-0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_row_rstd_is_float32(dtype):
    """300² is over float16's range, and 4096 squares added in bfloat16 would stop growing."""
    x = (randn(3, 4096) * 300).to(dtype)
    result = row_rstd(x, 1e-6)
    assert result.dtype == torch.float32
    assert_close(result.double(), row_rstd(x.double(), 1e-6), rtol=1e-6, atol=0)


def test_folded_weights_give_the_normalised_product():
    """rstd · (x foldedᵀ) = RMSNorm(x) Wᵀ, in the order of the weights."""
    x, w = randn(4, 7), randn(7, seed=1)
    weights = [randn(n, 7, seed=2 + n) for n in (3, 1, 5)]
    folded = fold(w, weights)
    assert folded.shape == (9, 7)
    x_hat = x / rms(x, 0.5) * w
    expected = torch.cat([torch.einsum("md,nd->mn", x_hat, weight) for weight in weights], dim=1)
    assert_close(row_rstd(x, 0.5)[:, None] * (x @ folded.T), expected, rtol=1e-12, atol=1e-13)


def angles_of(positions: list[int], half: int) -> torch.Tensor:
    """exp(j · position · 100^(-i / half)) (T, half)."""
    values = [[p * 100 ** (-i / half) for i in range(half)] for p in positions]
    return torch.polar(torch.ones(len(positions), half, dtype=F64), torch.tensor(values, dtype=F64))


def turned_rows(x: torch.Tensor, turns: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Row m (head by head) times turns[m mod T], as complex numbers x_i + j x_{i+D/2}."""
    result, half = x.clone(), head_dim // 2
    for m in range(x.size(0)):
        for start in range(0, x.size(1), head_dim):
            first = x[m, start : start + half]
            second = x[m, start + half : start + head_dim]
            z = torch.complex(first, second) * turns[m % len(turns)]
            result[m, start : start + half], result[m, start + half : start + head_dim] = (
                z.real,
                z.imag,
            )
    return result


TURNS = angles_of([0, 3, 11], 2)  # T = 3, D = 4
TABLE = (TURNS.real, TURNS.imag)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_project_formula(scaled, rotated):
    """M = 6 rows are two sequences of T = 3; n = 8 columns are two heads of D = 4."""
    x, weight = randn(6, 5), randn(8, 5, seed=1)
    rstd = randn(6, seed=2).abs() if scaled else None
    expected = torch.einsum("mk,nk->mn", x, weight)
    if rstd is not None:
        expected = torch.diag(rstd) @ expected
    if rotated:
        expected = turned_rows(expected, TURNS, 4)
        result = project(x, weight, rstd, *TABLE, 4)
    else:
        result = project(x, weight, rstd)
    assert_close(result, expected, rtol=1e-12, atol=1e-13)


def test_rotate_is_a_complex_rotation_of_each_row():
    x = randn(6, 8)
    assert_close(rotate(x, *TABLE, 4), turned_rows(x, TURNS, 4), rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("scaled", [False, True])
def test_unrotate_is_a_rotation_by_the_opposite_angle(scaled):
    x = randn(6, 8)
    rstd = randn(6, seed=2).abs() if scaled else None
    expected = turned_rows(x, TURNS.conj(), 4)
    if rstd is not None:
        expected = torch.diag(rstd) @ expected
    assert_close(unrotate(x, *TABLE, 4, rstd), expected, rtol=1e-13, atol=1e-14)


def test_unrotate_is_the_inverse_and_the_adjoint_of_rotate():
    x, y = randn(6, 8), randn(6, 8, seed=1)
    assert_close(unrotate(rotate(x, *TABLE, 4), *TABLE, 4), x)
    assert_close(rotate(unrotate(x, *TABLE, 4), *TABLE, 4), x)
    assert not torch.allclose(rotate(x, *TABLE, 4), x, atol=0.1)
    inner = (rotate(x, *TABLE, 4) * y).sum()
    assert_close(inner, (x * unrotate(y, *TABLE, 4)).sum())
    leaf_x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(rotate(leaf_x, *TABLE, 4), leaf_x, y)
    assert_close(unrotate(y, *TABLE, 4), gradient)


@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_of_a_normalised_product(residual):
    """scale_and_dot and norm_backward_matmul: the gradient of h = x / rms(x) Aᵀ for x, by torch."""
    x, a = leaf(4, 7), randn(3, 7, seed=1)
    dh = randn(4, 3, seed=2)
    d_residual = randn(4, 7, seed=3) if residual else None
    h = torch.einsum("md,rd->mr", x / rms(x, 0.5), a)
    (expected,) = torch.autograd.grad(h, x, dh)
    if d_residual is not None:
        expected = expected + d_residual
    with torch.no_grad():
        rstd = 1 / rms(x, 0.5)[:, 0]
        dhs, coefficient = scale_and_dot(dh, h, rstd)
        assert_close(dhs, torch.diag(rstd) @ dh)
        assert_close(coefficient, rstd**2 * torch.diag(dh @ h.T))
        dx = norm_backward_matmul(dhs, a, x, coefficient, d_residual)
    assert_close(dx, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("residual", [False, True])
def test_the_gradient_of_a_normalised_input(residual):
    """norm_backward: the gradient of y = x / rms(x) for x, by torch, from dy / rms(x)."""
    x, dy = leaf(4, 7), randn(4, 7, seed=2)
    d_residual = randn(4, 7, seed=3) if residual else None
    (expected,) = torch.autograd.grad(x / rms(x, 0.5), x, dy)
    if d_residual is not None:
        expected = expected + d_residual
    with torch.no_grad():
        rstd = 1 / rms(x, 0.5)[:, 0]
        dx = norm_backward(dy * rstd[:, None], x, rstd, d_residual)
    assert_close(dx, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_pieces_return_the_dtype_of_their_input(dtype):
    """Scales are float32, and so is the coefficient; what they scale keeps its dtype."""
    x, a, rstd = randn(6, 8).to(dtype), randn(8, 8, seed=1).to(dtype), randn(6, seed=2).float()
    table = [t.float() for t in TABLE]
    dhs, coefficient = scale_and_dot(x, x, rstd)
    assert coefficient.dtype == torch.float32
    exact = (rstd**2).double() * x.double().square().sum(dim=1)
    assert_close(coefficient.double(), exact, rtol=1e-6, atol=0)
    for result in (
        project(x, a, rstd),
        project(x, a, rstd, *table, 4),
        unrotate(x, *table, 4, rstd),
        dhs,
        norm_backward_matmul(dhs, a, x, coefficient, x),
        norm_backward(x, x, rstd, None),
    ):
        assert result.dtype == dtype
