"""Perplexity of a checkpoint on a text or a prepared folder.

    python -m eval.perplexity --checkpoint RUN_OR_STEP_DIR --data FILE_OR_FOLDER --output out.json

Every token of the data but the first is predicted exactly once. The loss is the sum of their
cross-entropies over their number, so it does not depend on the micro-batch size or the number of
ranks (start it with torchrun or deepspeed to use several).
"""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm

from data.command_line import parse_options
from data.errors import InputError, require_folder_of, run_cli
from data.shards import MANIFEST, PROGRESS, PreparedData, TokenStream
from data.sources import Reading, file_sources
from data.tokenizer import Tokenizer
from model.execution import Execution
from training import checkpoint, distributed
from training.execution import apply_execution

IGNORED = -100  # the target that cross-entropy leaves out
TokenLosses = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Score:
    """What a model was measured to need for a text.

    Attributes:
        nats: Sum of the cross-entropies of all predicted tokens.
        tokens: Number of predicted tokens.
        bytes: UTF-8 bytes of the text that they stand for.
        words: Whitespace-separated words of the text; None where only a part of it was scored.
    """

    nats: float
    tokens: int
    bytes: int
    words: int | None

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """The numbers under the names, with units, that the command writes."""
        return {
            "loss_nats_per_token": self.loss,
            "perplexity": _exp(self.loss),
            "bits_per_byte": self.nats / math.log(2) / self.bytes,
            "word_perplexity": _exp(self.nats / self.words) if self.words else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
        }


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def windows(targets: int, seq_len: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Windows that score each of `targets` tokens once, as (start, first, end).

    A window reads tokens start..end-1 and predicts start+1..end; those after `first` are scored.
    The first window scores up to seq_len tokens, each later one the next `stride`, behind
    seq_len - stride tokens of context. With stride = seq_len no token is read twice.
    """
    done = min(seq_len, targets)
    yield 0, 0, done
    while done < targets:
        end = min(done + stride, targets)
        yield done + stride - seq_len, done, end
        done = end


def score(
    token_losses: TokenLosses,
    stream: TokenStream,
    token_bytes: np.ndarray,
    *,
    seq_len: int,
    stride: int | None = None,
    micro_batch_size: int = 8,
    max_tokens: int | None = None,
    device: torch.device,
    progress: bool = False,
) -> Score:
    """Scores a stream on all ranks together; every rank calls it and gets the same result.

    `token_losses` maps inputs and targets (B, T) to losses (B, T). `token_bytes` (vocab_size,) is
    Tokenizer.token_bytes(), used where max_tokens leaves part of the stream out. Every rank makes
    the same number of calls, as ZeRO stage 3 needs.
    """
    targets = len(stream) - 1
    if targets < 1:
        raise InputError("the text has fewer than two tokens: there is nothing to predict")
    scored = min(targets, max_tokens or targets)
    stride = stride or seq_len
    count = 1 + max(0, math.ceil((scored - seq_len) / stride))
    ranks, rank = distributed.world_size(), distributed.rank()
    mine = itertools.islice(windows(scored, seq_len, stride), rank, None, ranks)
    calls = math.ceil(math.ceil(count / ranks) / micro_batch_size)
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for _ in tqdm(range(calls), unit="batch", disable=None if progress and rank == 0 else True):
        batch = list(itertools.islice(mine, micro_batch_size))
        inputs, wanted = _batch(stream, batch, micro_batch_size, min(seq_len, scored))
        losses = token_losses(inputs.to(device), wanted.to(device))
        kept = wanted[wanted != IGNORED]
        totals[0] += losses.sum(dtype=torch.float64).cpu()
        totals[1] += kept.numel()
        totals[2] += int(token_bytes[kept.numpy()].sum())
    nats, tokens, size = distributed.sum_over_ranks(totals.to(device)).tolist()
    assert int(tokens) == scored, "a token was left out or scored twice"
    whole = scored == targets
    return Score(
        nats,
        int(tokens),
        stream.text_bytes if whole else int(size),
        stream.words if whole else None,
    )


def _batch(
    stream: TokenStream, batch: list[tuple[int, int, int]], rows: int, width: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, width), padded at the right with targets that are left out.

    The shape is always the same, so that nothing is recompiled or runs through another kernel.
    """
    inputs = torch.zeros(rows, width, dtype=torch.int64)
    targets = torch.full((rows, width), IGNORED)
    for row, (start, first, end) in enumerate(batch):
        tokens = torch.from_numpy(stream.read(start, end - start + 1))
        inputs[row, : end - start] = tokens[:-1]
        targets[row, first - start : end - start] = tokens[first - start + 1 :]
    return inputs, targets


@dataclass
class PerplexityConfig:
    """Perplexity of a checkpoint on a text or a prepared folder.

    Attributes:
        checkpoint: A run directory (its newest checkpoint) or a checkpoint's folder.
        data: A prepared folder, or a file that data.prepare reads (text, JSONL, Parquet).
        split: The split of a prepared folder.
        seq_len: Tokens of a window; null: as in training.
        stride: Tokens scored by each window after the first; null: seq_len. Smaller strides give
            each token more context, at the cost of seq_len / stride times the work.
        micro_batch_size: Windows in one forward pass.
        max_tokens: Score only this many tokens from the start; null: all.
        text_key: The field of JSONL or Parquet that holds the text.
        precision: "fp32" or "bf16" weights and activations.
        device: "auto" (the GPU where there is one), "cpu" or "cuda".
        execution: Kernels, attention and compilation, as in a run's YAML.
        output: A JSON file for the result.
    """

    checkpoint: str
    data: str
    split: str = "test"
    seq_len: int | None = None
    stride: int | None = None
    micro_batch_size: int = 8
    max_tokens: int | None = None
    text_key: str = "text"
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    execution: Execution = field(default_factory=Execution)
    output: str | None = None

    def __post_init__(self) -> None:
        for name in ("seq_len", "stride", "micro_batch_size", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}: {value}; it must be at least 1")


def load_stream(config: PerplexityConfig, tokenizer: Tokenizer) -> TokenStream:
    """The tokens to score. InputError where a prepared folder has another tokenizer."""
    path = Path(config.data)
    if not any((path / name).exists() for name in (MANIFEST, PROGRESS)):
        sources = file_sources([config.data], Reading(text_key=config.text_key))
        documents = itertools.chain.from_iterable(source.documents() for source in sources)
        return TokenStream.from_documents(documents, tokenizer)
    prepared = PreparedData.open(path)
    if prepared.tokenizer.sha256 != tokenizer.sha256:
        raise InputError(
            f"{path}: its tokenizer (sha256 {prepared.tokenizer.sha256}) is not the one that "
            f"{config.checkpoint} was trained with ({tokenizer.sha256})"
        )
    return prepared.split(config.split)


def _accept_local_rank(parser: ArgumentParser) -> None:
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")


def main() -> int:
    """The command."""
    config, _ = parse_options(
        PerplexityConfig,
        prog="python -m eval.perplexity",
        description="Perplexity and bits per byte of a checkpoint.",
        add_options=_accept_local_rank,
    )
    require_folder_of(config.output)
    folder = checkpoint.resolve(Path(config.checkpoint))
    state = checkpoint.read_state(folder)
    tokenizer = checkpoint.load_tokenizer(folder)
    stream = load_stream(config, tokenizer)
    device = distributed.evaluation_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = checkpoint.load_model(folder, device, dtype)
    plan = apply_execution(model, config.execution, device, dtype, training=False)
    seq_len = config.seq_len or state["seq_len"]
    if seq_len > model.config.max_seq_len:
        raise InputError(
            f"--seq_len: {seq_len} is over the model's max_seq_len {model.config.max_seq_len}"
        )
    if config.stride and config.stride > seq_len:
        raise InputError(f"--stride: {config.stride} is over seq_len {seq_len}")

    @torch.no_grad()
    def token_losses(inputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = model(inputs, targets, reduction="none")
        return losses

    result = score(
        token_losses,
        stream,
        tokenizer.token_bytes(),
        seq_len=seq_len,
        stride=config.stride,
        micro_batch_size=config.micro_batch_size,
        max_tokens=config.max_tokens,
        device=device,
        progress=True,
    ).to_dict()
    result |= {"step": state["step"], "seq_len": seq_len, "stride": config.stride or seq_len}
    result |= {"precision": config.precision, "data": config.data}
    result |= {"execution": asdict(config.execution), "plan": plan.lines}
    if distributed.rank() == 0:
        for key, value in result.items():
            if key in ("execution", "plan"):
                continue
            print(
                f"{key:<22}{value:>16,.4f}"
                if isinstance(value, float)
                else f"{key:<22}{value!s:>16}"
            )
        if config.output:
            Path(config.output).write_text(json.dumps(result, indent=2) + "\n")
    distributed.barrier()
    return 0


if __name__ == "__main__":
    run_cli(main, distributed.leave)
