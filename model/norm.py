"""RMSNorm, of the residual stream, of heads and of latents."""

import torch
from torch import Tensor, nn

from kernels import reference


class RMSNorm(nn.Module):
    """x / rms(x) · weight. weight (size,)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (..., size) -> (..., size)."""
        return reference.rms_norm(x, self.weight, self.eps)
