"""transformers' Llama with the weights of a vanilla model of ours (family llama)."""

from typing import Any

from torch import Tensor

from data.errors import InputError
from model import Transformer

# Parts of a parameter's name in transformers, and in our model.
NAMES = {
    "model.embed_tokens": "token_embedding",
    "model.norm": "final_norm",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn": "attention",
    "mlp": "feed_forward",
}


def llama(model: Transformer) -> Any:
    """The same model as transformers' LlamaForCausalLM, for training: the dtype of ours, attention
    by torch's SDPA, no cache. InputError where transformers is not installed.
    """
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise InputError(
            "the benchmark `step` needs transformers, which requirements-dev.txt installs"
        ) from None
    ours = model.config
    shape: dict[str, Any] = {
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "intermediate_size": ours.intermediate_size,
        "num_hidden_layers": ours.num_layers,
        "num_attention_heads": ours.num_heads,
        "num_key_value_heads": ours.num_kv_heads,
        "head_dim": ours.head_dim,
        "max_position_embeddings": ours.max_seq_len,
        "rms_norm_eps": ours.norm_eps,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": ours.rope_theta},
        "attn_implementation": "sdpa",
        "use_cache": False,
    }
    theirs = LlamaForCausalLM(LlamaConfig(**shape))
    own = model.state_dict()
    weights = {name: own[_own_name(name)].clone() for name in theirs.state_dict()}
    theirs.load_state_dict(weights, strict=True)
    return theirs.train()


def _own_name(name: str) -> str:
    for part, own in NAMES.items():
        name = name.replace(part, own)
    return name


def next_tokens(tokens: Tensor) -> Tensor:
    """The targets that transformers makes of labels = tokens (B, T) inside of the model: the next
    token of each position, and none (-100) for the last.
    """
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    return targets
