"""Format hf: the factors as they are, in a folder that brings its model's code along."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import ModelConfig, Transformer
from model.export import register
from model.export.hugging_face_files import save, token_ids
from model.export.source import Source

_NAMES = {
    r"^token_embedding\.": "model.embed_tokens.",
    r"^position_embedding\.": "model.embed_positions.",
    r"^final_norm\.": "model.norm.",
    r"^layers\.": "model.layers.",
    r"\.([AB])$": r".\1.weight",
    r"\.bias_([AB])$": r".\1.bias",
}


def lpa_fields(config: ModelConfig) -> dict[str, Any]:
    """The fields of LpaConfig that a model of ours has."""
    same = (
        "family vocab_size hidden_size intermediate_size head_dim rope_theta norm_eps dropout "
        "lm_head_bias qk_norm latent_norm latent_activation document_start_id"
    )
    return {name: getattr(config, name) for name in same.split()} | {
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "ranks": dataclasses.asdict(config.ranks),
    }


def lpa_name(name: str) -> str:
    """The name that LpaForCausalLM has for a weight of ours."""
    for pattern, replacement in _NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def lpa_weights(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights under LpaForCausalLM's names."""
    return {
        lpa_name(name): value.to(dtype)
        for name, value in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_embeddings)
    }


def write_hugging_face(source: Source, dtype: torch.dtype, folder: Path) -> int:
    """Writes the folder; the parameters of the model in it."""
    register()  # so that saving copies the code and writes auto_map
    from model.export.hugging_face.configuration_lpa import LpaConfig
    from model.export.hugging_face.modeling_lpa import LpaForCausalLM

    config = LpaConfig(**lpa_fields(source.config), dtype=dtype, **token_ids(source))
    weights = lpa_weights(source.model(), dtype)
    return save(LpaForCausalLM, config, weights, source, folder)
