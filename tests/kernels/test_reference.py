"""The definitions against formulas written out in Python floats or float64."""

import math

import pytest
import torch
from torch.testing import assert_close

from kernels.reference import apply_rotary, low_dim_linear, rms_norm, rotary_table

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
