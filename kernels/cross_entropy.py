"""The loss of the language-model head without the logits of a whole batch.

The logits of N tokens over a vocabulary of V are by far the largest tensor of a training step:
16384 tokens of 32000 make 2 GiB in float32, and their gradient as much again. Three methods:

  whole    the definition: cross-entropy of the linear layer, all logits at once
  chunked  plain torch, a chunk of tokens at a time
  liger    the Triton kernel of liger-kernel, on CUDA

d is the width, N the number of tokens, n those of one chunk. Losses and softmax are in float32
(float64 for float64 input), matrix products in the dtype of the input.

Source of the idea that the gradient is made in the forward pass, chunk by chunk, while the logits
are at hand: Liger Kernel (Hsu et al. 2024, FusedLinearCrossEntropy).
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # a target that counts neither in the loss nor in the mean
METHODS = ("whole", "chunked", "liger")
REDUCTIONS = ("mean", "none")
LIGER = "liger-kernel==0.8.5"

# 256 MiB of float32 logits, 2048 tokens of a vocabulary of 32k. Smaller chunks cost time: for each
# entry of the weight a chunk computes 6 n FLOPs and moves 12 bytes to add up the gradient. Where a
# GPU does 300 FLOPs in the time of a byte (H100, bfloat16), that takes n well over 600.
CHUNK_LOGITS = 2**26

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of x, weight and bias
Rows = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    reduction: str = "mean",
    method: str = "chunked",
    chunk_tokens: int | None = None,
    compile: bool = False,
) -> Tensor:
    """Cross-entropy of the targets under the logits x weightᵀ + bias, in nats.

    x (N, d), weight (V, d), targets (N,) int64 with -100 = ignored, bias (V,). "mean" -> () over
    the targets that are not ignored, nan with zero gradients where there are none; "none" -> (N,),
    0 where ignored. The result is float32 (float64 for float64 input). Under autocast x, weight and
    bias are first cast to its dtype.

    "chunked" holds at most chunk_tokens rows of logits (None: CHUNK_LOGITS entries). For "mean" the
    gradients are made in the forward pass and stand by for the backward pass, N d + V d numbers;
    for "none" the logits are computed again. compile runs the elementwise part through
    torch.compile. Both settings are for "chunked" alone. No method but "liger" waits for the
    device. "liger" waits twice, and for "mean" its gradients are wrong in a second backward pass
    through the same graph, since the first one scales them in place.

    ValueError for shapes, dtypes, devices and settings outside of these, and for "liger" where it
    cannot run.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight = _autocast(x, dtype), _autocast(weight, dtype)
        bias = None if bias is None else _autocast(bias, dtype)
    _check(x, weight, targets, bias, reduction, method, chunk_tokens)
    with _no_autocast(device):
        if method == "whole":
            return _whole(x, weight, targets, bias, reduction)
        if method == "liger":
            return _liger(x, weight, targets, bias, reduction)
        tokens = chunk_tokens or max(1, CHUNK_LOGITS // weight.size(0))
        return _chunked(x, weight, targets, bias, reduction, tokens, compile)


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does it: float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Also for devices that have none, such as meta."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    reduction: str,
    method: str,
    chunk_tokens: int | None,
) -> None:
    """ValueError that names the argument, what came and what is allowed."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: {reduction!r}, allowed are {', '.join(REDUCTIONS)}")
    if method not in METHODS:
        raise ValueError(f"method: {method!r}, allowed are {', '.join(METHODS)}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens: {chunk_tokens}, allowed are None and 1 or more")
    if x.dim() != 2:
        raise ValueError(f"x: shape {tuple(x.shape)}, allowed is (N, d)")
    if not x.is_floating_point():
        raise ValueError(f"x: {x.dtype}, allowed are floating dtypes")
    if weight.dim() != 2 or weight.size(1) != x.size(1):
        raise ValueError(f"weight: shape {tuple(weight.shape)}, allowed is (V, {x.size(1)})")
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets: shape {tuple(targets.shape)}, allowed is ({x.size(0)},)")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets: {targets.dtype}, allowed is torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: shape {tuple(bias.shape)}, allowed is ({weight.size(0)},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ValueError(f"{name}: {tensor.dtype}, allowed is that of x, {x.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("targets", targets)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, allowed is where x is, {x.device}")


def _precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of losses and sums."""
    return torch.promote_types(dtype, torch.float32)


def _whole(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, reduction: str
) -> Tensor:
    logits = F.linear(x, weight, bias).to(_precise(x.dtype))  # (N, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction=reduction)


# A break in the graph of a compiled caller: traced, the loop would be unrolled chunk by chunk.
@torch.compiler.disable
def _chunked(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    reduction: str,
    tokens: int,
    compile: bool,
) -> Tensor:
    rows = _compiled_rows() if compile else _rows
    inputs = (x, weight) if bias is None else (x, weight, bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        function = _Mean if reduction == "mean" else _Each
        return function.apply(x, weight, bias, targets, tokens, rows)
    with torch.no_grad():
        losses, _ = _sweep(x, weight, bias, targets, tokens, rows)
        return losses if reduction == "none" else losses.sum() / (targets != IGNORED).sum()


def _rows(logits: Tensor, targets: Tensor, scale: Tensor | None) -> Tensor:
    """The losses of one chunk; overwrites the logits, by their gradient where scale is given.

    logits (n, V) in float32 or float64, targets (n,), scale (n,): the gradient of each loss, 0
    where the target is ignored -> (n,). The gradient is scale · (softmax(logits) - onehot(target)).
    """
    valid = targets != IGNORED
    # Only -100 becomes a class that exists: gather must go on to refuse any other negative target.
    index = torch.where(valid, targets, 0)[:, None]  # (n, 1)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    target_logits = logits.gather(1, index)
    total = logits.exp_().sum(dim=1, keepdim=True)
    losses = torch.where(valid, (total.log() - target_logits)[:, 0], 0.0)
    if scale is not None:
        logits.mul_(scale[:, None] / total)
        logits.scatter_add_(1, index, -scale[:, None])
    return losses


@functools.cache
def _compiled_rows() -> Rows:
    return torch.compile(_rows, fullgraph=True, dynamic=True)


def _sweep(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    tokens: int,
    rows: Rows,
    scale: Tensor | None = None,
    wanted: tuple[bool, ...] = (False, False, False),
) -> tuple[Tensor, Gradients]:
    """Losses (N,) and the gradients of sum(scale · losses), of x in its dtype, of weight and bias
    in float32, chunk by chunk; None for a gradient that is not wanted.
    """
    precise = _precise(x.dtype)
    losses = torch.empty(x.size(0), dtype=precise, device=x.device)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted[0] else None
    d_weight, d_bias = (
        torch.zeros(tensor.shape, dtype=precise, device=x.device)
        if want and tensor is not None
        else None
        for tensor, want in ((weight, wanted[1]), (bias, wanted[2]))
    )
    for start in range(0, x.size(0), tokens):
        at = slice(start, start + tokens)
        # The names are bound anew before the old tensors are freed: hence `del`, or two chunks of
        # logits would be alive at once.
        logits = F.linear(x[at], weight, bias).to(precise)  # (n, V)
        losses[at] = rows(logits, targets[at], None if scale is None else scale[at])
        if d_bias is not None:
            d_bias += logits.sum(dim=0)
        d_logits = logits.to(x.dtype)
        del logits
        if d_x is not None:
            torch.mm(d_logits, weight, out=d_x[at])
        if d_weight is not None:
            _add_product(d_weight, d_logits.T, x[at])
        del d_logits
    return losses, (d_x, d_weight, d_bias)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (V, d) += a (V, n) b (n, d), in total's dtype from one chunk to the next."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    # float16 ends at 65504, which n tokens of one class pass where |b| is 65504 / n. Divided by
    # n / 64 before the product is rounded, only |b| over 1023 can.
    shrink = max(1.0, a.size(1) / 64) if a.dtype == torch.float16 else 1.0
    product = torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=1 / shrink)
    total.add_(product, alpha=shrink)


def _scaled(tensor: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """tensor · scale (), rounded once, to dtype.

    A new tensor: the saved one serves a second backward pass. The scale has one dimension, since
    without any it would be rounded to the tensor's dtype first.
    """
    if tensor is None:
        return None
    return torch.mul(tensor, scale.view(1), out=torch.empty_like(tensor, dtype=dtype))


class _Mean(torch.autograd.Function):
    """Mean over the targets that are not ignored; gradients in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tokens: int,
        rows: Rows,
    ) -> Tensor:
        valid = targets != IGNORED
        wanted = ctx.needs_input_grad[:3]
        # The gradient of the sum; the division by the count waits for the backward pass. Divided
        # here, (softmax - onehot) / count would fall below the range of float16, where the scale
        # of a gradient scaler comes too late.
        scale = valid.to(_precise(x.dtype))
        losses, gradients = _sweep(x, weight, bias, targets, tokens, rows, scale, wanted)
        count = valid.sum()
        ctx.save_for_backward(count.clamp(min=1), *gradients)
        ctx.dtype = x.dtype
        return losses.sum() / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count, *gradients = ctx.saved_tensors
        return *(_scaled(g, grad / count, ctx.dtype) for g in gradients), None, None, None


class _Each(torch.autograd.Function):
    """The loss of each target; the logits are computed again in the backward pass, since the sum
    over tokens in the gradient of the weight needs each token's incoming gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        tokens: int,
        rows: Rows,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, targets)
        ctx.tokens, ctx.rows = tokens, rows
        return _sweep(x, weight, bias, targets, tokens, rows)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, targets = ctx.saved_tensors
        scale = torch.where(targets != IGNORED, grad, 0.0)
        wanted = ctx.needs_input_grad[:3]
        # The backward pass may be called under an autocast that the forward pass has not seen.
        with _no_autocast(x.device.type):
            _, gradients = _sweep(x, weight, bias, targets, ctx.tokens, ctx.rows, scale, wanted)
        return *(None if g is None else g.to(x.dtype) for g in gradients), None, None, None


@torch.compiler.disable
def _liger(
    x: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, reduction: str
) -> Tensor:
    """liger-kernel's function, made to do what the definition does where it does not."""
    try:
        import triton
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise ValueError(f"method: 'liger' needs `pip install {LIGER}` ({error})") from error
    if not (x.is_cuda or triton.knobs.runtime.interpret):  # Triton's interpreter runs on the CPU
        raise ValueError(f"method: 'liger' with x on {x.device}, allowed is a CUDA device")
    if x.dtype == torch.float64:
        raise ValueError("method: 'liger' with torch.float64, allowed are 32 and 16 bits")
    if x.size(0) == 0:  # it divides by the number of chunks
        return _whole(x, weight, targets, bias, reduction)
    wanted = [t.requires_grad for t in (x, weight, bias) if t is not None]
    if not torch.is_grad_enabled():
        # It looks at requires_grad alone and would compute gradients for nothing.
        x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
    elif any(wanted) and not wanted[0]:
        x = x.detach().requires_grad_()  # without, it leaves the weight without a gradient
    loss = liger_fused_linear_cross_entropy(
        x, weight, targets, bias, reduction=reduction, accum_dtype=torch.float32
    )
    if reduction == "mean":  # it gives 0 where every target is ignored
        loss = torch.where((targets != IGNORED).any(), loss, torch.nan)
    return loss
