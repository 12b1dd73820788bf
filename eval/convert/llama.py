"""config.json of a LlamaForCausalLM as a ModelConfig of ours, and the names of its tensors.

Facts of the format: transformers' LlamaConfig and LlamaForCausalLM (5.x, and 4.x for the older
keys `rope_theta` and `rope_scaling`).
"""

import json
from pathlib import Path
from typing import Any

from data.errors import InputError
from model import ModelConfig

# Their key -> ours; all of these must be there.
REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
}
# These have defaults in LlamaConfig that are ours, too, and older files leave them out.
OPTIONAL = {
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "tie_word_embeddings": "tie_embeddings",
}
# What our model has no place for: the key and the one value that is allowed (also by absence).
FIXED: dict[str, Any] = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
_THETA = 10000.0  # LlamaConfig's, where an older file says nothing

_BLOCK = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "feed_forward_norm",
    "self_attn.q_proj": "attention.q_proj",
    "self_attn.k_proj": "attention.k_proj",
    "self_attn.v_proj": "attention.v_proj",
    "self_attn.o_proj": "attention.o_proj",
    "mlp.gate_proj": "feed_forward.gate_proj",
    "mlp.up_proj": "feed_forward.up_proj",
    "mlp.down_proj": "feed_forward.down_proj",
}


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """The name in their file of each of our tensors; a tied head has none."""
    names = {"token_embedding.weight": "model.embed_tokens.weight"}
    for layer in range(config.num_layers):
        for theirs, ours in _BLOCK.items():
            names[f"layers.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    names["final_norm.weight"] = "model.norm.weight"
    if not config.tie_embeddings:
        names["lm_head.weight"] = "lm_head.weight"
    return names


def may_be_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a tensor of their file says nothing of its own: the table of rotary angles that old
    files hold, and the head where it is tied to the embedding (transformers ignores both).
    """
    return name.endswith("rotary_emb.inv_freq") or (
        config.tie_embeddings and name == "lm_head.weight"
    )


def read_config(folder: Path) -> ModelConfig:
    """The model that FOLDER/config.json describes. InputError, naming the key, where our model
    cannot express it or a key is missing.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({(error.strerror or '').lower()})") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: an object is expected, found {type(found).__name__}")
    _check_architecture(found, path)
    fields: dict[str, Any] = {"rope_theta": _rope_theta(found, path)}
    for theirs, ours in REQUIRED.items():
        if found.get(theirs) is None:
            raise InputError(f"{path}: the key {theirs} is missing")
        fields[ours] = found[theirs]
    for theirs, ours in OPTIONAL.items():
        if found.get(theirs) is not None:
            fields[ours] = found[theirs]
    try:
        return ModelConfig(**fields)
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _check_architecture(found: dict[str, Any], path: Path) -> None:
    if "architectures" not in found:
        raise InputError(f"{path}: the key architectures is missing")
    if found["architectures"] != ["LlamaForCausalLM"]:
        raise InputError(
            f"{path}: architectures is {found['architectures']!r}; allowed is ['LlamaForCausalLM']"
        )
    for key, allowed in FIXED.items():
        value = found.get(key, allowed)
        if value != allowed:
            raise InputError(
                f"{path}: {key} is {value!r}, which our model has no place for; allowed is "
                f"{json.dumps(allowed)}"
            )


def _rope_theta(found: dict[str, Any], path: Path) -> float:
    """The base of the rotary angles, once it is certain that nothing scales them."""
    theta: Any = found.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = found.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise InputError(f"{path}: {key} is {rope!r}; an object or null is expected")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise InputError(f"{path}: {key} has rope_type {kind!r}; allowed is 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise InputError(
                f"{path}: {key} has partial_rotary_factor {rope['partial_rotary_factor']!r}; "
                "allowed is 1.0"
            )
        theta = rope.get("rope_theta", theta)
    return float(theta) if isinstance(theta, int | float) else _theta_or_default(theta, path)


def _theta_or_default(theta: Any, path: Path) -> float:
    if theta is None:
        return _THETA
    raise InputError(f"{path}: rope_theta is {theta!r}; a number is expected")
