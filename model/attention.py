"""Causal self-attention with grouped-query heads, rotary positions, and the key/value cache for
generation.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels import ops, reference
from kernels.attention import Backend, Mask, attend
from model.config import ModelConfig
from model.norm import RMSNorm
from model.projection import Dense, LowDim, plain, projection

Rotary = tuple[Tensor, Tensor]


class LayerCache(NamedTuple):
    """One layer's part of a KVCache: keys and values (B, capacity, H_kv, D), of which `length`
    tokens are filled.
    """

    keys: Tensor
    values: Tensor
    length: int

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, H_kv, D) behind what is there; returns all of both so far."""
        end = self.length + k.size(1)
        if end > self.keys.size(1):
            raise ValueError(f"the cache holds {self.keys.size(1)} tokens, {end} are needed")
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """Keys and values of the tokens seen so far, per layer, in memory allocated once.

    Holds 2 · num_layers tensors (B, capacity, num_kv_heads, head_dim). `length` is the number of
    tokens stored; Transformer.forward advances it after the last layer. With document masking it
    also holds the number of the document of each token, (B, capacity).
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
        self.documents = torch.zeros(batch, capacity, device=device, dtype=torch.long)
        self.length = 0

    def layer(self, index: int) -> LayerCache:
        """The part of a layer."""
        return LayerCache(self.keys[index], self.values[index], self.length)


class Attention(nn.Module):
    """o_proj(softmax(q kᵀ / √D, causal) v) with q, k, v = projections of x; with qk_norm, q and k
    are normalised a head at a time, before rotary positions.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        self.backend: Backend = "auto"
        layers = {name: projection(s) for name, s in config.attention_projections().items()}
        self.q_proj, self.k_proj = layers["q_proj"], layers["k_proj"]
        self.v_proj, self.o_proj = layers["v_proj"], layers["o_proj"]
        normed, eps = config.qk_norm, config.norm_eps
        self.q_norm = RMSNorm(config.head_dim, eps) if normed else None
        self.k_norm = RMSNorm(config.head_dim, eps) if normed else None

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Mask = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, d), normalised -> (B, T, d). rotary: cos and sin (T, D/2), None where positions
        are learned. mask: as kernels.attention takes it.
        """
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H, D)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H_kv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H_kv, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None:
            q, k = reference.apply_rotary(q, *rotary), reference.apply_rotary(k, *rotary)
        return self.o_proj(self._attend(q, k, v, mask, cache))

    def fused(
        self,
        x: Tensor,
        norm_weight: Tensor,
        eps: float,
        rotary: Rotary,
        mask: Mask = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x + forward(RMSNorm(x)) by the fused operators, which read the projections' parameters.

        x (B, T, d) -> (B, T, d). Only where fusible() holds.
        """
        q, k, v, o = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        if isinstance(q, LowDim) and isinstance(k, LowDim) and isinstance(v, LowDim):
            h, x = ops.norm_down(x, norm_weight.to(x.dtype), (q.A, k.A, v.A), eps)
            if q.latent_norm is not None:
                parts = h.split([layer.rank for layer in (q, k, v)], dim=-1)
                normed = [at.normalised(part) for at, part in zip((q, k, v), parts, strict=True)]
                h = torch.cat(normed, dim=-1)  # (B, T, r_q + r_k + r_v)
            heads = ops.up_rotary(h, (q.B, k.B, v.B), *rotary, self.head_dim)
        else:
            weights = (_weight(q), _weight(k), _weight(v))
            *qkv, x = ops.norm_qkv(x, norm_weight.to(x.dtype), weights, eps, *rotary, self.head_dim)
            heads = (qkv[0], qkv[1], qkv[2])
        y = self._attend(*heads, mask, cache)
        if isinstance(o, LowDim):
            return ops.low_dim_linear(y, o.A, o.B, residual=x)
        return x + o(y)

    def fusible(self) -> bool:
        """Whether nobody watches or changes the calls that fused() leaves out: no hooks, and the
        projections are what this class made, without biases; and nothing stands between them and
        rotary positions.
        """
        return (
            plain(self, Attention)
            and self.q_norm is None
            and all(
                (plain(layer, LowDim) and layer.bias_A is None and layer.bias_B is None)
                or (plain(layer, Dense) and layer.bias is None)
                for layer in (self.q_proj, self.k_proj, self.v_proj, self.o_proj)
            )
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, cache: LayerCache | None
    ) -> Tensor:
        """Attention of (B, T, H, D) queries, with what the cache holds -> (B, T, H · D)."""
        if cache is not None:
            k, v = cache.append(k, v)
        return attend(q, k, v, self.backend, mask).flatten(2)


def _weight(layer: Dense | LowDim) -> Tensor:
    """The weight of a layer that is known to be dense."""
    assert isinstance(layer, Dense)
    return layer.weight
