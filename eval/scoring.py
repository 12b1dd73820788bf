"""Cross-entropy of a token stream: every token that counts is predicted exactly once.

The loss is the sum of all cross-entropies over their number, summed in float64, so it depends
neither on the micro-batch size nor on the number of ranks.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.errors import InputError
from data.shards import TokenStream
from training import distributed

IGNORED = -100  # the target that cross-entropy leaves out
TokenLosses = Callable[[Tensor, Tensor], Tensor]
# Windows of one document each are padded to a multiple of this, not to seq_len.
_WIDTH = 64


class Window(NamedTuple):
    """Reads tokens start .. end - 1 and predicts start + 1 .. end; those after `first` count."""

    start: int
    first: int
    end: int


@dataclass
class Score:
    """What a model was measured to need for a text.

    Attributes:
        nats: Sum of the cross-entropies of all predicted tokens.
        tokens: Number of predicted tokens.
        bytes: UTF-8 bytes of the text that they stand for; None where that is not known.
        words: Whitespace-separated words of the text; None where only a part of it was scored.
        by_context: Tokens of context, first and last, nats and number of the tokens predicted from
            so many.
    """

    nats: float
    tokens: int
    bytes: int | None
    words: int | None
    by_context: list[tuple[int, int, float, int]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats per token."""
        return self.nats / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """The numbers under the names, with units, that the command writes."""
        return {
            "loss_nats_per_token": self.loss,
            "perplexity": _exp(self.loss),
            "bits_per_byte": self.nats / math.log(2) / self.bytes if self.bytes else None,
            "word_perplexity": _exp(self.nats / self.words) if self.words else None,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
        }

    def context_table(self) -> list[dict[str, float]]:
        """Mean loss by the number of tokens that were there to predict from."""
        return [
            {
                "context_tokens_from": first,
                "context_tokens_to": last,
                "loss_nats_per_token": nats / tokens,
                "tokens": tokens,
            }
            for first, last, nats, tokens in self.by_context
        ]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def windows(targets: int, seq_len: int, stride: int) -> Iterator[Window]:
    """Windows that score each of `targets` tokens once.

    The first window scores up to seq_len tokens, each later one the next `stride`, behind
    seq_len - stride tokens of context. With stride = seq_len no token is read twice.
    """
    done = min(seq_len, targets)
    yield Window(0, 0, done)
    while done < targets:
        end = min(done + stride, targets)
        yield Window(done + stride - seq_len, done, end)
        done = end


def document_windows(
    starts: np.ndarray, length: int, seq_len: int, stride: int, max_tokens: int | None
) -> list[Window]:
    """Windows that score each document alone, longest first.

    `starts` (documents,) are the places of the BOS tokens of a stream of `length` tokens. A BOS is
    context only. A document's last window reaches back as far as seq_len allows, as in
    lm-evaluation-harness. With max_tokens the last document is cut.
    """
    found: list[Window] = []
    left = length if max_tokens is None else max_tokens
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        targets = min(int(end - start) - 1, left)
        if targets < 1:
            continue
        left -= targets
        offset = int(start)
        for _, first, last in windows(targets, seq_len, stride):
            found.append(Window(offset + max(0, last - seq_len), offset + first, offset + last))
    return sorted(found, key=lambda one: one.start - one.end)  # stable: ties stay in order


def score(
    token_losses: TokenLosses,
    stream: TokenStream,
    token_bytes: np.ndarray | None,
    *,
    seq_len: int,
    stride: int | None = None,
    micro_batch_size: int = 8,
    max_tokens: int | None = None,
    per_document: bool = False,
    device: torch.device,
    progress: bool = False,
) -> Score:
    """Scores a stream on all ranks together; every rank calls it and gets the same result.

    `token_losses` maps inputs and targets (B, T) to losses (B, T), 0 where a target is IGNORED.
    `token_bytes` (vocab_size,) is Tokenizer.token_bytes(), used where max_tokens leaves part of the
    stream out. per_document: no document is context for another, and no BOS is predicted. Every
    rank makes the same number of calls, as ZeRO stage 3 needs.
    """
    stride = stride or seq_len
    targets = len(stream) - (stream.documents if per_document else 1)
    if targets < 1:
        raise InputError("the text has fewer than two tokens: there is nothing to predict")
    scored = min(targets, max_tokens or targets)
    mine, calls = _share(stream, scored, seq_len, stride, micro_batch_size, per_document)
    rank = distributed.rank()
    size = torch.zeros(2, dtype=torch.float64)  # tokens, bytes
    nats = torch.zeros(seq_len, dtype=torch.float64, device=device)  # by place in the window
    counts = torch.zeros(seq_len, dtype=torch.float64)
    for _ in tqdm(range(calls), unit="batch", disable=None if progress and rank == 0 else True):
        batch = list(itertools.islice(mine, micro_batch_size))
        width = _width(batch, seq_len) if per_document else min(seq_len, scored)
        inputs, wanted = _batch(stream, batch, micro_batch_size, width)
        losses = token_losses(inputs.to(device), wanted.to(device))
        kept = wanted != IGNORED
        nats[:width] += losses.sum(dim=0, dtype=torch.float64)
        counts[:width] += kept.sum(dim=0)
        size[0] += int(kept.sum())
        if token_bytes is not None:
            size[1] += int(token_bytes[wanted[kept].numpy()].sum())
    summed = distributed.sum_over_ranks(torch.cat([size.to(device), nats, counts.to(device)])).cpu()
    assert int(summed[0]) == scored, "a token was left out or scored twice"
    whole = scored == targets
    by_place = summed[2:].view(2, seq_len)
    text_bytes = stream.text_bytes if whole else int(summed[1]) if token_bytes is not None else None
    return Score(
        float(by_place[0].sum()),
        scored,
        text_bytes,
        stream.words if whole else None,
        _by_context(*by_place),
    )


def _share(
    stream: TokenStream,
    scored: int,
    seq_len: int,
    stride: int,
    micro_batch_size: int,
    per_document: bool,
) -> tuple[Iterator[Window], int]:
    """This rank's windows, and how many micro-batches each rank has."""
    ranks, rank = distributed.world_size(), distributed.rank()
    if not per_document:
        count = 1 + max(0, math.ceil((scored - seq_len) / stride))
        every: Iterator[Window] = windows(scored, seq_len, stride)
    else:
        found = document_windows(stream.document_starts(), len(stream), seq_len, stride, scored)
        count, every = len(found), iter(found)
    mine = itertools.islice(every, rank, None, ranks)
    return mine, math.ceil(math.ceil(count / ranks) / micro_batch_size)


def _width(batch: list[Window], seq_len: int) -> int:
    """The width of a micro-batch of single documents: few different ones, little padding."""
    longest = max((one.end - one.start for one in batch), default=1)
    return min(seq_len, math.ceil(longest / _WIDTH) * _WIDTH)


def _batch(
    stream: TokenStream, batch: list[Window], rows: int, width: int
) -> tuple[Tensor, Tensor]:
    """Inputs and targets (rows, width), padded at the right with targets that are left out.

    Without documents the shape is always the same, so that nothing is recompiled or runs through
    another kernel.
    """
    inputs = torch.zeros(rows, width, dtype=torch.int64)
    targets = torch.full((rows, width), IGNORED)
    for row, (start, first, end) in enumerate(batch):
        tokens = torch.from_numpy(stream.read(start, end - start + 1))
        inputs[row, : end - start] = tokens[:-1]
        targets[row, first - start : end - start] = tokens[first - start + 1 :]
    return inputs, targets


def _by_context(nats: Tensor, counts: Tensor) -> list[tuple[int, int, float, int]]:
    """Sums over 1, 2, 3-4, 5-8, ... tokens of context; place i of a window has i + 1."""
    found = []
    first = 1
    while first <= len(nats):
        last = min(max(1, 2 * (first - 1)), len(nats))
        place = slice(first - 1, last)
        if tokens := int(counts[place].sum()):
            found.append((first, last, float(nats[place].sum()), tokens))
        first = last + 1
    return found
