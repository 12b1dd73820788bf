"""Memory that a run needs per rank, by ZeRO stage and number of ranks, from formulas."""

from model.config import ModelConfig
from model.execution import Execution, fused_on
from training.config import RunConfig

STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 8, 64)


def state_bytes(run: RunConfig, stage: int, world_size: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer state on one rank.

    Per parameter, fp32: 4 weight + 4 gradient + 8 moments, and at stages 1 to 3 another 4 for the
    master copy that ZeRO keeps of its shard; bf16 at stages 1 to 3: 2 weight + 4 gradient (summed
    in fp32) + 12 master and moments; bf16 at stage 0 autocasts fp32 weights. What a stage shards is
    divided by the ranks (Rajbhandari et al. 2020, figure 1).
    """
    count = run.model.num_parameters()
    bf16 = run.training.precision == "bf16" and stage > 0
    optimizer = count * (8 if stage == 0 else 12)
    parts = {"weights": count * (2 if bf16 else 4), "gradients": count * 4, "optimizer": optimizer}
    sharded_from = {"optimizer": 1, "gradients": 2, "weights": 3}
    return {
        name: -(-size // world_size) if stage >= sharded_from[name] else size
        for name, size in parts.items()
    }


def activation_bytes(
    model: ModelConfig,
    tokens: int,
    element: int,
    autocast: bool = False,
    execution: Execution | None = None,
    fused: bool = False,
    compiled: bool = False,
) -> int:
    """Bytes that the forward pass of `tokens` tokens keeps for the backward pass, without logits,
    and with recomputation the layer that the backward pass has rebuilt at the time.

    Per token and layer, in elements: both norms' inputs and outputs 4d; q and the attention's
    output 2·H·D, k and v 2·H_kv·D, the softmax statistics H (fp32); the latents of low-dimensional
    projections r each; the feed-forward network 4f (SwiGLU: gate, up, silu(gate), their product) or
    f (ReLU). Dropout adds a byte an element twice. Outside: the final norm's input and output 2d.
    Autocast keeps the norms' inputs in fp32 and a cast copy for each projection that reads the
    residual stream, instead of the first 4d. Of this
    - the fused operators leave out the output of the attention's norm, d, and add its rstd (fp32);
    - recompute_qkv leaves out that output too, q, k and v, and unfused the latents of attention;
    - recompute_ffn leaves out the output of the other norm and all of the network but gate and up
      (ReLU: the product before it, which is all there is) and the latents of fused projections;
    - recompute_blocks keeps the block's input, d, alone, in each block that recompute_every takes.
    Compiled blocks keep 3f of SwiGLU: Inductor rebuilds silu(gate). What qk_norm and latent_norm
    add is in _inner_norms.
    """
    execution = execution or Execution()
    full = layer_bytes(model, element, autocast, Execution(), fused, compiled)
    kept = layer_bytes(model, element, autocast, execution, fused, compiled)
    blocks = [
        full if execution.recompute_blocks and not execution.recomputes(index) else kept
        for index in range(model.num_layers)
    ]
    # Where the last block keeps everything, it is gone before another one is rebuilt.
    rebuilt = full - blocks[-1]
    d = model.hidden_size
    final = d * (4 + element) if autocast else 2 * d * element
    return tokens * (sum(blocks) + rebuilt + final)


def layer_bytes(
    model: ModelConfig,
    element: int,
    autocast: bool,
    execution: Execution,
    fused: bool,
    compiled: bool = False,
) -> int:
    """Bytes that one block keeps per token (with recompute_blocks one that is recomputed); see
    activation_bytes.
    """
    assert model.head_dim is not None
    assert model.num_kv_heads is not None
    d, f = model.hidden_size, model.intermediate_size
    stream = 4 if autocast else element  # bytes of an element of the residual stream
    if execution.recompute_blocks:
        return d * stream
    attention, network = model.attention_projections(), model.feed_forward_projections()
    llama = model.family == "llama"
    qkv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    latents = sum(p.rank or 0 for p in attention.values())
    kept = [model.num_heads * model.head_dim]  # the attention's output
    if not execution.recompute_qkv:
        # Autocast casts the norm's fp32 output once for each of the three projections.
        kept += [qkv, latents, 0 if fused else d * (3 if autocast and llama else 1)]
    elif fused:
        kept.append(latents)
    if execution.recompute_ffn:
        kept.append((2 if llama else 1) * f)
        if fused and not model.latent_norm:
            kept += [p.rank or 0 for name, p in network.items() if name != "down_proj"]
    else:
        kept.append(
            ((3 if compiled else 4) if llama else 1) * f
            + sum(p.rank or 0 for p in network.values())
        )
        kept.append(d * (2 if autocast and llama else 1))
    statistics = 4 * model.num_heads + (4 if fused else 0)
    dropped = 2 * d if model.dropout else 0
    inner = _inner_norms(model, 4 if autocast else element, execution)
    silu = _latent_silu(model, execution) * element
    return 2 * d * stream + sum(kept) * element + statistics + dropped + inner + silu


def _inner_norms(model: ModelConfig, element: int, execution: Execution) -> int:
    """Bytes per token that qk_norm and latent_norm add to a block: what enters them (fp32 under
    autocast), and the rstd (fp32) of each head and latent; none where they are recomputed.
    """
    assert model.head_dim is not None
    assert model.num_kv_heads is not None
    kept = 0
    if model.qk_norm and not execution.recompute_qkv:
        kept += (model.num_heads + model.num_kv_heads) * (model.head_dim * element + 4)
    for shapes, rebuilt in (
        (model.attention_projections(), execution.recompute_qkv),
        (model.feed_forward_projections(), execution.recompute_ffn),
    ):
        sizes = [p.latent_norm_size() for p in shapes.values() if p.latent_norm_size()]
        kept += 0 if rebuilt else sum(size * element + 4 for size in sizes)
    return kept


def _latent_silu(model: ModelConfig, execution: Execution) -> int:
    """Width of what enters the latent activations of a block and is kept."""
    attention, network = model.attention_projections(), model.feed_forward_projections()
    kept = [] if execution.recompute_qkv else [*attention.values()]
    kept += [] if execution.recompute_ffn else [*network.values()]
    return sum(p.rank or 0 for p in kept if p.latent_silu)


def logits_bytes(
    model: ModelConfig, tokens: int, element: int, execution: Execution | None = None
) -> int:
    """Bytes at the peak of the loss: the logits of a chunk of tokens as computed (when not fp32)
    and in fp32, their log-softmax and its gradient; where there are several chunks, also the
    gradients of the head's weight, summed in fp32, and of its input.
    """
    execution = execution or Execution()
    chunk = tokens
    if execution.loss != "whole":
        chunk = min(tokens, execution.chunk_tokens(model.vocab_size))
    logits = chunk * model.vocab_size * (12 if element == 4 else 12 + element)
    if chunk == tokens:
        return logits
    return logits + model.hidden_size * (model.vocab_size * 4 + tokens * element)


def teacher_bytes(teacher: ModelConfig, tokens: int, element: int, weight_element: int) -> int:
    """Bytes of a teacher (training/distillation.py) on each rank, whatever ZeRO shards: its weights
    without norm and head, its block outputs, and what the backward pass keeps of each comparison in
    fp32, the difference and (when not fp32) the features.
    """
    left_out = teacher.hidden_size
    if not teacher.tie_embeddings:
        left_out += teacher.vocab_size * teacher.hidden_size
    weights = (teacher.num_parameters() - left_out) * weight_element
    kept = element + 4 + (4 if element < 4 else 0)
    return weights + teacher.num_layers * tokens * teacher.hidden_size * kept


def bytes_per_rank(
    run: RunConfig, stage: int, world_size: int, teacher: ModelConfig | None = None
) -> dict[str, int]:
    """The whole budget of one rank, by part. Left out: temporary buffers, fragmentation and what
    CUDA and the process take for themselves.
    """
    training = run.training
    micro = training.micro_batch_size or -(-training.global_batch_size // world_size)
    tokens = micro * training.seq_len
    element = 2 if training.precision == "bf16" else 4
    parts = state_bytes(run, stage, world_size)
    autocast = training.precision == "bf16" and stage == 0
    # On the CPU "auto" means plain torch; the table is for GPUs, and an H100's kernels.
    fused = fused_on(run.model, run.execution, 90, run.training.torch_dtype)
    parts["activations"] = activation_bytes(
        run.model,
        tokens,
        element,
        autocast,
        run.execution,
        fused,
        compiled=run.execution.compile != "off",
    )
    if autocast:
        parts["weights"] += (
            2 * run.model.num_parameters()
        )  # the copies that autocast makes and keeps
    parts["logits"] = logits_bytes(run.model, tokens, element, run.execution)
    if teacher is not None:
        stream = 4 if autocast else element
        parts["teacher"] = teacher_bytes(teacher, tokens, stream, stream)
    return parts
