"""LPA in transformers: a decoder-only Transformer whose projections are dense or the product of two
thin factors, y = B (A x).

What is unusual here:
- each kind of projection (q, k, v, o, ffn) has a rank of its own, or none (dense);
- A and B of a low-dimensional projection are each an nn.Linear, for adapters to attach to;
- there are no buffers: rotary angles are computed in float64 from the positions at each call;
- with document_start_id the numbers of the documents of past tokens are in the cache, as one more
  layer of it.

B batch, T new tokens, S all tokens so far, H heads, D head_dim, d hidden_size, r rank.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_lpa import LpaConfig

SILU_MEAN_SQUARE = 0.3557755  # E[silu(z)²], z of N(0, 1), by quadrature


class LpaLinear(nn.Linear):
    """nn.Linear that knows the standard deviation of its new weights."""

    start_std: float


class LpaLowDim(nn.Module):
    """y = B (A x); with latent_norm y = B (√(d_in/r) · RMSNorm(A x)), with silu y = B silu(A x)."""

    def __init__(
        self, config: LpaConfig, d_in: int, d_out: int, rank: int, bias: str, into_block: bool
    ) -> None:
        super().__init__()
        self.A = LpaLinear(d_in, rank, bias=bias == "latent")
        self.B = LpaLinear(rank, d_out, bias=bias == "output")
        norm = into_block and config.latent_norm
        self.latent_norm = nn.RMSNorm(rank, eps=config.norm_eps) if norm else None
        self.latent_silu = config.latent_activation == "silu"
        self.scale = math.sqrt(d_in / rank)

    def start_with(self, std: float) -> None:
        """Notes for _init_weights what gives outputs the variance of a dense weight of this std."""
        gain = self.scale if self.latent_norm is None else 1.0
        gain /= math.sqrt(SILU_MEAN_SQUARE) if self.latent_silu else 1.0
        self.A.start_std, self.B.start_std = 1 / math.sqrt(self.A.in_features), std * gain

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d_in) -> (..., d_out)."""
        latent = self.A(x)  # (..., r)
        if self.latent_norm is not None:
            latent = self.latent_norm(latent) * self.scale
        if self.latent_silu:
            latent = F.silu(latent)
        y: Tensor = self.B(latent)
        return y


def projection(
    config: LpaConfig, kind: str, d_in: int, d_out: int, bias: str, into_block: bool
) -> nn.Module:
    """Dense where the kind of projection has no rank.

    bias: on the "latent", the "output" or "none"; a dense weight has either on its output.
    into_block: it reads the residual stream (q, k, v, gate, up), or else adds to it (o, down).
    """
    rank = (config.ranks or {}).get(kind)
    std = config.initializer_range
    if not into_block:  # Radford et al. 2019, section 2.3
        std /= math.sqrt(2 * config.num_hidden_layers)
    if rank is None:
        dense = LpaLinear(d_in, d_out, bias=bias != "none")
        dense.start_std = std
        return dense
    low = LpaLowDim(config, d_in, d_out, rank, bias, into_block)
    low.start_with(std)
    return low


def norm(config: LpaConfig) -> nn.Module:
    """The norm of a sub-layer."""
    kind = nn.RMSNorm if config.family == "llama" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def rotary_table(config: LpaConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position · θ^(-2i/D), i < D/2: positions (B, T) -> two of (B, T, 1, D/2)."""
    dim = config.head_dim
    assert dim is not None
    i = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double()[..., None, None] * config.rope_theta ** (-i / dim)
    return angles.cos().float(), angles.sin().float()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i+D/2}) of x (B, T, H, D)."""
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    y = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return y.to(x.dtype)


def eager_attention(
    module: "LpaAttention", query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, scaling: float, dropout: float = 0.0, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(q kᵀ · scaling + mask) v. query (B, H, T, D), key and value (B, H_kv, S, D) ->
    (B, T, H, D) and the weights (B, H, T, S).
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=wide).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class LpaAttention(nn.Module):
    """o_proj(softmax(q kᵀ / √D, causal) v), with q and k rotated in family llama."""

    def __init__(self, config: LpaConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = config.head_dim**-0.5, True
        d = config.hidden_size
        wide = config.num_attention_heads * config.head_dim
        narrow = config.num_key_value_heads * config.head_dim
        into, out = ("none", "none") if config.family == "llama" else ("latent", "output")
        self.q_proj = projection(config, "q", d, wide, into, into_block=True)
        self.k_proj = projection(config, "k", d, narrow, into, into_block=True)
        self.v_proj = projection(config, "v", d, narrow, into, into_block=True)
        self.o_proj = projection(config, "o", wide, d, out, into_block=False)
        normed, eps = config.qk_norm, config.norm_eps
        self.q_norm = nn.RMSNorm(config.head_dim, eps=eps) if normed else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=eps) if normed else nn.Identity()

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attention_mask: Tensor | None,
        past_key_values: Cache | None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """x (B, T, d) -> (B, T, d), and the weights where the implementation has them."""
        q = self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))  # (B, T, H_kv, D)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H_kv, T, D)
        if rotary is not None:
            q, k = rotated(q, *rotary), rotated(k, *rotary)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, H, T, D), (B, H_kv, T, D)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        name = self.config._attn_implementation
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        y, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(y.flatten(2)), weights


class LpaFeedForward(nn.Module):
    """down(silu(gate(x)) · up(x)) in family llama, down(relu(up(x))) in paper-1."""

    def __init__(self, config: LpaConfig) -> None:
        super().__init__()
        d, f, gated = config.hidden_size, config.intermediate_size, config.family == "llama"
        into, out = ("none", "none") if gated else ("latent", "output")
        self.gate_proj = projection(config, "ffn", d, f, into, into_block=True) if gated else None
        self.up_proj = projection(config, "ffn", d, f, into, into_block=True)
        self.down_proj = projection(config, "ffn", f, d, out, into_block=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., d) -> (..., d)."""
        up = self.up_proj(x)
        hidden = F.relu(up) if self.gate_proj is None else F.silu(self.gate_proj(x)) * up
        y: Tensor = self.down_proj(hidden)
        return y


class LpaBlock(GradientCheckpointingLayer):
    """Attention and feed-forward network, each with its norm and residual."""

    def __init__(self, config: LpaConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm_first = config.family == "llama"
        self.attention_norm, self.attention = norm(config), LpaAttention(config, layer_idx)
        self.feed_forward_norm, self.feed_forward = norm(config), LpaFeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x (B, T, d) -> (B, T, d). The rest is LpaAttention's."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), **kwargs)[0])
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        x = x + self.dropout(self.attention_norm(self.attention(x, **kwargs)[0]))
        return x + self.dropout(self.feed_forward_norm(self.feed_forward(x)))


class LpaPreTrainedModel(PreTrainedModel):
    """What both models have in common."""

    config: LpaConfig
    config_class = LpaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LpaBlock"]  # noqa: RUF012 (transformers' name and type)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _can_record_outputs = {"hidden_states": LpaBlock, "attentions": LpaAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """New weights: the product B·A has the variance of the dense weight in its place, which is
        σ², and σ²/(2L) in o_proj and down_proj (σ = initializer_range, L layers).
        """
        super()._init_weights(module)
        if isinstance(module, LpaLinear):
            init.normal_(module.weight, 0.0, module.start_std)


class LpaModel(LpaPreTrainedModel):
    """Token ids in, hidden states out."""

    def __init__(self, config: LpaConfig) -> None:
        super().__init__(config)
        d, learned = config.hidden_size, config.family == "paper-1"
        self.embed_tokens = nn.Embedding(config.vocab_size, d)
        table = nn.Embedding(config.max_position_embeddings, d) if learned else None
        self.embed_positions = table
        layers = [LpaBlock(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Identity() if learned else norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None, use_cache: bool | None = None, **kwargs: Any,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Ids or vectors of new tokens -> hidden states (B, T, d), and the cache."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = _positions(x, attention_mask, past_key_values)
        mask = create_causal_mask(
            self.config, x, attention_mask, past_key_values, position_ids,
            and_mask_function=self._same_document(input_ids, past_key_values),
        )  # fmt: skip
        rotary = None
        if self.embed_positions is None:
            rotary = rotary_table(self.config, position_ids)
        else:
            x = x + self.embed_positions(position_ids)
        for layer in self.layers:
            x = layer(
                x, rotary=rotary, attention_mask=mask, past_key_values=past_key_values, **kwargs
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values
        )

    def _same_document(
        self, input_ids: Tensor | None, cache: Cache | None
    ) -> Callable[..., Tensor] | None:
        """Whether a query and a key are of one document, as masks of transformers ask it; None
        where the model crosses documents.
        """
        if self.config.document_start_id is None:
            return None
        if input_ids is None:
            raise ValueError("a model with document_start_id needs input_ids to find documents")
        numbers = (input_ids == self.config.document_start_id).cumsum(dim=1)  # (B, T)
        if cache is not None:
            numbers = self._remember(numbers, cache)

        def same(batch: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return numbers[batch, query] == numbers[batch, key]

        return same

    def _remember(self, numbers: Tensor, cache: Cache) -> Tensor:
        """Numbers of the documents of new tokens (B, T) -> of all tokens (B, S). They are a layer
        of the cache of their own, so that whatever reorders or cuts the cache takes them along.
        """
        if not isinstance(cache, DynamicCache):
            raise ValueError(f"a model with document_start_id takes a DynamicCache, not {cache}")
        own = self.config.num_hidden_layers
        while len(cache.layers) <= own:
            cache.layers.append(DynamicLayer())
        layer: Any = cache.layers[own]
        if layer.get_seq_length():
            numbers = numbers + layer.keys[:, 0, -1:, 0]
        new = numbers[:, None, :, None]  # (B, 1, T, 1), the shape of keys
        whole: Tensor = layer.update(new, new)[0]
        return whole[:, 0, :, 0]


def _positions(x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """(1 or B, T): places in the text, for which padding at the left does not count."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -x.size(1) :]
    start = cache.get_seq_length() if cache is not None else 0
    return torch.arange(start, start + x.size(1), device=x.device)[None]


class LpaForCausalLM(LpaPreTrainedModel, GenerationMixin):
    """Token ids in, logits and loss out."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LpaConfig) -> None:
        super().__init__(config)
        self.model = LpaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, logits_to_keep: int | Tensor = 0, **kwargs: Any,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits (B, T, vocab_size), of the last `logits_to_keep` tokens where that is not 0. With
        labels (B, T) also the mean cross-entropy of each label given what is before it, -100
        left out.
        """
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            **kwargs,
        )  # fmt: skip
        last = isinstance(logits_to_keep, int)
        kept = slice(-logits_to_keep, None) if last and logits_to_keep else slice(None)
        logits = self.lm_head(found.last_hidden_state[:, kept if last else logits_to_keep])
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=found.past_key_values,
            hidden_states=found.hidden_states, attentions=found.attentions,
        )  # fmt: skip
