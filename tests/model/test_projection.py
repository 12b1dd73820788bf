"""Dense and LowDim against matrices multiplied out."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from model.projection import Dense, LowDim, projection
from model.shape import Shape


def filled(shape: Shape, seed: int = 0) -> Dense | LowDim:
    """A projection in float64 with random parameters, biases too."""
    layer = projection(shape).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    return layer


def rows(d_in: int) -> torch.Tensor:
    return torch.randn(2, 5, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("bias", ["none", "latent", "output"])
def test_dense_is_a_matrix_with_the_bias_on_its_output(bias):
    layer, x = filled(Shape(6, 10, None, bias)), rows(6)
    assert isinstance(layer, Dense)
    expected = torch.einsum("oi,bti->bto", layer.weight, x)
    if bias == "none":
        assert layer.bias is None
    else:
        assert layer.bias.shape == (10,)
        expected = expected + layer.bias
    assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bias", ["none", "latent", "output"])
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(6, 10, 3), (10, 6, 6), (7, 7, 1)])
def test_low_dim_is_the_product_of_its_factors(bias, d_in, d_out, rank):
    layer, x = filled(Shape(d_in, d_out, rank, bias)), rows(d_in)
    assert isinstance(layer, LowDim)
    assert (layer.A.shape, layer.B.shape) == ((rank, d_in), (d_out, rank))
    expected = torch.einsum("oi,bti->bto", layer.B @ layer.A, x)
    if bias == "latent":
        assert layer.bias_A.shape == (rank,)
        expected = expected + layer.B @ layer.bias_A
    if bias == "output":
        assert layer.bias_B.shape == (d_out,)
        expected = expected + layer.bias_B
    assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (Shape(6, 10, 3, "none"), ["A", "B"]),
        (Shape(6, 10, 3, "latent"), ["A", "B", "bias_A"]),
        (Shape(6, 10, 3, "output"), ["A", "B", "bias_B"]),
        (Shape(6, 10, 3, "none", 1e-6), ["A", "B", "latent_norm.weight"]),
        (Shape(6, 10, 3, "latent", 1e-6), ["A", "B", "bias_A", "latent_norm.weight"]),
        (Shape(6, 10, None, "none"), ["weight"]),
        (Shape(6, 10, None, "none", 1e-6), ["weight"]),
        (Shape(6, 10, None, "latent"), ["bias", "weight"]),
        (Shape(6, 10, None, "output"), ["bias", "weight"]),
    ],
)
def test_parameters_and_their_count(shape, names):
    layer = projection(shape)
    assert sorted(name for name, _ in layer.named_parameters()) == names
    assert sum(p.numel() for p in layer.parameters()) == shape.parameters()
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    assert matrices == shape.matmul_parameters()


def test_gradients_of_the_factors():
    """dL/dB = dL/dW Aᵀ and dL/dA = Bᵀ dL/dW for W = B·A."""
    low, x = filled(Shape(6, 10, 3, "none")), rows(6)
    dense = Dense(Shape(6, 10, None, "none")).double()
    with torch.no_grad():
        dense.weight.copy_(low.B @ low.A)
    for layer in (low, dense):
        layer(x).pow(2).sum().backward()
    grad = dense.weight.grad
    assert_close(low.B.grad, grad @ low.A.T, rtol=1e-12, atol=1e-10)
    assert_close(low.A.grad, low.B.T @ grad, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", ["none", "latent", "output"])
@pytest.mark.parametrize(("d_in", "d_out", "rank"), [(6, 10, 3), (24, 6, 6), (7, 7, 1)])
def test_a_latent_norm_is_torchs(bias, d_in, d_out, rank, fused):
    """Outputs and gradients are those of torch's layers; the scale is √(d_in/r)."""
    layer = filled(Shape(d_in, d_out, rank, bias, 1e-2))
    layer.fused = fused
    down, up = nn.Linear(d_in, rank).double(), nn.Linear(rank, d_out).double()
    norm = nn.RMSNorm(rank, eps=1e-2).double()
    values = (layer.A, layer.bias_A, layer.B, layer.bias_B, layer.latent_norm.weight)
    theirs = (down.weight, down.bias, up.weight, up.bias, norm.weight)
    with torch.no_grad():
        for value, parameter in zip(values, theirs, strict=True):
            parameter.zero_() if value is None else parameter.copy_(value)
    x, other = rows(d_in).requires_grad_(), rows(d_in).requires_grad_()
    y, expected = layer(x), up(math.sqrt(d_in / rank) * norm(down(other)))
    assert_close(y, expected, rtol=1e-12, atol=1e-12)
    y.pow(3).sum().backward(), expected.pow(3).sum().backward()
    assert_close(x.grad, other.grad, rtol=1e-10, atol=1e-10)
    for value, parameter in zip(values, theirs, strict=True):
        if value is not None:
            assert_close(value.grad, parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bias", ["none", "latent", "output"])
def test_a_latent_silu_stands_between_the_factors(bias, fused):
    layer = filled(Shape(10, 6, 3, bias, latent_silu=True)).double()
    layer.fused = fused
    x = rows(10).double()
    latent = x @ layer.A.T + (0 if layer.bias_A is None else layer.bias_A)
    y = (latent / (1 + torch.exp(-latent))) @ layer.B.T
    y = y + (0 if layer.bias_B is None else layer.bias_B)
    torch.testing.assert_close(layer(x), y)


def test_low_dim_names_its_shape():
    assert "d_in=6, d_out=10, r=3" in repr(LowDim(Shape(6, 10, 3, "none")))
