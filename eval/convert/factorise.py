"""A dense weight as the product of two factors, by truncated singular value decompositions."""

from typing import NamedTuple

import torch
from torch import Tensor

# Least weight of a column, over the largest: a column that no gradient ever reached would be lost
# altogether, and the factors are divided by these weights.
FLOOR = 1e-6


class Factors(NamedTuple):
    """W ≈ B A: A (r, d_in), B (d_out, r), float32, and of W D its singular values, float64."""

    A: Tensor
    B: Tensor
    singular_values: Tensor


def scales(fisher: Tensor | None) -> Tensor | None:
    """The weights √f of the columns of W (d_out, d_in), from the Fisher information of its inputs
    f (d_in,), float64; None: all alike.

    At least FLOOR times the largest, and 1 where there is no information at all.
    """
    if fisher is None:
        return None
    found = fisher.double().sqrt()
    largest = found.max()
    return found.clamp_min(FLOOR * float(largest)) if largest > 0 else torch.ones_like(found)


def singular_values(weight: Tensor, columns: Tensor | None = None) -> Tensor:
    """Of W D, descending, float64: W (d_out, d_in), D = diag(columns (d_in,))."""
    return torch.linalg.svdvals(_weighted(weight, columns))


def factorise(weight: Tensor, rank: int, columns: Tensor | None = None) -> Factors:
    """The product B A of rank r that is nearest to W (d_out, d_in): least ‖(W - B A) D‖_F.

    With W D = U S Vᵀ the truncated U_r S_r V_rᵀ is the nearest of rank r to W D (Eckart and Young
    1936), so B A = U_r S_r V_rᵀ D⁻¹. The singular values are shared: B = U_r √S_r and
    A = √S_r V_rᵀ D⁻¹, with D scaled to a mean square of 1 (a scale of D changes no minimum), so
    that columns all alike give the plain SVD. D weighs the columns of W, its inputs: Hsu et al.
    2022, "Language model compression with weighted low-rank factorization" (ICLR), write a layer as
    x W with W (d_in, d_out), and weigh its rows. Computed in float64.
    """
    size = torch.ones(()) if columns is None else columns.square().mean().sqrt()
    u, s, vh = torch.linalg.svd(_weighted(weight, columns), full_matrices=False)
    root = (s[:rank] / size).sqrt()
    a = root[:, None] * vh[:rank]
    if columns is not None:
        a = a / (columns / size)
    b = u[:, :rank] * root
    return Factors(a.float().contiguous(), b.float().contiguous(), s)


def relative_error(weight: Tensor, factors: Factors, columns: Tensor | None = None) -> float:
    """‖(W - B A) D‖_F / ‖W D‖_F of the float32 factors, computed in float64; 0 where W D is 0."""
    product = factors.B.double() @ factors.A.double()
    whole = _weighted(weight, columns).norm()
    lost = _weighted(weight.double() - product, columns).norm()
    return float(lost / whole) if whole else 0.0


def kept_energy(factors: Factors) -> float:
    """Σ_{i≤r} σ_i² / Σ σ_i² of W D; 1 where W D is 0."""
    energy = factors.singular_values.square()
    total = energy.sum()
    return float(energy[: factors.A.size(0)].sum() / total) if total else 1.0


def _weighted(weight: Tensor, columns: Tensor | None) -> Tensor:
    return weight.double() if columns is None else weight.double() * columns
