"""Shape: what one projection of a block is."""

from typing import Literal, NamedTuple

Bias = Literal["none", "latent", "output"]


class Shape(NamedTuple):
    """A projection of a block: y (d_out) = W x (d_in), W dense (rank None) or the product B·A.

    latent_eps: the epsilon of an RMSNorm between A and B, which a dense W has no place for; None:
    no norm. latent_silu: SiLU between A and B.
    """

    d_in: int
    d_out: int
    rank: int | None
    bias: Bias
    latent_eps: float | None = None
    latent_silu: bool = False

    def matmul_parameters(self) -> int:
        """Entries of the matrices that are multiplied: the factors, not their dense equivalent."""
        if self.rank is None:
            return self.d_in * self.d_out
        return self.rank * (self.d_in + self.d_out)

    def parameters(self) -> int:
        """All parameters; a bias sits on the output of W or B, or (latent) on that of A."""
        count = self.matmul_parameters()
        if self.bias != "none":
            count += self.rank if self.bias == "latent" and self.rank else self.d_out
        return count + self.latent_norm_size()

    def latent_norm_size(self) -> int:
        """Width of the normalised latent; 0 where there is none."""
        return 0 if self.rank is None or self.latent_eps is None else self.rank
