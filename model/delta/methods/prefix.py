"""Prefix tuning (Li & Liang 2021): trained keys and values before those of the sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from model.delta.base import Delta, DeltaConfig, DeltaLayer, register
from model.delta.target import Target, as_target


@register
@dataclass
class PrefixConfig(DeltaConfig):
    """Prefix tuning: P keys and values per layer, which each query sees beside the sequence's own
    (Li & Liang 2021, section 4.2). They have no positions: rotary ones are not applied to them, and
    the sequence's begin where they did.

    Targets are attention modules that call torch's scaled_dot_product_attention: ours, and those of
    transformers with attn_implementation="sdpa". There is no start that adds nothing: a query gives
    weight to every key, so a new prefix changes what the backbone computes.

    Under torch.compile of a whole model of ours Dynamo breaks its graph inside attention; Inductor
    and aot_eager compute the same then, but the debugging backend "eager" adds the prefix twice.

    Attributes:
        prefix_tokens: P.
        reparameterize: Make keys and values of an embedding (P, embed_dim), by a network tanh(W₁ e)
            which all layers share and a matrix of each layer (section 4.3); else train themselves.
        embed_dim: Width of the embedding.
        mid_dim: Width of the network inside.
        init_std: Deviation of keys and values at first, without the network.
        num_kv_heads: Heads of keys and values; null: read from the module.
        head_dim: Width of a head; null: read from the module.
    """

    method: ClassVar[str] = "prefix"
    needs_matrix: ClassVar[bool] = False

    targets: list[str] = field(default_factory=lambda: [r"re:.*\.(attention|self_attn|attn)"])
    prefix_tokens: int = 6
    reparameterize: bool = True
    embed_dim: int = 512
    mid_dim: int = 512
    init_std: float = 0.02
    num_kv_heads: int | None = None
    head_dim: int | None = None

    def __post_init__(self) -> None:
        for name in ("prefix_tokens", "embed_dim", "mid_dim"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("init_std", self.init_std >= 0, "at least 0")
        for name in ("num_kv_heads", "head_dim"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1, or null")

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> Delta:
        """New prefixes. ValueError where a target's heads cannot be read."""
        return PrefixDelta(self, targets, self._maker())

    def _maker(self) -> Callable[[Target], DeltaLayer]:
        if not self.reparameterize:
            tokens, std = self.prefix_tokens, self.init_std
            return lambda target: OwnPrefixLayer(tokens, *self._heads(target), std)
        embedding = nn.Parameter(torch.randn(self.prefix_tokens, self.embed_dim))
        first = nn.Linear(self.embed_dim, self.mid_dim)
        return lambda target: NetworkPrefixLayer(embedding, first, *self._heads(target))

    def _heads(self, target: Target) -> tuple[int, int]:
        """Heads of keys and values of an attention module, and their width."""
        module = target.module
        width = self.head_dim or getattr(module, "head_dim", None)
        heads = self.num_kv_heads
        keys = getattr(module, "k_proj", None)
        if heads is None and width and isinstance(keys, nn.Module):
            heads = (as_target("k_proj", keys).d_out or 0) // width
        for name in ("num_key_value_heads", "num_kv_heads", "num_heads"):
            heads = heads or getattr(module, name, None)
        if not heads or not width:
            raise ValueError(
                f"targets: {target.name} is a {type(module).__name__}, whose heads of keys and "
                "values cannot be read; give num_kv_heads and head_dim, of attention modules"
            )
        return heads, width


class PrefixLayer(DeltaLayer):
    """A target's prefix."""

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (H_kv, P, D) each."""
        raise NotImplementedError

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y: what the prefix changes is inside the target."""
        return y


class OwnPrefixLayer(PrefixLayer):
    """Keys and values are parameters. keys, values (H_kv, P, D)."""

    def __init__(self, tokens: int, heads: int, width: int, std: float) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(heads, tokens, width) * std)
        self.values = nn.Parameter(torch.randn(heads, tokens, width) * std)

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (H_kv, P, D) each."""
        return self.keys, self.values


class NetworkPrefixLayer(PrefixLayer):
    """Keys and values are W₂ tanh(W₁ e) of an embedding e (P, embed_dim), with biases. Embedding
    and W₁ are those of all targets, W₂ (2 · H_kv · D, mid_dim) is the target's own.
    """

    def __init__(self, embedding: nn.Parameter, first: nn.Linear, heads: int, width: int) -> None:
        super().__init__()
        self.embedding, self.first = embedding, first
        self.second = nn.Linear(first.out_features, 2 * heads * width)
        self.heads = heads

    def prefix(self) -> tuple[Tensor, Tensor]:
        """Keys and values, (H_kv, P, D) each."""
        both = self.second(torch.tanh(self.first(self.embedding)))  # (P, 2 · H_kv · D)
        k, v = both.unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        return k, v


class PrefixDelta(Delta):
    """Prefixes, which act inside their targets."""

    def hooks(self, owner: Any, name: str) -> list[RemovableHandle]:
        """Hooks that put a prefix into the attention that a target computes, while it runs."""
        modules = dict(owner.backbone.named_modules())
        handles = []
        for path, layer in self.named_layers():
            assert isinstance(layer, PrefixLayer)
            run = _Run(owner, name, path, layer)
            handles.append(modules[path].register_forward_pre_hook(run.enter))
            handles.append(modules[path].register_forward_hook(run.leave, always_call=True))
        return handles


class _Run:
    """The hooks of one target."""

    def __init__(self, owner: Any, name: str, path: str, layer: PrefixLayer) -> None:
        self.owner, self.name, self.path, self.layer = owner, name, path, layer
        self.entered: list[_Prepend] = []

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before the target: from here on its attention has the prefix, where it acts."""
        acting = dict(self.owner.acting())
        if self.name in acting:
            mode = _Prepend(self.path, self.layer.prefix(), acting[self.name])
            mode.__enter__()
            self.entered.append(mode)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind it, also after an error. ValueError where its attention was none of torch's."""
        if not self.entered:
            return
        mode = self.entered.pop()
        mode.__exit__(None, None, None)
        if not mode.calls and output is not None:  # it is after an error, which says more
            raise ValueError(
                f"{self.path}: it did not call torch's scaled_dot_product_attention, where the "
                f"prefix {self.name} acts. Attention by flex, flash_attn or eager cannot have one: "
                'use execution.attention "auto", or attn_implementation="sdpa" of transformers'
            )


class _Prepend(TorchFunctionMode):
    """Within it, torch's scaled_dot_product_attention has a prefix, on some rows or (None) all."""

    def __init__(self, path: str, prefix: tuple[Tensor, Tensor], rows: Tensor | None) -> None:
        super().__init__()
        self.path, self.prefix, self.rows = path, prefix, rows
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        """query (B, H, T, D), key and value (B, H_kv or H, S, D) -> (B, H, T, D)."""
        k, v = (_before(self.path, *pair) for pair in zip(self.prefix, (key, value), strict=True))
        added, length = k.size(2) - key.size(2), query.size(2)
        if is_causal and self.rows is None and length == key.size(2):
            # Queries for the prefix too, whose outputs are dropped, keep the call causal: torch's
            # fused kernels take no mask, and a query sees the prefix and what is before it.
            query = torch.cat([query.new_zeros(*query.shape[:2], added, query.size(3)), query], 2)
            y = F.scaled_dot_product_attention(
                query, k, v, dropout_p=dropout_p, is_causal=True, **more
            )
            return y[:, :, added:]
        mask = self._mask(attn_mask, is_causal, query, key, added)
        return F.scaled_dot_product_attention(
            query, k, v, attn_mask=mask, dropout_p=dropout_p, **more
        )

    def _mask(
        self, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor, added: int
    ) -> Tensor | None:
        """A call's mask (…, T, S) with `added` columns for the prefix before it."""
        if mask is None and not causal and self.rows is None:
            return None
        shape = query.size(2), key.size(2)
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=query.device)
            mask = mask.tril() if causal else mask
        if self.rows is None:
            return F.pad(mask, (added, 0), value=True if mask.dtype == torch.bool else 0.0)
        if query.size(0) <= int(self.rows.max()):
            raise ValueError(
                f"{self.path}: {query.size(0)} rows in the batch, and rows() was given more"
            )
        seen = torch.zeros(query.size(0), 1, 1, added, dtype=torch.bool)
        seen[self.rows] = True
        seen = seen.to(query.device)
        if mask.dtype != torch.bool:
            seen = mask.new_zeros(seen.shape).masked_fill_(~seen, float("-inf"))
        mask = mask.view(*(1,) * (4 - mask.dim()), *mask.shape)
        size = torch.broadcast_shapes(mask.shape[:3], (query.size(0), 1, 1))
        return torch.cat([seen.expand(*size, -1), mask.expand(*size, -1)], dim=3)


def _before(path: str, prefix: Tensor, own: Tensor) -> Tensor:
    """A prefix (H_kv, P, D) before the keys or values (B, H_kv or H, S, D) of a sequence."""
    heads, width = prefix.size(0), prefix.size(2)
    if own.dim() != 4 or own.size(1) % heads or own.size(3) != width:
        raise ValueError(
            f"{path}: keys or values are {tuple(own.shape)}, and the prefix has {heads} heads, "
            f"{width} wide; give num_kv_heads and head_dim"
        )
    # transformers repeats the heads of keys where it passes a mask.
    prefix = prefix.repeat_interleave(own.size(1) // heads, dim=0).to(own.dtype)
    return torch.cat([prefix.expand(own.size(0), *prefix.shape), own], dim=2)
