"""Perplexity of a model on texts or prepared folders.

    python -m eval.perplexity --checkpoint RUN_OR_STEP_DIR --data FILE_OR_FOLDER --output out.json

Start it with torchrun or deepspeed to use several GPUs. docs/evaluation.md defines every number.
"""

import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser
from tabulate import tabulate

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from data.shards import MANIFEST, PROGRESS, PreparedData, TokenStream
from data.sources import Document, Reading, file_sources
from data.text_files import decoded_lines, open_bytes, reading
from eval import wikitext
from eval.models import Scorable, load
from eval.scoring import score
from model.execution import Execution
from training import distributed

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class PerplexityConfig:
    """Perplexity of a model on texts or prepared folders.

    Attributes:
        checkpoint: A run directory (its newest checkpoint), a checkpoint's folder, or hf: and the
            name or folder of a causal language model of Hugging Face.
        data: Prepared folders, or files that data.prepare reads (text, JSONL, Parquet).
        split: The split of prepared folders.
        seq_len: Tokens of a window; null: as in training (hf: models: 1024, or their maximum).
        stride: Tokens scored by each window after the first; null: seq_len. Smaller strides give
            each token more context, at the cost of seq_len / stride times the work.
        per_document: Score each document alone: no other is context for it, no BOS is predicted.
        micro_batch_size: Windows in one forward pass.
        max_tokens: Score only this many tokens of each data set from its start; null: all.
        text_key: The field of JSONL or Parquet that holds the text.
        wikitext: The files are WikiText's: articles are documents, their text is detokenised, and
            word perplexity counts their tokens and line ends.
        precision: "fp32" or "bf16" weights and activations.
        device: "auto" (the GPU where there is one), "cpu" or "cuda".
        execution: Kernels, attention and compilation, as in a run's YAML.
        output: A JSON file for the result.
    """

    checkpoint: str
    data: list[str]
    split: str = "test"
    seq_len: int | None = None
    stride: int | None = None
    per_document: bool = False
    micro_batch_size: int = 8
    max_tokens: int | None = None
    text_key: str = "text"
    wikitext: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    execution: Execution = field(default_factory=Execution)
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "stride", "micro_batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: {value}; it must be at least 1")
        if not self.data:
            raise ValueError("--data: at least one prepared folder or file is needed")


def load_stream(
    config: PerplexityConfig, data: str, model: Scorable, tokenizer_sha256: str | None
) -> TokenStream:
    """The tokens to score. InputError where a prepared folder has another tokenizer."""
    path = Path(data)
    if any((path / name).exists() for name in (MANIFEST, PROGRESS)):
        if config.wikitext:
            raise InputError(f"--wikitext: {path} is a prepared folder; give a file of WikiText's")
        prepared = PreparedData.open(path)
        if prepared.tokenizer.sha256 != tokenizer_sha256:
            theirs = tokenizer_sha256 or "a tokenizer of Hugging Face"
            raise InputError(
                f"{path}: its tokenizer (sha256 {prepared.tokenizer.sha256}) is not the one that "
                f"{config.checkpoint} was trained with ({theirs}); give a text file instead"
            )
        return prepared.split(config.split)
    if config.wikitext:
        with reading(path), open_bytes(path) as file:
            found = list(wikitext.articles(line for _, line in decoded_lines(file, path)))
        texts = (Document(one.text, data) for one in found)
        stream = TokenStream.from_documents(texts, model.tokenizer)
        stream.words = sum(one.words for one in found)
        return stream
    sources = file_sources([data], Reading(text_key=config.text_key))
    documents = itertools.chain.from_iterable(source.documents() for source in sources)
    return TokenStream.from_documents(documents, model.tokenizer)


def _window(config: PerplexityConfig, model: Scorable) -> tuple[int, int]:
    """seq_len and stride. InputError where the model cannot take them."""
    seq_len = config.seq_len or model.seq_len
    if seq_len > model.max_seq_len:
        raise InputError(
            f"--seq_len: {seq_len} is over the model's max_seq_len {model.max_seq_len}"
        )
    stride = config.stride or seq_len
    if stride > seq_len:
        raise InputError(f"--stride: {stride} is over seq_len {seq_len}")
    return seq_len, stride


def evaluate(config: PerplexityConfig) -> dict[str, Any]:
    """Scores every data set; every rank calls it. With one data set its numbers also stand at the
    top of the result.
    """
    device = distributed.evaluation_device(config.device)
    model, tokenizer = load(config.checkpoint, device, DTYPES[config.precision], config.execution)
    seq_len, stride = _window(config, model)
    streams = [load_stream(config, data, model, tokenizer) for data in config.data]
    results = []
    for data, stream in zip(config.data, streams, strict=True):
        found = score(
            model.token_losses,
            stream,
            model.token_bytes,
            seq_len=seq_len,
            stride=stride,
            micro_batch_size=config.micro_batch_size,
            max_tokens=config.max_tokens,
            per_document=config.per_document,
            device=device,
            progress=True,
        )
        results.append({"data": data, **found.to_dict(), "loss_by_context": found.context_table()})
    settings: dict[str, Any] = {
        "seq_len": seq_len,
        "stride": stride,
        "per_document": config.per_document,
    }
    settings |= {"precision": config.precision, "execution": asdict(config.execution)}
    only = results[0] if len(results) == 1 else {}
    return only | model.about | settings | {"checkpoint": config.checkpoint, "results": results}


COLUMNS = {
    "data": "data",
    "loss_nats_per_token": "nats/token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits/byte",
    "word_perplexity": "word perplexity",
    "tokens": "tokens",
    "bytes": "bytes",
    "words": "words",
}


def describe(result: dict[str, Any]) -> str:
    """The table that the command prints."""
    rows = [[one[key] for key in COLUMNS] for one in result["results"]]
    return tabulate(
        rows,
        headers=list(COLUMNS.values()),
        floatfmt=("", ".4f", ".3f", ".4f", ".3f", "", "", ""),
        intfmt=",",
        missingval="-",
    )


def _accept_local_rank(parser: ArgumentParser) -> None:
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")


def main() -> int:
    """The command."""
    config, _ = parse_options(
        PerplexityConfig,
        prog="python -m eval.perplexity",
        description="Perplexity and bits per byte of a model.",
        add_options=_accept_local_rank,
    )
    require_folder_of(config.output)
    result = evaluate(config)
    if distributed.rank() == 0:
        print(describe(result))
        if config.output:
            Path(config.output).write_text(json.dumps(result, indent=2) + "\n")
    distributed.barrier()
    return 0


if __name__ == "__main__":
    run_cli(main, distributed.leave)
