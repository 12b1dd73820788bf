"""What generation keeps of the tokens that it has seen, in three forms.

| form         | kept of a token in a layer | numbers        | a new token costs beside         |
|--------------|----------------------------|----------------|----------------------------------|
| full         | rotated keys, values       | 2 · H_kv · D   | nothing                          |
| value_latent | rotated keys, latents of v | H_kv · D + r_v | sums of width r_v instead of D   |
| latent       | latents of k and of v      | r_k + r_v      | keys rebuilt: 2 · r_k · H_kv · D |

A latent is what enters B of a low-dimensional projection y = B h. All three are exact. Values never
come back: Σ p B h = B Σ p h, so B follows the sum over the keys (`attend_latents`). Keys have to,
because rotary positions stand between B and the product with a query.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.config import ModelConfig

CacheForm = Literal["full", "value_latent", "latent"]
Rotary = tuple[Tensor, Tensor]  # cos and sin, (T, D/2), or (B, T, D/2) for rows of their own


class LayerCache(NamedTuple):
    """One layer's part of a KVCache, of which `length` tokens are filled.

    keys: (B, capacity, H_kv, D), or latents (B, capacity, r_k). values: the same, or latents
    (B, capacity, r_v). rotary: of all positions to the end of this forward pass, for keys that are
    rebuilt.
    """

    keys: Tensor
    values: Tensor
    length: int
    form: CacheForm = "full"
    rotary: Rotary | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k and v (B, T, …) behind what is there; returns all of both so far."""
        end = self.length + k.size(1)
        if end > self.keys.size(1):
            raise ValueError(f"the cache holds {self.keys.size(1)} tokens, {end} are needed")
        self.keys[:, self.length : end] = k
        self.values[:, self.length : end] = v
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    """Keys and values of the tokens seen so far, per layer, in memory allocated once.

    `length` is the number of tokens stored; Transformer.forward advances it after the last layer.
    Prompts of unequal length are padded on the left: `padding` (B,) says by how many tokens, whose
    ids mean nothing. No token sees them and positions are counted from behind them, so a row
    computes what it computes alone. ValueError where the model has no latents for the form.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype,
        form: CacheForm = "full",
        padding: Tensor | None = None,
    ) -> None:
        keys, values = cached_shapes(config, form)
        rows = (config.num_layers, batch, capacity)
        self.keys = torch.empty((*rows, *keys), device=device, dtype=dtype)
        self.values = torch.empty((*rows, *values), device=device, dtype=dtype)
        # The number of the document that each token is in, -1 for padding.
        self.documents = torch.zeros(batch, capacity, device=device, dtype=torch.long)
        self.form, self.length = form, 0
        self.padding: Tensor | None = None
        self.least_padding = 0
        if padding is not None and bool(padding.any()):
            self.padding, self.least_padding = padding.to(device), int(padding.min())

    def layer(self, index: int, rotary: Rotary | None = None) -> LayerCache:
        """The part of a layer."""
        return LayerCache(self.keys[index], self.values[index], self.length, self.form, rotary)

    def positions(self, start: int, end: int) -> Tensor:
        """Positions of the stored tokens from `start` to `end`: (T,), or (B, T) with padding."""
        places = torch.arange(start, end, device=self.keys.device)
        if self.padding is None:
            return places
        return (places - self.padding[:, None]).clamp(min=0)

    def numbered(self, begins: Tensor) -> tuple[Tensor, Tensor]:
        """The number of the document that each new token is in, (B, T), and that of all tokens so
        far, (B, S), from where documents begin: (B, T), 1 there, else 0. Padding is number -1.
        """
        start, end = self.length, self.length + begins.size(1)
        new = begins.cumsum(dim=1)
        if start:
            new = new + self.documents[:, start - 1, None].clamp(min=0)
        if self.padding is not None:
            hidden = torch.arange(start, end, device=begins.device) < self.padding[:, None]
            new = new.masked_fill(hidden, -1)
        self.documents[:, start:end] = new
        return new, self.documents[:, :end]

    def keep(self, rows: Tensor) -> None:
        """Drops all rows of the batch but these, (n,) indices."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.documents = self.documents[rows]
        if self.padding is not None:
            self.padding = self.padding[rows]
            self.least_padding = int(self.padding.min())

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values, or their latents, for the whole capacity."""
        return self.keys.nbytes + self.values.nbytes


def cached_shapes(config: ModelConfig, form: CacheForm) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What is kept of a token in a layer, of its keys and of its values. ValueError where the model
    has no latents for the form.
    """
    assert config.num_kv_heads is not None
    assert config.head_dim is not None
    heads = (config.num_kv_heads, config.head_dim)
    ranks = config.ranks
    for name, rank, needed in (
        ("v", ranks.v, form != "full"),
        ("k", ranks.k, form == "latent"),
    ):
        if needed and rank is None:
            allowed = "full" if name == "v" else "full, value_latent"
            raise ValueError(
                f"cache: {form} keeps the latents of {name}_proj, which is dense in this model "
                f"(model.r.{name} is null); allowed is {allowed}"
            )
    keys = (ranks.k,) if form == "latent" and ranks.k is not None else heads
    values = (ranks.v,) if form != "full" and ranks.v is not None else heads
    return keys, values


def cached_numbers(config: ModelConfig, form: CacheForm) -> int:
    """Numbers that a cache keeps of a token, in all layers. ValueError as cached_shapes."""
    return config.num_layers * sum(torch.Size(one).numel() for one in cached_shapes(config, form))


def rebuilds_values(queries: int, heads: int, groups: int, width: int, rank: int) -> bool:
    """Whether values that are kept as latents are rebuilt for so many new tokens, by the multiply-
    adds of a key: rank · groups · width for its values and heads · width a token for their sum,
    against heads · rank a token where B follows the sum.
    """
    return queries * heads * (rank - width) > rank * groups * width


def added_flops(config: ModelConfig, form: CacheForm, keys: float) -> float:
    """FLOPs that a new token costs over those with the full cache, `keys` tokens being seen.

    Of a layer: sums over latents, 2 · keys · H · (r_v - D), and B of each query head behind them in
    place of the new value's, 2 · r_v · D · (H - H_kv), or all other values rebuilt,
    2 · (keys - 1) · r_v · H_kv · D (rebuilds_values); all other keys rebuilt,
    2 · (keys - 1) · r_k · H_kv · D. Negative where r_v is under the width of a head.
    """
    assert config.num_kv_heads is not None
    assert config.head_dim is not None
    heads, groups, width = config.num_heads, config.num_kv_heads, config.head_dim
    cached_shapes(config, form)
    found = 0.0
    rank = config.ranks.v
    if form != "full" and rank is not None:
        if rebuilds_values(1, heads, groups, width, rank):
            found += 2 * (keys - 1) * rank * groups * width
        else:
            found += 2 * keys * heads * (rank - width) + 2 * rank * width * (heads - groups)
    if form == "latent" and config.ranks.k is not None:
        found += 2 * (keys - 1) * config.ranks.k * groups * width
    return config.num_layers * found
