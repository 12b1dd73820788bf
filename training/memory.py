"""Memory that a run needs per rank, by ZeRO stage and number of ranks, from formulas."""

from model.config import ModelConfig
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


def activation_bytes(model: ModelConfig, tokens: int, element: int, autocast: bool = False) -> int:
    """Bytes that the forward pass of `tokens` tokens keeps for the backward pass, without logits.

    Per token and layer, in elements: both norms' inputs and outputs 4d; q and the attention's
    output 2·H·D, k and v 2·H_kv·D, the softmax statistics H (fp32); the latents of low-dimensional
    projections r each; the feed-forward network 4f (SwiGLU: gate, up, silu(gate), their product) or
    f (ReLU). Dropout adds a byte an element twice. Outside: the final norm's input and output 2d.
    Autocast keeps the norms' inputs in fp32 and a cast copy for each projection that reads the
    residual stream, instead of the first 4d.
    """
    assert model.head_dim is not None
    assert model.num_kv_heads is not None
    d, f = model.hidden_size, model.intermediate_size
    latents = sum(p.rank or 0 for p in model.block_projections().values())
    wide = 2 * model.num_heads * model.head_dim + 2 * model.num_kv_heads * model.head_dim
    readers, hidden = (5, 4 * f) if model.family == "llama" else (4, f)
    stream = 2 * d * 4 + readers * d * element if autocast else 4 * d * element
    dropped = 2 * d if model.dropout else 0
    layer = stream + (wide + latents + hidden) * element + 4 * model.num_heads + dropped
    final = d * (4 + element) if autocast else 2 * d * element
    return tokens * (model.num_layers * layer + final)


def logits_bytes(model: ModelConfig, tokens: int, element: int) -> int:
    """Bytes of the logits of `tokens` tokens at their peak: as computed (when not fp32), in fp32,
    their log-softmax and its gradient.
    """
    return tokens * model.vocab_size * (12 if element == 4 else 12 + element)


def bytes_per_rank(run: RunConfig, stage: int, world_size: int) -> dict[str, int]:
    """The whole budget of one rank, by part. Left out: temporary buffers, fragmentation and what
    CUDA and the process take for themselves.
    """
    training = run.training
    micro = training.micro_batch_size or -(-training.global_batch_size // world_size)
    tokens = micro * training.seq_len
    element = 2 if training.precision == "bf16" else 4
    parts = state_bytes(run, stage, world_size)
    autocast = training.precision == "bf16" and stage == 0
    parts["activations"] = activation_bytes(run.model, tokens, element, autocast)
    if autocast:
        parts["weights"] += (
            2 * run.model.num_parameters()
        )  # the copies that autocast makes and keeps
    parts["logits"] = logits_bytes(run.model, tokens, element)
    return parts
