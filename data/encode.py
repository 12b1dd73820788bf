"""Tokenising batches of documents in several processes, results in the order of the input."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import InputError
from data.shards import token_dtype
from data.tokenizer import Tokenizer


@dataclass(frozen=True)
class SplitRule:
    """Which split a document goes to: a hash of its text, so exact duplicates go together.

    The assignment depends on nothing but the text, the seed and the two fractions.
    """

    seed: int
    valid_fraction: float
    test_fraction: float

    def split(self, text: str) -> str:
        """'train', 'valid' or 'test'."""
        key = f"{self.seed}\0".encode()
        digest = hashlib.blake2b(key + text.encode(), digest_size=8).digest()
        draw = int.from_bytes(digest, "little") / 2**64
        if draw < self.test_fraction:
            return "test"
        return "valid" if draw < self.test_fraction + self.valid_fraction else "train"


@dataclass
class Batch:
    """Documents in the order in which they were read. `split` None: the rule decides for each."""

    texts: list[str]
    split: str | None
    source: int
    ends_source: bool


@dataclass
class EncodedBatch:
    """The documents of a Batch as tokens, in the same order.

    tokens: (sum of lengths,) in the dtype of the shards; the others have one entry a document. An
    empty document has length 0 (every other one has a BOS at least).
    """

    tokens: np.ndarray
    lengths: list[int]
    splits: list[str]
    bytes: list[int]
    words: list[int]
    source: int
    ends_source: bool


class Encoder:
    """Batch -> EncodedBatch. A pure function of the batch, the tokenizer's file and the rule."""

    def __init__(self, tokenizer: Path, rule: SplitRule):
        self.tokenizer = Tokenizer(tokenizer)
        self.rule = rule
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def __call__(self, batch: Batch) -> EncodedBatch:
        ids = [self._encode(text) for text in batch.texts]
        return EncodedBatch(
            tokens=np.concatenate([np.empty(0, dtype=self.dtype), *ids]),
            lengths=[len(document) for document in ids],
            splits=[batch.split or self.rule.split(text) for text in batch.texts],
            bytes=[len(text.encode()) for text in batch.texts],
            words=[len(text.split()) for text in batch.texts],
            source=batch.source,
            ends_source=batch.ends_source,
        )

    def _encode(self, text: str) -> np.ndarray:
        ids = self.tokenizer.encode_document(text) if text.strip() else []
        return np.array(ids, dtype=self.dtype)


def encode_in_order(
    batches: Iterable[Batch], tokenizer: Path, rule: SplitRule, processes: int
) -> Iterator[EncodedBatch]:
    """Yield the encoded batches in order. At most 2 * processes + 2 batches are in memory."""
    if processes == 1:
        encoder = Encoder(tokenizer, rule)
        yield from map(encoder, batches)
        return
    pool = ProcessPoolExecutor(
        processes,
        # Forking is not safe here: pyarrow and the hub's client run threads.
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer, rule),
    )
    others = set(multiprocessing.active_children())
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for _ in range(processes):  # a pool starts a worker for each task that finds none idle
            _submit(pool, _nothing)
        for batch in batches:
            pending.append(_submit(pool, _encode_in_worker, batch))
            if len(pending) > 2 * processes + 1:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        # A worker that was just starting is not in the pool's list of those to end; shutdown would
        # wait for it for ever.
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise InputError(
            "a tokenising process died, most likely out of memory; use fewer --processes (now "
            f"{processes}) and run the same command again to go on"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, task: Callable[..., EncodedBatch | None], *args: Batch
) -> "Future[Any]":
    try:
        return pool.submit(task, *args)
    except (OSError, ValueError) as error:
        # It was starting a worker just when another one had died, with pipes closed by then.
        raise BrokenProcessPool(str(error)) from error


_encoder: Encoder | None = None


def _start_worker(tokenizer: Path, rule: SplitRule) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(tokenizer, rule)


def _die_with_parent() -> None:
    """Exit when the parent does.

    A worker waits on a queue that it holds open itself, so it would survive a kill of its parent.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(batch: Batch) -> EncodedBatch:
    assert _encoder is not None
    return _encoder(batch)


def _nothing() -> None:
    """A task that makes the pool start a worker."""
