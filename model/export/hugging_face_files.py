"""What the two formats of Hugging Face share: configuration of generation, and saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.errors import InputError
from model.export.source import Source
from model.export.tokenizer import pad_id, write_tokenizer


def require_transformers() -> None:
    """InputError where transformers is missing, and no lines of its own but errors."""
    try:
        from transformers.utils import logging
    except ImportError:
        raise InputError(
            "--format: hf and llama need the package transformers; pip install transformers"
        ) from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def token_ids(source: Source) -> dict[str, Any]:
    """bos_token_id and eos_token_id of a config.json. A document ends where the next begins, so BOS
    ends one too where the tokenizer has no EOS.
    """
    tokenizer = source.tokenizer
    ends = tokenizer.eos_id if tokenizer.eos_id >= 0 else tokenizer.bos_id
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}


def save(
    build: Callable[[Any], Any], config: Any, weights: dict[str, Tensor], source: Source,
    folder: Path,
) -> int:  # fmt: skip
    """Writes a model of transformers with these weights, and its tokenizer; its parameters."""
    with torch.device("meta"):
        model = build(config)
    model.load_state_dict(weights, assign=True, strict=not config.tie_word_embeddings)
    model.tie_weights()
    model.generation_config = _generation(source)
    model.save_pretrained(folder)
    write_tokenizer(source.tokenizer, source.config.max_seq_len, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _generation(source: Source) -> Any:
    """A text ends with EOS or the BOS of the next; ids that the tokenizer lacks never come."""
    from transformers import GenerationConfig

    tokenizer = source.tokenizer
    ends = [token for token in (tokenizer.bos_id, tokenizer.eos_id) if token >= 0]
    padding = pad_id(tokenizer)
    return GenerationConfig(
        bos_token_id=tokenizer.bos_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.bos_id if padding is None else padding,
        suppress_tokens=source.padded_ids or None,
    )
