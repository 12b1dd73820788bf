"""The feed-forward network of a block: SwiGLU (family llama) or ReLU (family paper-1)."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.projection import projection


class FeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) (Shazeer 2020) where there is a gate, else down(relu(up(x)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        layers = {k: projection(v) for k, v in config.feed_forward_projections().items()}
        self.gate_proj = layers.get("gate_proj")
        self.up_proj = layers["up_proj"]
        self.down_proj = layers["down_proj"]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        if self.gate_proj is not None:
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(F.relu(self.up_proj(x)))
