"""Format llama: stock LlamaForCausalLM computes what our model computes."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from data.errors import InputError
from model import ModelConfig
from model.export.__main__ import ExportConfig, export
from model.export.llama import refuse_others
from tests.model.export.checkpoints import SHAPE, bound, random_model, write_checkpoint

RANKS: list[Any] = [None, 8, {"q": 4, "k": 2, "v": None, "o": 8, "ffn": 6}]
SHAPES: list[dict[str, Any]] = [{}, {"num_kv_heads": 2, "head_dim": 6}]
ROTARY: list[dict[str, Any]] = [{}, {"rope_theta": 500.0, "norm_eps": 1e-2}]


def exported(model: Any, tokenizer_file: Path, folder: Path, **options: Any) -> Any:
    """The model as transformers loads it from the export."""
    source = write_checkpoint(model, tokenizer_file, folder / "checkpoint")
    export(ExportConfig(str(source), "llama", str(folder / "out"), **options))
    return AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)


@pytest.mark.parametrize(
    ("r", "shape", "rotary", "tied"), list(itertools.product(RANKS, SHAPES, ROTARY, [False, True]))
)
@torch.no_grad()
def test_logits_are_ours(
    r: Any, shape: dict[str, Any], rotary: dict[str, Any], tied: bool, tokenizer_file: Path,
    tmp_path: Path,
):  # fmt: skip
    model = random_model(r=r, tie_embeddings=tied, **shape, **rotary)
    loaded, info = exported(model, tokenizer_file, tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert not any(info.values())
    ids = torch.randint(0, SHAPE["vocab_size"], (2, SHAPE["max_seq_len"]))
    ours = model(ids)
    torch.testing.assert_close(loaded(ids).logits, ours, rtol=0, atol=bound(model, ours))
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in saved) is not tied


@torch.no_grad()
def test_zero_rows_stay_zero(tokenizer_file: Path, tmp_path: Path):
    """As pruned ranks, padded ids and outputs that start at zero leave them."""
    model = random_model()
    model.token_embedding.weight[390:] = 0
    model.layers[0].attention.q_proj.A[3:] = 0
    model.layers[1].attention.o_proj.B.zero_()
    loaded, _ = exported(model, tokenizer_file, tmp_path)
    ids = torch.tensor([[1, 395, 5, 399, 17]])
    ours = model(ids)
    torch.testing.assert_close(loaded(ids).logits, ours, rtol=0, atol=bound(model, ours))
    assert not loaded.model.layers[1].self_attn.o_proj.weight.any()


@torch.no_grad()
def test_a_norm_that_nothing_uses_is_no_hindrance(tokenizer_file: Path, tmp_path: Path):
    model = random_model(r={"o": 8}, latent_norm=True)
    loaded, _ = exported(model, tokenizer_file, tmp_path)
    ids = torch.randint(0, SHAPE["vocab_size"], (1, 20))
    ours = model(ids)
    torch.testing.assert_close(loaded(ids).logits, ours, rtol=0, atol=bound(model, ours))


@torch.no_grad()
def test_bf16_rounds_the_product_once(tokenizer_file: Path, tmp_path: Path):
    model = random_model()
    loaded, _ = exported(model, tokenizer_file, tmp_path, precision="bf16")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    layer = model.layers[1].attention.v_proj
    exact = layer.B.double() @ layer.A.double()
    found = loaded.model.layers[1].self_attn.v_proj.weight.double()
    assert bool(((found - exact).abs() <= exact.abs() * 2.0**-8).all())  # 8 bits of significand
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"family": "paper-1"}, "family paper-1"),
        ({"qk_norm": True}, "qk_norm"),
        ({"latent_norm": True}, "latent_norm"),
        ({"latent_activation": "silu"}, "latent_activation is silu"),
        ({"document_start_id": 1}, "document_start_id is 1"),
        ({"lm_head_bias": True}, "lm_head_bias"),
        ({"hidden_size": 34, "head_dim": 8}, "hidden_size 34 is no multiple of num_heads 4"),
    ],
)
def test_what_llama_cannot_express_is_refused(changes: dict[str, Any], named: str):
    with pytest.raises(InputError, match=named) as caught:
        refuse_others(ModelConfig.from_dict(SHAPE | changes))
    assert "use --format hf" in str(caught.value)
