"""Causal self-attention with grouped-query heads, rotary positions, and the key/value cache for
generation.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import reference
from model.config import ModelConfig
from model.projection import projection

Rotary = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of the tokens seen so far, per layer, in memory allocated once.

    Holds 2 · num_layers tensors (B, capacity, num_kv_heads, head_dim). `length` is the number of
    tokens stored; Transformer.forward advances it after the last layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        assert config.num_kv_heads is not None
        assert config.head_dim is not None
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, H_kv, D) behind what is there; returns all of both so far."""
        end = self.length + k.size(1)
        if end > self.keys.size(2):
            raise ValueError(f"the cache holds {self.keys.size(2)} tokens, {end} are needed")
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]


class Attention(nn.Module):
    """o_proj(softmax(q kᵀ / √D, causal) v) with q, k, v = projections of x."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.num_kv_heads != config.num_heads
        layers = {name: projection(s) for name, s in config.attention_projections().items()}
        self.q_proj, self.k_proj = layers["q_proj"], layers["k_proj"]
        self.v_proj, self.o_proj = layers["v_proj"], layers["o_proj"]

    def forward(self, x: Tensor, rotary: Rotary | None, cache: KVCache | None = None) -> Tensor:
        """x (B, T, d) -> (B, T, d). rotary: cos and sin (T, D/2), None where positions are
        learned.
        """
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H_kv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H_kv, D)
        if rotary is not None:
            q, k = reference.apply_rotary(q, *rotary), reference.apply_rotary(k, *rotary)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        y = self._attend(q, k, v)  # (B, T, H, D)
        return self.o_proj(y.flatten(2))  # (B, T, d)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (B, T, H, D), k and v (B, S, H_kv, D) with S >= T: the queries are the last T of S
        positions.
        """
        new, seen = q.size(1), k.size(1)
        mask = None
        if (
            1 < new < seen
        ):  # a chunk behind a filled cache: is_causal would align it at the top left
            mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=mask,
            is_causal=new == seen,
            enable_gqa=self.grouped,
        )
        return y.transpose(1, 2)
