"""Spectra of matrices, and the number of dimensions that they come to."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Of the sum of the energies: rounding must not ask for one more dimension.
_TOLERANCE = 1e-12
MEASURES = ("effective_rank", "stable_rank", "rank_90_percent_energy", "rank_99_percent_energy")


def singular_values(weight: Tensor) -> Tensor:
    """Of a matrix (d_out, d_in), float64 (min(d_out, d_in),), descending, on the CPU."""
    found: Tensor = torch.linalg.svdvals(weight.double())
    return found.cpu()


def product_singular_values(b: Tensor, a: Tensor) -> Tensor:
    """The r largest singular values of the product B A; the others are zero.

    b (d_out, r), a (r, d_in), r at most min(d_out, d_in) -> float64 (r,), descending, on the CPU.
    With B = Q R and Aᵀ = P S, B A = Q (R Sᵀ) Pᵀ, and Q and P have orthonormal columns: the values
    are those of R Sᵀ (r, r). The product itself is never formed.
    """
    r = torch.linalg.qr(b.double(), mode="r").R
    s = torch.linalg.qr(a.double().T, mode="r").R
    return singular_values(r @ s.T)


def eigenvalues(moment: Tensor) -> Tensor:
    """Of a second moment (d, d), symmetric -> float64 (d,), descending, on the CPU.

    Rounding leaves some slightly under zero where the rank is not full: they are made zero.
    """
    found: Tensor = torch.linalg.eigvalsh(moment.double())
    return found.flip(0).clamp(min=0).cpu()


def effective_rank(values: Tensor) -> float | None:
    """exp(-Σ p ln p), p = values / Σ values (Roy & Vetterli 2007, "The effective rank: a measure of
    effective dimensionality"). values (n,) >= 0; None where all are zero.
    """
    total = values.sum()
    if total == 0:
        return None
    p = values / total
    return float(torch.exp(torch.special.entr(p).sum()))


def stable_rank(energies: Tensor) -> float | None:
    """Σ energies / the largest: ‖W‖_F² / ‖W‖₂² for squared singular values (Rudelson & Vershynin
    2007). None where all are zero.
    """
    return float(energies.sum() / energies.max()) if energies.max() > 0 else None


def energy_rank(energies: Tensor, share: float) -> int | None:
    """The fewest dimensions that hold this share of the sum of energies (n,), descending. None
    where all are zero.
    """
    total = energies.cumsum(0)
    if total[-1] == 0:
        return None
    return int((total < share * total[-1] * (1 - _TOLERANCE)).sum()) + 1


@dataclass(frozen=True)
class Spectrum:
    """A spectrum of a matrix.

    Attributes:
        values: Singular values of a weight, or eigenvalues of a second moment, float64 (n,),
            descending.
        energies: What they are squares of, (n,): squared singular values, or the eigenvalues.
        dimension: The rank that a matrix of this shape can have.
        bound: The rank that this one can have: at most `dimension`, less where it is a product.
    """

    values: Tensor
    energies: Tensor
    dimension: int
    bound: int

    @classmethod
    def of_weight(cls, values: Tensor, dimension: int, bound: int) -> "Spectrum":
        """From singular values."""
        return cls(values, values.square(), dimension, bound)

    @classmethod
    def of_moment(cls, moment: Tensor, bound: int) -> "Spectrum":
        """From a second moment (d, d)."""
        values = eigenvalues(moment)
        return cls(values, values, len(values), bound)

    def normalised(self) -> Tensor | None:
        """σ_i / σ_1, the square root of energy over the largest energy; None where all are zero."""
        return (self.energies / self.energies[0]).sqrt() if self.energies[0] > 0 else None

    def measures(self) -> dict[str, float | None]:
        """MEASURES, and each as a share of the dimension under NAME_share."""
        ranks: dict[str, float | None] = {
            "effective_rank": effective_rank(self.values),
            "stable_rank": stable_rank(self.energies),
            "rank_90_percent_energy": energy_rank(self.energies, 0.90),
            "rank_99_percent_energy": energy_rank(self.energies, 0.99),
        }
        shares = {
            f"{name}_share": None if rank is None else rank / self.dimension
            for name, rank in ranks.items()
        }
        return ranks | shares
