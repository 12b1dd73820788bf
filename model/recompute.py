"""Selective recomputation: what the backward pass keeps of a sub-layer, and what it rebuilds.

docs/execution.md has the bytes of each; training/memory.py the formula.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Keep = Callable[..., CheckpointPolicy]

# Kept of an attention sub-layer: what is expensive (attention itself), or small (latents, rstd).
# low_dim's result is the residual stream, which the next norm keeps anyway.
_ATTENTION = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "lpa::row_rstd",
    "lpa::norm_down",
    "lpa::low_dim",
)


def keep_attention(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of recompute_qkv: q, k and v are rebuilt from the latents."""
    name = _name(op)
    kept = name in _ATTENTION or name.startswith("flash_attn::") or name == "flex_attention"
    if name == "aten::add":
        # The residual stream is kept by the next norm anyway; were it not said here, Inductor would
        # rebuild it, with the output projection before it. Rotary positions add 4 dimensions.
        kept = all(isinstance(t, Tensor) and t.dim() == 3 for t in args) and (
            args[0].shape == args[1].shape
        )
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def keep_products(width: int, _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy of recompute_ffn: of all that is computed only products `width` wide, gate and up,
    are kept; the norm and the product that enters the last projection are rebuilt.
    """
    weight = {"aten::mm": 1, "aten::addmm": 2, "lpa::low_dim": 2}.get(_name(op))
    if weight is None:
        return CheckpointPolicy.PREFER_RECOMPUTE
    columns = args[weight].size(0 if _name(op) == "lpa::low_dim" else 1)
    kept = columns == width
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _name(op: Any) -> str:
    """ "namespace::name" of an operator, without its overload; the name of a higher-order one."""
    schema = getattr(op, "_schema", None)
    return schema.name if schema is not None else op.name()


def recomputed(
    function: Callable[..., Tensor], *args: Any, keep: Keep | None = None, random: bool = False
) -> Tensor:
    """function(*args), of which the backward pass keeps the arguments and what `keep` says.

    random: the function draws random numbers (dropout), which must come again.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": random}
    if keep is not None:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, keep)
    y: Tensor = checkpoint(function, *args, **options)
    return y
