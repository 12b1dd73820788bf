"""How a model is computed. Nothing here changes what it computes, but for rounding."""

from dataclasses import dataclass
from typing import Literal

import torch

from kernels import dispatch
from kernels.attention import Backend, check_backend
from kernels.cross_entropy import CHUNK_LOGITS
from kernels.triton import configs
from model.config import ModelConfig


@dataclass
class Execution:
    """How a model is computed: kernels, attention, compilation, what is recomputed, the loss.

    Attributes:
        kernels: "auto" (the fused operators where Triton computes all of them, else plain torch),
            "reference" (plain torch) or "triton" (the fused operators; what has no Triton kernel,
            as on the CPU, is computed inside of them by its definition, and the log says so).
        attention: "auto" (torch's scaled_dot_product_attention; on a GPU cuDNN first from Hopper
            on, else FlashAttention 2), one of its backends ("cudnn", "flash", "efficient", "math"),
            "flex" (FlexAttention, for document masks) or "flash_attn" (the package).
        compile: Compile the blocks with torch.compile: "auto" (on a GPU, for training), "on" or
            "off".
        recompute_qkv: Keep the latents and the attention's output for the backward pass, and
            rebuild q, k and v: less memory for an extra up-projection (vanilla: the dense one).
        recompute_ffn: Keep gate and up for the backward pass, and rebuild the feed-forward
            network's norm and product.
        recompute_blocks: Keep only the input of each block: least memory, each forward pass twice.
        recompute_every: With recompute_blocks, recompute every n-th block, beginning with the
            first; the others keep what they compute.
        loss: "chunked" (never the logits of a whole batch), "whole" or "liger" (liger-kernel's, on
            a GPU).
        loss_chunk_tokens: Tokens of a chunk; null: as many as have 2^26 logits.
    """

    kernels: Literal["auto", "reference", "triton"] = "auto"
    attention: Backend = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    recompute_qkv: bool = False
    recompute_ffn: bool = False
    recompute_blocks: bool = False
    recompute_every: int = 1
    loss: Literal["chunked", "whole", "liger"] = "chunked"
    loss_chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("recompute_every", "loss_chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"execution.{name}: {value}; it must be at least 1")

    def recomputes(self, index: int) -> bool:
        """Whether all of block `index` is recomputed."""
        return self.recompute_blocks and index % self.recompute_every == 0

    def chunk_tokens(self, vocab_size: int) -> int:
        """Tokens whose logits exist at once."""
        return self.loss_chunk_tokens or max(1, CHUNK_LOGITS // vocab_size)

    def warnings(self, training: bool = True) -> list[str]:
        """Settings that have no effect."""
        found = []
        recomputed = self.recompute_qkv or self.recompute_ffn or self.recompute_blocks
        if recomputed and not training:
            found.append("execution.recompute_* has no effect without a backward pass")
        elif self.recompute_blocks and (self.recompute_qkv or self.recompute_ffn):
            found.append(
                "execution.recompute_qkv and recompute_ffn have no effect with recompute_blocks"
            )
        if self.recompute_every > 1 and not self.recompute_blocks:
            found.append("execution.recompute_every has no effect without recompute_blocks")
        if self.loss_chunk_tokens is not None and self.loss != "chunked":
            found.append(f"execution.loss_chunk_tokens has no effect with loss {self.loss}")
        return found


@dataclass
class Plan:
    """What Execution comes to on a device.

    Attributes:
        fused: Whether blocks use the fused operators.
        compiled: Whether blocks are compiled.
        lines: What runs where, and why not elsewhere, for the log.
    """

    fused: bool
    compiled: bool
    lines: list[str]


def unfusible(config: ModelConfig) -> str:
    """Why a model has no fused layer; empty where it has one."""
    ranks = config.ranks
    if config.family != "llama":
        return f"family {config.family} has no fused layer"
    if config.qk_norm:
        return "qk_norm stands between the projections of q and k and their rotary positions"
    if config.latent_activation != "none":
        return f"{config.latent_activation} stands between the factors of a projection"
    if config.dropout:
        return "dropout stands between the output projection and the residual"
    dense = [name for name in "qkv" if getattr(ranks, name) is None]
    if dense and len(dense) < 3:
        return f"of q, k and v some are dense ({', '.join(dense)}) and some low-dimensional"
    return ""


def operations(config: ModelConfig) -> dict[str, tuple[str, int, int, int]]:
    """The kernels of a fused layer: what each is for -> (kernel, n, k, head_dim) as for
    dispatch.usable.
    """
    shapes, d = config.attention_projections(), config.hidden_size
    assert config.head_dim is not None
    q, k, v = (shapes[f"{name}_proj"] for name in "qkv")
    rows = {"norm": ("row_rstd", d, 0, 0)}
    unrotate = {"rotary backward": ("unrotate", config.head_dim, 0, config.head_dim)}
    if q.rank is None or k.rank is None or v.rank is None:
        return {
            **rows,
            "norm + q + rotary": ("project", q.d_out, d, config.head_dim),
            "norm + k + rotary": ("project", k.d_out, d, config.head_dim),
            "norm + v": ("project", v.d_out, d, 0),
            **unrotate,
            "norm backward": ("norm_backward", d, 0, 0),
        }
    latents = q.rank + k.rank + v.rank
    return {
        **rows,
        "norm + down": ("project", latents, d, 0),
        "q up + rotary": ("project", q.d_out, q.rank, config.head_dim),
        "k up + rotary": ("project", k.d_out, k.rank, config.head_dim),
        **unrotate,
        "latents backward": ("scale_and_dot", latents, 0, 0),
        "down backward + norm + residual": ("norm_backward_matmul", d, latents, 0),
    }


def fused_on(
    config: ModelConfig, execution: Execution, architecture: int, dtype: torch.dtype
) -> bool:
    """Whether blocks use the fused operators on an architecture that need not be at hand."""
    if execution.kernels == "reference" or unfusible(config):
        return False
    if execution.kernels == "triton":
        return True
    return not _untested(config, dtype) and all(
        dispatch.usable_on(kernel, architecture, dtype, n, k, head_dim)[0]
        for kernel, n, k, head_dim in operations(config).values()
    )


def plan(
    config: ModelConfig,
    execution: Execution,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = True,
) -> Plan:
    """What runs where. ValueError where the execution asks for what cannot be had."""
    fused, lines = _plan_kernels(config, execution, device, dtype)
    masked = config.document_start_id is not None
    try:
        grouped = config.num_kv_heads != config.num_heads
        backend = check_backend(execution.attention, device, dtype, masked, training, grouped)
        lines.append(f"attention: {backend}{', within documents' if masked else ''}")
    except ValueError as error:
        raise ValueError(f"execution.{error}") from None
    cuda = device.type == "cuda"
    compiled = execution.compile == "on" or (execution.compile == "auto" and cuda and training)
    why = {"on": "as asked for", "off": "as asked for"}.get(
        execution.compile, "the default on a GPU" if compiled else f"auto, on {device}"
    )
    lines.append(f"blocks: {'compiled' if compiled else 'not compiled'} ({why})")
    if execution.loss == "liger" and not cuda:
        raise ValueError(f"execution.loss: liger needs a GPU; the device is {device}")
    lines.append(f"loss: {execution.loss}; recomputed in backward: {_rebuilt(config, execution)}")
    return Plan(fused, compiled, lines)


def _rebuilt(config: ModelConfig, execution: Execution) -> str:
    if execution.recompute_blocks:
        count = sum(execution.recomputes(index) for index in range(config.num_layers))
        some = execution.recompute_every > 1
        return f"whole blocks, {count} of {config.num_layers}" if some else "whole blocks"
    math = " and attention, which math computes in pieces" if execution.attention == "math" else ""
    qkv = f"q, k, v{math}" if execution.recompute_qkv else ""
    ffn = "the FFN's norm and product" if execution.recompute_ffn else ""
    return "; ".join(filter(None, (qkv, ffn))) or "none"


def _untested(config: ModelConfig, dtype: torch.dtype) -> str:
    """Why "auto" leaves a model to plain torch on every GPU; empty where it need not."""
    if dtype == torch.float32:
        return "the kernels for float32 are exact, and slow: for checks"
    if dtype != torch.bfloat16:
        # rstd · dh underflows in float16 before it meets rows that are not normalised.
        return f"gradients of the fused form need bfloat16's range, not {dtype}"
    assert config.head_dim is not None
    ranks = config.ranks
    return configs.untested(config.hidden_size, (ranks.q, ranks.k, ranks.v), config.head_dim)


def _plan_kernels(
    config: ModelConfig, execution: Execution, device: torch.device, dtype: torch.dtype
) -> tuple[bool, list[str]]:
    """Whether the fused operators are used, and a line for the log on each."""
    if execution.kernels == "reference":
        return False, ["kernels: plain torch, as asked for"]
    reason = unfusible(config)
    if not reason and execution.kernels == "auto" and device.type == "cuda":
        reason = _untested(config, dtype)
    if reason:
        if execution.kernels == "triton":
            raise ValueError(f"execution.kernels: triton, but {reason}; use auto or reference")
        return False, [f"kernels: plain torch ({reason})"]
    usable = {
        what: dispatch.usable(kernel, device, dtype, n, k, head_dim)
        for what, (kernel, n, k, head_dim) in operations(config).items()
    }
    missing = {what: why for what, (found, why) in usable.items() if not found}
    if missing and execution.kernels == "auto":
        what, why = next(iter(missing.items()))
        return False, [f"kernels: plain torch (no Triton kernel for {what}: {why})"]
    by_triton = [what for what in usable if what not in missing]
    lines = [f"kernels: fused operators; Triton: {', '.join(by_triton)}"] if by_triton else []
    for why in sorted(set(missing.values())):
        names = ", ".join(what for what in missing if missing[what] == why)
        lines.append(f"kernels: fused operators; plain torch inside ({why}): {names}")
    return True, [
        *lines,
        "kernels: plain products by torch (cuBLAS on a GPU): o, v, FFN, gradients",
    ]
