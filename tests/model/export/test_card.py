"""The model card: known numbers, none invented, metadata that the hub's own package reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from model.export.__main__ import ExportConfig, export
from tests.model.export.checkpoints import random_model, write_checkpoint


def card(source: Path, form: Any, folder: Path, precision: Any = "fp32") -> str:
    export(ExportConfig(str(source), form, str(folder / "out"), precision=precision))
    return (folder / "out" / "README.md").read_text()


def row(text: str, name: str) -> str:
    """The value beside a name in the table."""
    found = [line for line in text.splitlines() if line.startswith(f"| {name}")]
    assert len(found) == 1, f"{name}: {found}"
    return found[0].split("|")[2].strip()


def a_run(folder: Path, tokenizer_file: Path, step: int = 7, status_step: int = 7) -> Path:
    """A run directory around a checkpoint."""
    run = folder / "run"
    model = random_model(r={"q": 4, "ffn": 6}, num_kv_heads=2)
    name = f"step-{step:08d}"
    source = write_checkpoint(model, tokenizer_file, run / "checkpoints" / name, step=step)
    (run / "config.yaml").write_text(yaml.safe_dump({"data": {"path": "/some/where/pile"}}))
    environment = {"git_commit": "abc123", "git_dirty": True}
    (run / "environment.json").write_text(json.dumps(environment))
    status = {"state": "completed", "step": status_step}
    (run / "status.json").write_text(json.dumps(status))
    final = {"split": "test", "loss_nats_per_token": 2.34567, "perplexity": 10.44}
    final |= {"bits_per_byte": 1.2, "word_perplexity": None}
    (run / "final.json").write_text(json.dumps(final))
    return source


def test_the_numbers_of_a_run(tokenizer_file: Path, tmp_path: Path):
    source = a_run(tmp_path, tokenizer_file)
    text = card(source, "llama", tmp_path, precision="bf16")
    config = random_model(r={"q": 4, "ffn": 6}, num_kv_heads=2).config
    assert row(text, "parameters, trained") == f"{config.num_parameters():,}"
    # Counted by hand: embeddings and head 2·400·32; a block 2·32·32 + 2·32·16 (q, o; k, v), the
    # feed-forward network 3·32·48, two norms; the final norm.
    whole = 2 * 400 * 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32) + 32
    assert row(text, "parameters in this folder") == f"{whole:,}"
    assert row(text, "ranks") == "q 4, k dense, v dense, o dense, ffn 6"
    assert row(text, "tokens trained") == "1,234"
    assert row(text, "training steps") == "7"
    assert row(text, "prepared data") == "pile"
    assert row(text, "loss, nats per token, split test, before rounding") == "2.3457"
    assert row(text, "bits per byte, split test, before rounding") == "1.2000"
    assert "word perplexity" not in text
    assert row(text, "git commit") == "abc123 (with changes that are not committed)"
    # 2 (keys, values) · 2 layers · 2 heads · 8 · 2 bytes.
    assert row(text, "key/value cache, bytes per token") == "128"
    # 2 · entries of the factors (q: 4·(32+32); k, v: 32·16; o: 32·32; three of 6·(32+48)) a
    # layer, 4 · 4 · 8 · 33/2 of attention, and 2 · 32 · 400 of the head.
    entries = 4 * 64 + 2 * 32 * 16 + 32 * 32 + 3 * 6 * 80
    flops = 2 * (2 * entries + 4 * 4 * 8 * 33 / 2) + 2 * 32 * 400
    assert row(text, "FLOPs per token") == f"{flops:,.0f}"
    assert str(tmp_path) not in text
    assert "/some/where" not in text


def test_in_full_precision_the_scores_are_of_what_is_in_the_folder(
    tokenizer_file: Path, tmp_path: Path
):
    text = card(a_run(tmp_path, tokenizer_file), "hf", tmp_path)
    assert "| loss, nats per token, split test |" in text


def test_scores_of_another_step_are_left_out(tokenizer_file: Path, tmp_path: Path):
    source = a_run(tmp_path, tokenizer_file, step=7, status_step=9)
    text = card(source, "hf", tmp_path)
    assert "split test" not in text
    assert "rounding" not in text
    assert row(text, "prepared data") == "pile"


def test_what_is_not_known_is_left_out(tokenizer_file: Path, tmp_path: Path):
    source = write_checkpoint(random_model(), tokenizer_file, tmp_path / "alone")
    text = card(source, "hf", tmp_path)
    for name in ("prepared data", "git commit", "split", "None", "license"):
        assert name not in text


@pytest.mark.parametrize("form", ["llama", "hf", "safetensors"])
@pytest.mark.parametrize("r", [None, 8])
def test_the_hub_reads_the_metadata(form: str, r: int | None, tokenizer_file: Path, tmp_path: Path):
    source = write_checkpoint(random_model(r=r), tokenizer_file, tmp_path / "checkpoint")
    text = card(source, form, tmp_path)
    data = ModelCard(text).data
    assert data.library_name == (None if form == "safetensors" else "transformers")
    assert data.license is None
    assert ("lpa" in data.tags) is (r is not None)
    assert ("custom_code" in data.tags) is (form == "hf")
    loading = text.split("```python\n")[1].split("```")[0]
    compile(loading, "card", "exec")
    assert ("trust_remote_code" in loading) is (form == "hf")
