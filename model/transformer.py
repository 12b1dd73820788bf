"""The decoder-only Transformer.

What is unusual here:
- every projection is dense or low-dimensional (y = B(Ax)), each kind with a rank of its own;
  nothing else differs between the vanilla Transformer and LPA (projection.py);
- two families: "llama" (pre-RMSNorm, RoPE, SwiGLU) and "paper-1" (LayerNorm on the output of a
  sub-layer before the residual addition, learned positions, ReLU, no final norm);
- no buffers: the rotary table is recomputed in each forward, so casting the model never rounds it;
- a parameter is drawn from a generator seeded by (seed, its name): the start is the same at every
  ZeRO stage and world size, and models that differ in some projections share all other weights.
"""

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from kernels import reference
from kernels.attention import Mask, backend_context, document_mask
from kernels.cross_entropy import linear_cross_entropy
from model.attention import Attention
from model.cache import KVCache, LayerCache, Rotary
from model.config import ModelConfig
from model.execution import Execution
from model.feed_forward import FeedForward
from model.norm import RMSNorm
from model.projection import Dense, LowDim, plain
from model.recompute import keep_attention, keep_products, recomputed
from model.shape import Shape

Gather = Callable[[Tensor], AbstractContextManager[object]]
SILU_MEAN_SQUARE = 0.3557755  # E[silu(z)²], z of N(0, 1), by quadrature


class Embedding(nn.Embedding):
    """A table of vectors, left uninitialised: init_weights sets it."""

    def reset_parameters(self) -> None:
        """Does nothing."""


def _norm(config: ModelConfig) -> nn.Module:
    if config.family == "llama":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)


class Block(nn.Module):
    """Attention and feed-forward network, each with its norm and residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.dropout is not None
        self.norm_first = config.family == "llama"
        self.attention_norm = _norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)
        self.fused = self.recompute_qkv = self.recompute_ffn = False  # see Execution
        self.keep_products = partial(keep_products, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        rotary: Rotary | None,
        mask: Mask = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """x (B, T, d) -> (B, T, d)."""
        random = self.dropout.p > 0 and self.training
        if self.recompute_qkv and cache is None:
            x = recomputed(self._attend, x, rotary, mask, None, keep=keep_attention, random=random)
        else:
            x = self._attend(x, rotary, mask, cache)
        if self.recompute_ffn:
            return recomputed(self._transform, x, keep=self.keep_products, random=random)
        return self._transform(x)

    def _attend(
        self, x: Tensor, rotary: Rotary | None, mask: Mask, cache: LayerCache | None
    ) -> Tensor:
        """x and what attention adds to it."""
        dropping = self.training and self.dropout.p > 0
        plain_cache = cache is None or cache.form == "full"
        # The operators take one table of positions for all rows.
        shared = rotary is not None and rotary[0].dim() == 2
        if self.fused and shared and plain_cache and not dropping and self.fusible():
            assert rotary is not None
            norm = cast(RMSNorm, self.attention_norm)
            return self.attention.fused(x, norm.weight, norm.eps, rotary, mask, cache)
        if self.norm_first:
            return x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, cache))
        return x + self.dropout(self.attention_norm(self.attention(x, rotary, mask, cache)))

    def _transform(self, x: Tensor) -> Tensor:
        """x and what the feed-forward network adds to it."""
        if self.norm_first:
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x + self.dropout(self.feed_forward_norm(self.feed_forward(x)))

    def fusible(self) -> bool:
        """Whether the fused attention computes what the modules would: see Attention.fusible."""
        return plain(self.attention_norm, RMSNorm) and self.attention.fusible()


class Head(Dense):
    """The output head: logits, or the loss without ever holding those of a whole batch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.loss = "chunked"  # this and the next two: see Execution
        self.chunk_tokens: int | None = None
        self.compiled = False

    def forward(self, x: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """x (B, T, d) -> logits (B, T, vocab_size); with targets (B, T) the loss as
        Transformer.forward returns it.
        """
        if targets is None:
            return super().forward(x)
        loss = linear_cross_entropy(
            x.flatten(0, 1),
            self.weight,
            targets.flatten(),
            self.bias,
            reduction=reduction,
            method=self.loss,
            chunk_tokens=self.chunk_tokens,
            compile=self.compiled,
        )
        return loss.view_as(targets) if reduction == "none" else loss


class Transformer(nn.Module):
    """Token ids in, logits or loss out. Parameters are uninitialised until init_weights or a
    checkpoint.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.execution = Execution(kernels="reference", compile="off")
        d, vocab = config.hidden_size, config.vocab_size
        self.token_embedding = Embedding(vocab, d)
        self.position_embedding = (
            Embedding(config.max_seq_len, d) if config.family == "paper-1" else None
        )
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = _norm(config) if config.family == "llama" else nn.Identity()
        self.lm_head = Head(Shape(d, vocab, None, "output" if config.lm_head_bias else "none"))
        if config.tie_embeddings:
            self.lm_head.weight = self.token_embedding.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        cache: KVCache | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits (B, T, vocab_size) in float32, or with targets (B, T) the cross-entropy in nats.

        reduction "mean" gives the mean over the targets that are not -100, "none" the loss of each
        token (B, T), 0 where the target is -100. With a cache, input_ids continue what it holds.
        last: logits of the last position alone, (B, 1, vocab_size).
        ValueError where the sequence is longer than max_seq_len.
        """
        start = cache.length if cache is not None else 0
        end = start + input_ids.size(1)
        longest = end - (cache.least_padding if cache is not None else 0)
        if longest > self.config.max_seq_len:
            raise ValueError(
                f"a sequence of {longest} tokens is longer than model.max_seq_len "
                f"{self.config.max_seq_len}"
            )
        device = input_ids.device
        positions = (
            torch.arange(start, end, device=device)
            if cache is None
            else cache.positions(start, end)
        )  # (T,) or (B, T)
        x, rotary = self._embed(input_ids, positions)
        past = None  # angles of all tokens so far, for keys that the cache rebuilds
        if cache is not None and cache.form == "latent" and rotary is not None:
            past = self._rotary(cache.positions(0, end))
        mask = self._document_mask(input_ids, cache, x)
        random = self.config.dropout != 0 and self.training
        with backend_context(self.execution.attention, x.device):
            for index, block in enumerate(self.layers):
                if cache is None and self.execution.recomputes(index):
                    x = recomputed(block, x, rotary, mask, random=random)
                else:
                    part = cache.layer(index, past) if cache is not None else None
                    x = block(x, rotary, mask, part)
        if cache is not None:
            cache.length = end
        x = self.final_norm(x)
        result: Tensor = self.lm_head(x[:, -1:] if last else x, targets, reduction)
        return result.float()

    def _embed(self, input_ids: Tensor, positions: Tensor) -> tuple[Tensor, Rotary | None]:
        """Inputs of the first block (B, T, d), and the rotary table where positions are rotary."""
        x = self.token_embedding(input_ids)  # (B, T, d)
        if self.position_embedding is not None:
            return x + self.position_embedding(positions), None
        return x, self._rotary(positions)

    def _rotary(self, positions: Tensor) -> Rotary:
        assert self.config.head_dim is not None
        return reference.rotary_table(positions, self.config.head_dim, self.config.rope_theta)

    def _document_mask(self, input_ids: Tensor, cache: KVCache | None, x: Tensor) -> Mask:
        """The mask that keeps attention within documents, of which padding is one more; None where
        there is neither.
        """
        padding = None if cache is None else cache.padding
        if self.config.document_start_id is None and padding is None:
            return None
        kind, backend = x.device.type, self.execution.attention
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        begins = torch.zeros_like(input_ids)
        if self.config.document_start_id is not None:
            begins = (input_ids == self.config.document_start_id).long()
        if padding is not None and backend in ("flash", "flash_attn"):
            raise ValueError(f"attention: {backend} takes no mask, which padded rows need")
        if cache is not None:
            return document_mask(*cache.numbered(begins), backend, dtype)
        queries = begins.cumsum(dim=1)  # (B, T)
        return document_mask(queries, queries, backend, dtype)


@torch.no_grad()
def init_weights(model: Transformer, seed: int, gather: Gather = lambda _: nullcontext()) -> None:
    """Sets every parameter of a model. σ = init_std, L = num_layers.

    | parameter                   | matched (default)          | authors               |
    |-----------------------------|----------------------------|-----------------------|
    | token, position embedding   | N(0, σ²)                   | N(0, 1)               |
    | dense weight (d_out, d_in)  | N(0, s²)                   | U(±1/√d_in)           |
    | A (r, d_in)                 | N(0, 1/d_in)               | U(±1/√d_in)           |
    | B (d_out, r)                | N(0, s² d_in/r)            | U(±1/√r)              |
    | output head (untied)        | N(0, σ²)                   | U(±1/√d)              |
    | biases                      | 0                          | U(±1/√fan_in)         |
    | norms                       | weight 1, bias 0           | weight 1, bias 0      |
    | B, with latent_norm         | N(0, s²)                   | U(±1/√r)              |
    | B, with latent_activation   | N(0, s² d_in/(c r))        | U(±1/√r)              |
    | with zero_init_outputs:     |                            |                       |
    | W or B of o_proj, down_proj | 0                          | 0                     |

    s = σ, but σ/√(2L) for o_proj and down_proj, the two outputs that each block adds to the
    residual stream (Radford et al. 2019, section 2.3). An entry of the product B·A then has
    variance r · (1/d_in) · (s² d_in/r) = s², that of the dense weight in its place, and the latent
    A x has the scale of x. "authors" is what the published LPA code does by leaving torch's
    defaults: its product has variance 1/(9 d_in), a third of the dense 1/(3 d_in), so rank and
    initial scale change together there.

    With latent_norm an entry of what enters B has the mean square d_in/r, whatever x, so the output
    has the variance r · s² · d_in/r = s² d_in: that of the dense weight, or of B·A, for an x of
    unit scale: q, k, v, gate and up, which alone have the norm, have such an x (family llama).
    Under "authors" the norm multiplies
    the variance of an output, for an x of unit scale, by 3 d_in/r.

    c = E[silu(z)²] = 0.35578 for z of N(0, 1): an output has the variance that it has without the
    activation, again for an x of unit scale.

    A tensor is drawn on the CPU from a generator seeded by (seed, name), so the values depend on
    nothing else. `gather(parameter)` must yield with the whole parameter writable (ZeRO stage 3).
    """
    for name, parameter in model.named_parameters():  # a tied head comes once, as the embedding
        with gather(parameter):
            if parameter.numel():  # an empty one is a shard whose whole is written on another rank
                parameter.copy_(initial_value(model, name, parameter.shape, seed))


def initial_value(model: Transformer, name: str, shape: torch.Size, seed: int) -> Tensor:
    """What init_weights gives the parameter `name`, whole, fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    config, (owner, _, leaf) = model.config, name.rpartition(".")
    module = model.get_submodule(owner)
    value = torch.empty(shape)
    if isinstance(module, RMSNorm | nn.LayerNorm):
        return value.fill_(1.0 if leaf == "weight" else 0.0)
    output = owner.endswith((".o_proj", ".down_proj"))
    if config.zero_init_outputs and output and leaf in ("weight", "B"):
        return value.zero_()
    if config.init == "authors":
        if isinstance(module, nn.Embedding):
            return value.normal_(0, 1, generator=generator)
        bound = 1 / math.sqrt(_fan_in(module, leaf))
        return value.uniform_(-bound, bound, generator=generator)
    if "bias" in leaf:
        return value.zero_()
    std = config.init_std
    if output:
        std /= math.sqrt(2 * config.num_layers)
    if leaf == "A":
        std = 1 / math.sqrt(shape[1])
    elif leaf == "B" and module.latent_norm is None:
        std *= math.sqrt(_fan_in(module, "A") / shape[1])
        if module.latent_silu:
            std /= math.sqrt(SILU_MEAN_SQUARE)
    return value.normal_(0, std, generator=generator)


def _fan_in(module: nn.Module, leaf: str) -> int:
    """Inputs of the matrix that a parameter is, or is the bias of."""
    if isinstance(module, LowDim):
        return module.d_in if leaf in ("A", "bias_A") else module.rank
    assert isinstance(module, nn.Linear)
    return module.in_features
