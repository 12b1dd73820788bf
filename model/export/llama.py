"""Format llama: the factors multiplied out, as a plain LlamaForCausalLM.

Our family llama is Llama's arithmetic with W = B·A (sums may round in another order), but for
rotary angles: transformers computes them in float32, we in float64.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from data.errors import InputError
from model import ModelConfig, Transformer
from model.export.hugging_face_files import save, token_ids
from model.export.source import Source
from model.export.tokenizer import amend

_NAMES = {
    r"^token_embedding\.": "model.embed_tokens.",
    r"^final_norm\.": "model.norm.",
    r"^layers\.": "model.layers.",
    r"\.attention_norm\.": ".input_layernorm.",
    r"\.feed_forward_norm\.": ".post_attention_layernorm.",
    r"\.attention\.": ".self_attn.",
    r"\.feed_forward\.": ".mlp.",
}


def refuse_others(config: ModelConfig) -> None:
    """InputError where Llama cannot express a model."""
    low = [shape for shape in config.block_projections().values() if shape.rank is not None]
    normed = any(shape.latent_eps is not None for shape in low)
    activated = any(shape.latent_silu for shape in low)
    reasons = {
        f"family {config.family} is not Llama's; use --format hf": config.family != "llama",
        "qk_norm is true, and Llama has none; use --format hf": config.qk_norm,
        "latent_norm is true, and B·A cannot be multiplied out with a norm between; use --format "
        "hf": normed,
        f"latent_activation is {config.latent_activation}, and B·A cannot be multiplied out with "
        "it between; use --format hf": activated,
        f"document_start_id is {config.document_start_id}, and Llama's attention crosses documents"
        "; use --format hf": config.document_start_id is not None,
        "lm_head_bias is true, and Llama's head has none; use --format hf": config.lm_head_bias,
        f"hidden_size {config.hidden_size} is no multiple of num_heads {config.num_heads}, which "
        "LlamaConfig demands; use --format hf": config.hidden_size % config.num_heads != 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise InputError(f"--format llama: model.{reason}")


@torch.no_grad()
def llama_weights(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under Llama's names. A product is computed in float64 and rounded once."""
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "B":
            continue
        if leaf == "A":
            factor = model.get_parameter(f"{owner}.B")
            value, name = factor.double() @ value.double(), f"{owner}.weight"
        if name == "lm_head.weight" and model.config.tie_embeddings:
            continue
        weights[llama_name(name)] = value.to(dtype)
    return weights


def llama_name(name: str) -> str:
    """Llama's name for a weight of ours."""
    for pattern, replacement in _NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def write_llama(source: Source, dtype: torch.dtype, folder: Path) -> int:
    """Writes the folder; the parameters of the model in it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = source.config
    theirs = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        dtype=dtype,
        **token_ids(source),
    )
    weights = llama_weights(source.model(), dtype)
    count = save(LlamaForCausalLM, theirs, weights, source, folder)
    # The names that transformers 4 and what follows it read.
    old = {"rope_theta": config.rope_theta, "torch_dtype": str(dtype).removeprefix("torch.")}
    amend(folder / "config.json", old)
    return count
