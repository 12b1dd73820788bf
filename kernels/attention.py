"""Scaled dot-product attention and its backends.

- auto: torch's scaled_dot_product_attention; on a GPU cuDNN first from Hopper on, else
  FlashAttention 2, then what else supports the call;
- cudnn, flash, efficient, math: that backend of torch, and no other;
- flex: torch's FlexAttention, which skips blocks that a document mask empties;
- flash_attn: the package of that name.

softmax(q kᵀ / √D + mask) v, causal: query i of T sees keys up to i + S - T of S.
"""

import functools
import importlib.util
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Backend = Literal["auto", "cudnn", "flash", "efficient", "math", "flex", "flash_attn"]
# (B, 1, T, S), 0 where a query sees a key, else -inf; for flex a BlockMask; None: causal
Mask = Any

_SINGLE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def check_backend(
    backend: Backend,
    device: torch.device,
    dtype: torch.dtype,
    masked: bool,
    training: bool,
    grouped: bool = False,
) -> str:
    """What computes attention, in words for the log; ValueError where it cannot be had.

    masked: with a document mask. training: with a backward pass. grouped: with fewer key and value
    heads than query heads.
    """
    cuda = device.type == "cuda"
    if backend in ("cudnn", "efficient", "flash_attn") and not cuda:
        raise ValueError(f"attention: {backend} needs a GPU; the device is {device}")
    if backend == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError(
            "attention: flash_attn is not installed (requirements-cuda.txt has it); auto needs none"
        )
    halves = ("flash_attn", "cudnn", "flash") if cuda else ()
    if backend in halves and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention: {backend} computes in bf16 or fp16, not {dtype}")
    if backend == "efficient" and grouped:
        raise ValueError("attention: efficient has no grouped key and value heads; use auto")
    if masked and backend in ("flash", "flash_attn"):
        raise ValueError(
            f"attention: {backend} takes no document mask; allowed are auto, flex, math"
            + (", cudnn, efficient" if cuda else "")
        )
    if masked and backend == "flex":
        if training and not cuda:
            raise ValueError(f"attention: flex trains on a GPU alone; the device is {device}")
        return "FlexAttention"
    if backend == "flash_attn":
        return "flash_attn"
    names = [b.name.removesuffix("_ATTENTION").lower() for b in _order(backend, device)]
    line = f"torch SDPA ({', '.join(names) or 'its own choice'})"
    return line + ("; flex is for document masks" if backend == "flex" else "")


def _order(backend: Backend, device: torch.device) -> list[SDPBackend]:
    """The backends of torch that may compute a call, first choice first; empty: no say."""
    if backend in _SINGLE:
        return [_SINGLE[backend]]
    if backend != "auto" or device.type != "cuda":
        return []
    # cuDNN is 1.7 to 2.3 times as fast as FlashAttention 2 at training shapes on H100
    # (huggingface/transformers pull request 48163); torch asks it last.
    first, second = SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION
    if torch.cuda.get_device_capability(device)[0] >= 9:
        first, second = second, first
    return [first, second, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def _priority(order: list[SDPBackend]) -> Iterator[None]:
    with sdpa_kernel(order, set_priority=True):
        yield


def backend_context(backend: Backend, device: torch.device) -> AbstractContextManager[None]:
    """Within it, torch's attention uses the backend."""
    order = _order(backend, device)
    return _priority(order) if order else nullcontext()


@functools.cache
def _flex() -> tuple[Any, Any]:
    """FlexAttention and its mask builder, compiled on a GPU: uncompiled they hold T × T scores."""
    from torch.nn.attention import flex_attention as module

    if not torch.cuda.is_available():
        return module.flex_attention, module.create_block_mask
    compiled = torch.compile(module.flex_attention, dynamic=False)
    return compiled, torch.compile(module.create_block_mask, dynamic=False)


def document_mask(queries: Tensor, keys: Tensor, backend: Backend, dtype: torch.dtype) -> Mask:
    """The mask of causal attention within documents, to be added to scores in `dtype`.

    queries (B, T) and keys (B, S) number the document of each position; the queries are the last T
    of the S positions.
    """
    new, seen = queries.size(1), keys.size(1)
    if backend == "flex":

        def visible(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i + (seen - new) >= j) & (queries[b, i] == keys[b, j])

        make = _flex()[1]
        return make(visible, queries.size(0), None, new, seen, device=queries.device)
    causal = torch.ones(new, seen, dtype=torch.bool, device=queries.device).tril(seen - new)
    visible_to = causal & (queries[:, :, None] == keys[:, None, :])
    # Of bool, each layer would make such a mask of its own and keep it for its backward pass.
    mask = torch.zeros(visible_to.shape, dtype=dtype, device=queries.device)
    return mask.masked_fill_(~visible_to, float("-inf"))[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor, backend: Backend = "auto", mask: Mask = None) -> Tensor:
    """q (B, T, H, D), k and v (B, S, H_kv, D) with S >= T -> (B, T, H, D); the queries are the last
    T of S positions.
    """
    new, seen = q.size(1), k.size(1)
    if backend == "flash_attn":
        from flash_attn import flash_attn_func

        y: Tensor = flash_attn_func(q, k, v, causal=True)  # aligns the last query with the last key
        return y
    grouped = q.size(2) != k.size(2)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, T, D) views: no copy is made
    if backend == "flex" and mask is not None:
        flex = torch.nn.attention.flex_attention.flex_attention
        if not torch.compiler.is_compiling():
            flex = _flex()[0]
        return flex(q, k, v, block_mask=mask, enable_gqa=grouped).transpose(1, 2)
    causal = False
    if mask is None and new == seen:
        causal = True  # a branch, for torch.compile: with a cache the comparison is symbolic
    elif mask is None and new > 1:
        # A chunk behind a filled cache: is_causal would align it at the top left.
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    # A compiled block has chosen when it was traced, in the context of Transformer.forward. Here it
    # is for what runs outside of that: recomputation in the backward pass.
    compiling = torch.compiler.is_compiling()
    with nullcontext() if compiling else backend_context(backend, q.device):
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    return y.transpose(1, 2)


def attend_latents(q: Tensor, k: Tensor, h: Tensor, mask: Mask = None) -> Tensor:
    """softmax(q kᵀ / √D + mask) h: the weights of each head over latents that all heads share.

    q (B, T, H, D), k (B, S, H_kv, D), h (B, S, r) -> (B, T, H, r). A value v = B_v h is linear in
    h, so B_v may follow the sum over keys instead of going before it (DeepSeek-V2, 2024, section
    2.1.2). Holds the weights (B, H, T, S) in memory; mask as in `attend`, but none of flex.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise ValueError("attention: flex does not compute over a cache of latents; use auto")
    new, seen, wide = q.size(1), k.size(1), torch.promote_types(q.dtype, torch.float32)
    grouped = q.unflatten(2, (k.size(2), -1))  # (B, T, H_kv, G, D)
    scores = torch.einsum("btkgd,bskd->bkgts", grouped, k).to(wide) / math.sqrt(q.size(3))
    if mask is not None:
        scores = scores + mask[:, None]  # (B, 1, 1, T, S)
    elif new > 1:
        hidden = torch.ones(new, seen, dtype=torch.bool, device=q.device).triu(seen - new + 1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = scores.softmax(dim=-1).to(h.dtype).flatten(1, 3)  # (B, H · T, S)
    return (weights @ h).unflatten(1, (q.size(2), new)).transpose(1, 2)
