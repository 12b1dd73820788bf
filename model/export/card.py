"""The model card: README.md with the numbers of the run, those that are known."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from model.export.source import Source, run_facts

TEMPLATES = Path(__file__).resolve().parent / "template"
_PRODUCTS = "products B·A of two thin factors"
_LOAD_HF = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{code})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{code})"""
_LOADING = {
    "llama": _LOAD_HF.format(code=""),
    "hf": _LOAD_HF.format(code=", trust_remote_code=True"),
    "safetensors": """from safetensors.torch import load_file

weights = load_file("FOLDER/model.safetensors")  # the shape is in model.json""",
}
_NOTES = {
    "llama": "",
    "hf": "Needs transformers 5 or newer. The code of the model is in `modeling_lpa.py` and "
    "`configuration_lpa.py` beside this page; transformers runs it only with "
    "`trust_remote_code=True`.",
    "safetensors": "",
}
_SUMMARIES = {
    "llama": "A decoder-only Transformer in Llama's format.{factors}",
    "hf": "A decoder-only Transformer{whose}.",
    "safetensors": "The weights of a decoder-only Transformer{whose}.",
}


def write_card(source: Source, form: str, dtype: torch.dtype, count: int, folder: Path) -> None:
    """Writes README.md. count: parameters of the exported model."""
    loader = FileSystemLoader(TEMPLATES)
    # What goes in is names and numbers, for Markdown, not for HTML.
    pages = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)
    low = any(rank is not None for rank in dataclasses.asdict(source.config.ranks).values())
    whose = factors = ""
    if low:
        whose = f" with low-dimensional projections, {_PRODUCTS}"
        factors = (
            f" It was trained with low-dimensional projections, {_PRODUCTS}, multiplied out here."
        )
    page = pages.get_template("card.md.jinja").render(
        front_matter=yaml.safe_dump(front_matter(form, low), sort_keys=False),
        title=_title(source, low),
        summary=_SUMMARIES[form].format(whose=whose, factors=factors),
        rows=rows(source, form, dtype, count),
        loading=_LOADING[form],
        note=_NOTES[form],
    )
    (folder / "README.md").write_text(page, encoding="utf-8")


def front_matter(form: str, low: bool) -> dict[str, Any]:
    """The metadata that the hub reads. The library that loads our own format is not on it."""
    tags = ["safetensors", *(["lpa", "low-rank"] if low else [])]
    if form == "safetensors":
        return {"tags": tags}
    if form == "hf":
        tags.append("custom_code")
    return {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def _title(source: Source, low: bool) -> str:
    kind = "Low-dimensional" if low else "Vanilla"
    return f"{kind} Transformer, {source.config.num_parameters():,} parameters"


def rows(source: Source, form: str, dtype: torch.dtype, count: int) -> dict[str, str]:
    """The table of the card: what is known, under names that say the unit."""
    config, state, facts = source.config, source.state, run_facts(source)
    final = facts.get("final", {})
    length = state.get("seq_len")
    found: dict[str, Any] = {
        "parameters, trained": f"{config.num_parameters():,}",
        "parameters in this folder": f"{count:,}",
        "precision in this folder": str(dtype).removeprefix("torch."),
        "ranks": _ranks(source),
        "layers, hidden size": f"{config.num_layers}, {config.hidden_size}",
        "query heads, key and value heads, head dimension": f"{config.num_heads}, "
        f"{config.num_kv_heads}, {config.head_dim}",
        "longest sequence in tokens": f"{config.max_seq_len:,}",
        "key/value cache, bytes per token": f"{cache_bytes(source, dtype):,}",
    }
    if length:
        flops = config.flops_per_token(length)
        found[f"FLOPs per token, forward, factorised, at {length:,} tokens"] = f"{flops:,.0f}"
    numbers = {"training steps": state.get("step"), "tokens trained": state.get("tokens")}
    found |= {name: f"{value:,}" for name, value in numbers.items() if value is not None}
    found["prepared data"] = facts.get("data")
    for key, name in {
        "loss_nats_per_token": "loss, nats per token",
        "perplexity": "perplexity",
        "bits_per_byte": "bits per byte",
        "word_perplexity": "word perplexity",
    }.items():
        if isinstance(final.get(key), int | float):
            # final.json scores the weights as they were trained.
            rounded = "" if dtype == torch.float32 else ", before rounding"
            found[f"{name}, split {final.get('split')}{rounded}"] = f"{final[key]:.4f}"
    if "git_commit" in facts:
        changed = " (with changes that are not committed)" if facts["git_dirty"] else ""
        found["git commit of the training code"] = facts["git_commit"] + changed
    return {name: str(value) for name, value in found.items() if value is not None}


def cache_bytes(source: Source, dtype: torch.dtype) -> int:
    """Keys and values of one token in all layers: 2 · L · H_kv · D · bytes of the dtype."""
    config = source.config
    assert config.num_kv_heads is not None
    assert config.head_dim is not None
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def _ranks(source: Source) -> str:
    ranks = dataclasses.asdict(source.config.ranks).items()
    return ", ".join(f"{kind} {'dense' if rank is None else rank}" for kind, rank in ranks)
