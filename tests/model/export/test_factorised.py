"""Format hf: LpaForCausalLM computes what our model computes, whatever its options."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from model.export.__main__ import ExportConfig, export
from model.export.factorised import lpa_fields, lpa_weights
from model.export.hugging_face.configuration_lpa import LpaConfig
from model.export.hugging_face.modeling_lpa import LpaForCausalLM
from tests.model.export.checkpoints import SHAPE, bound, random_model, write_checkpoint

RANKS: list[Any] = [None, 8, {"q": 4, "k": 2, "v": None, "o": 8, "ffn": 6}]
LATENT: list[dict[str, Any]] = [{}, {"latent_norm": True}, {"latent_activation": "silu"}]
HEADS: list[dict[str, Any]] = [
    {"lm_head_bias": False}, {"lm_head_bias": True},
    {"tie_embeddings": True, "lm_head_bias": False},
]  # fmt: skip
FAMILIES = ["llama", "paper-1"]


@pytest.mark.parametrize(
    ("family", "r", "latent", "head", "qk_norm", "grouped", "documents"),
    list(itertools.product(FAMILIES, RANKS, LATENT, HEADS, *[[False, True]] * 3)),
)
@torch.no_grad()
def test_logits_are_ours(
    family: str, r: Any, latent: dict[str, Any], head: dict[str, Any], qk_norm: bool,
    grouped: bool, documents: bool,
):  # fmt: skip
    shape = {"num_kv_heads": 2, "head_dim": 6} if grouped else {}
    start = {"document_start_id": 1} if documents else {}
    options = latent | head | shape | start
    model = random_model(family=family, r=r, qk_norm=qk_norm, norm_eps=1e-3, **options)
    theirs = LpaForCausalLM(LpaConfig(**lpa_fields(model.config))).eval()
    weights = lpa_weights(model, torch.float32)
    missing = theirs.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys == (["lm_head.weight"] if model.config.tie_embeddings else [])
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 24))
    ids[:, ::7] = 1
    ours = model(ids)
    torch.testing.assert_close(theirs(ids).logits, ours, rtol=0, atol=bound(model, ours))
    assert sum(p.numel() for p in theirs.parameters()) == model.config.num_parameters()


ON_DISK: list[dict[str, Any]] = [
    {},
    {"family": "paper-1", "tie_embeddings": True, "lm_head_bias": False},
    {"r": RANKS[2], "qk_norm": True, "latent_norm": True, "tie_embeddings": True},
    {"r": RANKS[2], "latent_activation": "silu", "lm_head_bias": True, "num_kv_heads": 1},
    {"r": None, "document_start_id": 1, "rope_theta": 500.0, "head_dim": 6},
]


@pytest.mark.parametrize("options", ON_DISK)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@torch.no_grad()
def test_files_hold_the_weights_as_they_are(
    options: dict[str, Any], precision: Any, tokenizer_file: Path, tmp_path: Path
):
    model = random_model(**options)
    source = write_checkpoint(model, tokenizer_file, tmp_path / "checkpoint")
    count = export(ExportConfig(str(source), "hf", str(tmp_path / "out"), precision=precision))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert count == model.config.num_parameters()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    found = loaded.state_dict()
    for name, value in lpa_weights(model, torch.float32).items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], value.to(dtype))
    tied = loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert tied is model.config.tie_embeddings
    if precision == "fp32":
        ids = torch.randint(0, SHAPE["vocab_size"], (2, 24))
        ours = model(ids)
        torch.testing.assert_close(loaded(ids).logits, ours, rtol=0, atol=bound(model, ours))
