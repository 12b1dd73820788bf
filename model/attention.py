"""Causal self-attention with grouped-query heads and rotary positions."""

import torch
from torch import Tensor, nn

from kernels import ops, reference
from kernels.attention import Backend, Mask, attend, attend_latents
from model.cache import LayerCache, Rotary, rebuilds_values
from model.config import ModelConfig
from model.norm import RMSNorm
from model.projection import Dense, LowDim, plain, projection


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
        q = self._heads(self.q_proj(x), self.q_norm, rotary)  # (B, T, H, D)
        if cache is not None and cache.form != "full":
            return self.o_proj(self._attend_latents(x, q, rotary, mask, cache))
        k = self._heads(self.k_proj(x), self.k_norm, rotary)  # (B, T, H_kv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))  # (B, T, H_kv, D)
        return self.o_proj(self._attend(q, k, v, mask, cache))

    def _heads(self, x: Tensor, norm: RMSNorm | None, rotary: Rotary | None) -> Tensor:
        """The heads of queries or keys (B, T, H · D), normalised and rotated -> (B, T, H, D)."""
        x = x.unflatten(-1, (-1, self.head_dim))
        x = x if norm is None else norm(x)
        return x if rotary is None else reference.apply_rotary(x, *rotary)

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

    def _attend_latents(
        self, x: Tensor, q: Tensor, rotary: Rotary | None, mask: Mask, cache: LayerCache
    ) -> Tensor:
        """Attention of (B, T, H, D) queries over a cache of latents -> (B, T, H · D)."""
        v_proj, k_proj = self._factors("v_proj"), self.k_proj
        if cache.form == "latent":
            k_proj = self._factors("k_proj")
            latents, h = cache.append(k_proj.down(x), v_proj.down(x))  # (B, S, r_k), (B, S, r_v)
            k = self._heads(k_proj.up(latents), self.k_norm, cache.rotary)
        else:
            k, h = cache.append(self._heads(k_proj(x), self.k_norm, rotary), v_proj.down(x))
        new, heads, groups = q.size(1), q.size(2), k.size(2)
        if rebuilds_values(new, heads, groups, self.head_dim, v_proj.rank):
            v = v_proj.up(h).unflatten(-1, (-1, self.head_dim))  # (B, S, H_kv, D)
            return attend(q, k, v, self.backend, mask).flatten(2)
        summed = attend_latents(q, k, h, mask).unflatten(2, (groups, -1))  # (B, T, H_kv, G, r)
        B = v_proj.B.to(summed.dtype).unflatten(0, (groups, -1))  # (H_kv, D, r)
        return torch.einsum("btkgr,kdr->btkgd", summed, B).flatten(2)

    def _factors(self, name: str) -> LowDim:
        """A projection whose latents are cached. ValueError where its calls are watched, as deltas
        do: what a hook adds to the output is no function of the latent.
        """
        layer = getattr(self, name)
        if not isinstance(layer, LowDim) or not plain(layer, LowDim):
            raise ValueError(
                f"cache: latents of {name} need a low-dimensional projection without hooks; merge "
                "the delta first, or use the full cache"
            )
        return layer


def _weight(layer: Dense | LowDim) -> Tensor:
    """The weight of a layer that is known to be dense."""
    assert isinstance(layer, Dense)
    return layer.weight
