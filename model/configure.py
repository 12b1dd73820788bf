"""Makes a model run as an Execution says."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kernels.attention import check_backend
from kernels.verify import verify
from model.cache import CacheForm
from model.execution import Execution, Plan, plan
from model.norm import RMSNorm
from model.projection import LowDim, watched
from model.transformer import Block, Transformer


def configure(
    model: Transformer,
    execution: Execution,
    device: torch.device,
    dtype: torch.dtype,
    training: bool = True,
) -> Plan:
    """Switches kernels, attention, recomputation, loss and compilation of a model on `device`.

    dtype: what it computes in. Triton kernels are run once on the device against their definitions
    first; where they are wrong, "auto" falls back to plain torch and "triton" is an error. Returns
    what was chosen. ValueError where the execution cannot be had.
    """
    chosen = plan(model.config, execution, device, dtype, training)
    if chosen.fused:
        chosen = _verified(model, execution, chosen, device, dtype)
    model.execution = execution
    for module in model.modules():
        if isinstance(module, Block):
            module.fused = chosen.fused
            module.recompute_qkv = execution.recompute_qkv and not execution.recompute_blocks
            module.recompute_ffn = execution.recompute_ffn and not execution.recompute_blocks
            module.attention.backend = execution.attention
        elif isinstance(module, LowDim):
            module.fused = chosen.fused
    head = model.lm_head
    head.loss, head.chunk_tokens = execution.loss, execution.loss_chunk_tokens
    # On a CPU Inductor's softmax over the vocabulary is slower than torch's own.
    head.compiled = chosen.compiled and training and device.type == "cuda"
    for module in (*model.layers, model.final_norm):
        vars(module).pop("forward", None)  # of a configure before
        if chosen.compiled and isinstance(module, Block | RMSNorm):
            vars(module)["forward"] = types.MethodType(_forward, module)
    return chosen


def require_masks(model: Transformer, form: CacheForm) -> None:
    """ValueError where the attention of a configured model takes no mask over a form of the cache,
    as rows of unequal lengths need one, and documents.
    """
    config, weight, backend = model.config, model.lm_head.weight, model.execution.attention
    grouped = config.num_kv_heads != config.num_heads
    check_backend(backend, weight.device, weight.dtype, True, False, grouped)
    if backend == "flex" and form != "full":
        raise ValueError(
            "attention: flex takes no mask over a cache of latents; allowed are auto, math"
        )


@functools.cache
def _compiled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One compiled function for all modules of a class: they differ in their parameters alone,
    which are inputs of the graph. Hooks of a module, such as those of ZeRO stage 3, stay outside of
    it.
    """
    # Training, validation, other batches and decoding each need a graph; the default of 8 would be
    # an error under fullgraph.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    function: Callable[..., Tensor] = torch.compile(forward, fullgraph=True)
    return function


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """forward of the module's class, compiled unless somebody watches a module inside: a graph that
    is compiled already does not see hooks that come later.
    """
    inside = any(watched(one) for one in module.modules() if one is not module)
    forward: Callable[..., Tensor] = type(module).forward
    return (forward if inside else _compiled(forward))(module, *args, **kwargs)


def _verified(
    model: Transformer, execution: Execution, chosen: Plan, device: torch.device, dtype: torch.dtype
) -> Plan:
    """The plan, or one without the fused operators where they are wrong on this device."""
    shapes = model.config.attention_projections()
    assert model.config.head_dim is not None
    failure = verify(
        d=model.config.hidden_size,
        widths=[shapes[f"{name}_proj"].d_out for name in "qkv"],
        ranks=[shapes[f"{name}_proj"].rank for name in "qkv"],
        head_dim=model.config.head_dim,
        device=device,
        dtype=dtype,
    )
    if not failure:
        return chosen
    if execution.kernels == "triton":
        raise ValueError(f"execution.kernels: triton, but on {device} {failure}")
    lines = [f"kernels: plain torch; the fused operators failed their check: {failure}"]
    rest = [line for line in chosen.lines if not line.startswith("kernels:")]
    return Plan(False, chosen.compiled, lines + rest)
